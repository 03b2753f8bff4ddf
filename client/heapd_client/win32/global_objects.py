"""The Global functions: objects on the process heap, FIXED (a block) or MOVEABLE (a handle); see moveable.py.

Kept for programs that have them; new ones use the heap functions.
"""

from __future__ import annotations

from . import moveable
from .arguments import address
from .constants import (
    ERROR_INVALID_HANDLE,
    GMEM_DISCARDABLE,
    GMEM_INVALID_HANDLE,
    GMEM_MOVEABLE,
    GMEM_VALID_FLAGS,
)
from .last_error import attempt, fails_with

__all__ = [
    "GlobalAlloc",
    "GlobalDiscard",
    "GlobalFlags",
    "GlobalFree",
    "GlobalHandle",
    "GlobalLock",
    "GlobalReAlloc",
    "GlobalSize",
    "GlobalUnlock",
]

_RULES = moveable.Rules(
    valid=int(GMEM_VALID_FLAGS),
    discardable=int(GMEM_DISCARDABLE),
    tells_share=True,
    smallest=1,
    converts=True,
    unlocks_all=True,
    lock_error=ERROR_INVALID_HANDLE,
    unlock_error=None,
    flags_error=ERROR_INVALID_HANDLE,
    handle_error=ERROR_INVALID_HANDLE,
)


@fails_with(0)
def GlobalAlloc(uFlags: int, dwBytes: int) -> int:
    """Make an object. Returns: its address if it is FIXED, else its handle; 0 for failure: ERROR_NOT_ENOUGH_MEMORY,
    ERROR_INVALID_PARAMETER for unknown flags.

    Args: uFlags (GMEM_FIXED, GMEM_MOVEABLE, GMEM_ZEROINIT, GMEM_DISCARDABLE; others count for nothing), dwBytes
    (a MOVEABLE object of 0 bytes is a discarded one).
    """
    return moveable.alloc(_RULES, uFlags, dwBytes)


def GlobalReAlloc(hMem: int | None, dwBytes: int, uFlags: int) -> int:
    """Resize an object, or with GMEM_MODIFY change its attributes alone. Returns: its address or handle; 0 for
    failure, the object is as it was.

    Args: uFlags (GMEM_MOVEABLE: what is FIXED or locked may move; GMEM_ZEROINIT: what is added is zero;
    GMEM_MODIFY, and with it GMEM_DISCARDABLE, or GMEM_MOVEABLE: a FIXED
    object becomes moveable).
    """
    return moveable.realloc(_RULES, hMem, dwBytes, uFlags)


@fails_with(0)
def GlobalSize(hMem: int | None) -> int:
    """Bytes of an object; 0 if it is discarded, or with ERROR_INVALID_HANDLE if it is none."""
    return moveable.size_of(hMem)


def GlobalFree(hMem: int | None) -> int:
    """Free an object, locked or not. Returns: 0; for failure what was given: ERROR_INVALID_HANDLE, ERROR_NOACCESS."""
    return attempt(address(hMem), moveable.free, hMem)


@fails_with(0)
def GlobalLock(hMem: int | None) -> int:
    """Count one lock more. Returns: the address of the object's data; 0 for failure: ERROR_DISCARDED,
    ERROR_INVALID_HANDLE. A FIXED object counts none."""
    return moveable.lock(_RULES, hMem)


@fails_with(False)
def GlobalUnlock(hMem: int | None) -> bool:
    """Count one lock less. Returns: True while locks are left; False with NO_ERROR if that was the last, with
    ERROR_NOT_LOCKED if there was none. What is FIXED, or no object,
    can be unlocked at any time."""
    return moveable.unlock(_RULES, hMem)


@fails_with(int(GMEM_INVALID_HANDLE))
def GlobalFlags(hMem: int | None) -> int:
    """GMEM_DISCARDABLE, GMEM_DISCARDED, GMEM_DDESHARE and, in the low byte, the number of locks; for failure
    GMEM_INVALID_HANDLE."""
    return moveable.flags_of(_RULES, hMem)


@fails_with(0)
def GlobalHandle(pMem: int | None) -> int:
    """The handle of the object whose data is at an address; of a FIXED one the address itself. 0 for failure."""
    return moveable.handle_of(_RULES, pMem)


def GlobalDiscard(hMem: int | None) -> int:
    """Give an unlocked object's bytes back and keep its handle: GlobalReAlloc(hMem, 0, GMEM_MOVEABLE)."""
    return GlobalReAlloc(hMem, 0, GMEM_MOVEABLE)
