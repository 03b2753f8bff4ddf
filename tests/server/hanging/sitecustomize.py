"""Loaded by a daemon that is to hang: at the status request that finds the file $HEAPD_TEST_HANG, which it removes."""

from __future__ import annotations

import os
from typing import Any

from heapd.service import Service

if "HEAPD_TEST_HANG" in os.environ:
    _status = Service.status

    def status_or_hang(self: Service) -> dict[str, Any]:
        try:
            os.unlink(os.environ["HEAPD_TEST_HANG"])
        except FileNotFoundError:
            return _status(self)
        while True:
            pass

    Service.status = status_or_hang  # type: ignore[method-assign]
