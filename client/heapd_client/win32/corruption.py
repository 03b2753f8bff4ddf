"""HeapEnableTerminationOnCorruption: whether a process that frees what is no block is to end, and how."""

from __future__ import annotations

import os
import sys

from .constants import ERROR_INVALID_PARAMETER
from .last_error import Failure

__all__ = ["is_fatal", "notice"]

is_fatal = False  # of the process, for good


def notice(failure: Failure) -> None:
    """HeapFree or HeapReAlloc failed: end the process if that is what is wanted, and it was given no block."""
    if is_fatal and failure.code in (None, ERROR_INVALID_PARAMETER):
        sys.stderr.write(f"heapd: heap corruption: {failure.reason}; this process ends, as it asked to\n")
        sys.stderr.flush()
        os.abort()
