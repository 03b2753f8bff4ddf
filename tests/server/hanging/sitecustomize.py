"""Loaded by a daemon that is to hang: at the first start, status request or stop that finds a file of that name in the
directory $HEAPD_TEST_HANG, and removes it. At a status request it turns in circles, else it sleeps."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from heapd.manager import HeapManager
from heapd.service import Service


def is_to_hang(where: str) -> bool:
    try:
        (Path(os.environ["HEAPD_TEST_HANG"]) / where).unlink()
    except FileNotFoundError:
        return False
    return True


if "HEAPD_TEST_HANG" in os.environ:
    _init, _status, _shutdown = Service.__init__, Service.status, HeapManager.shutdown

    def init_or_hang(self: Service, *arguments: Any, **named: Any) -> None:
        if is_to_hang("start"):
            signal.pause()
        _init(self, *arguments, **named)

    def status_or_hang(self: Service) -> dict[str, Any]:
        if is_to_hang("status"):
            while True:
                pass
        return _status(self)

    def shutdown_or_hang(self: HeapManager) -> None:
        if is_to_hang("stop"):
            signal.pause()
        _shutdown(self)

    Service.__init__ = init_or_hang  # type: ignore[method-assign]
    Service.status = status_or_hang  # type: ignore[method-assign]
    HeapManager.shutdown = shutdown_or_hang  # type: ignore[method-assign]
