"""The Local functions: objects on the process heap, FIXED (a block) or MOVEABLE (a handle); see moveable.py.

Kept for programs that have them; new ones use the heap functions.
"""

from __future__ import annotations

from . import moveable
from .arguments import address
from .constants import (
    ERROR_NOACCESS,
    ERROR_NOT_LOCKED,
    LMEM_DISCARDABLE,
    LMEM_INVALID_HANDLE,
    LMEM_MOVEABLE,
    LMEM_VALID_FLAGS,
)
from .last_error import attempt, fails_with

__all__ = [
    "LocalAlloc",
    "LocalDiscard",
    "LocalFlags",
    "LocalFree",
    "LocalHandle",
    "LocalLock",
    "LocalReAlloc",
    "LocalSize",
    "LocalUnlock",
]

_RULES = moveable.Rules(
    valid=int(LMEM_VALID_FLAGS),
    discardable=int(LMEM_DISCARDABLE),
    tells_share=False,
    smallest=0,
    converts=False,
    unlocks_all=False,
    lock_error=None,
    unlock_error=ERROR_NOT_LOCKED,
    flags_error=ERROR_NOACCESS,
    handle_error=ERROR_NOACCESS,
)


@fails_with(0)
def LocalAlloc(uFlags: int, uBytes: int) -> int:
    """Make an object. Returns: its address if it is FIXED, else its handle; 0 for failure: ERROR_NOT_ENOUGH_MEMORY,
    ERROR_INVALID_PARAMETER for unknown flags.

    Args: uFlags (LMEM_FIXED, LMEM_MOVEABLE, LMEM_ZEROINIT, LMEM_DISCARDABLE; others count for nothing), uBytes
    (a MOVEABLE object of 0 bytes is a discarded one).
    """
    return moveable.alloc(_RULES, uFlags, uBytes)


def LocalReAlloc(hMem: int | None, uBytes: int, uFlags: int) -> int:
    """Resize an object, or with LMEM_MODIFY change its attributes alone. Returns: its address or handle; 0 for
    failure, the object is as it was.

    Args: uFlags (LMEM_MOVEABLE: what is FIXED or locked may move; LMEM_ZEROINIT: what is added is zero;
    LMEM_MODIFY, and with it LMEM_DISCARDABLE).
    """
    return moveable.realloc(_RULES, hMem, uBytes, uFlags)


@fails_with(0)
def LocalSize(hMem: int | None) -> int:
    """Bytes of an object; 0 if it is discarded, or with ERROR_INVALID_HANDLE if it is none."""
    return moveable.size_of(hMem)


def LocalFree(hMem: int | None) -> int:
    """Free an object, locked or not. Returns: 0; for failure what was given: ERROR_INVALID_HANDLE, ERROR_NOACCESS."""
    return attempt(address(hMem), moveable.free, hMem)


@fails_with(0)
def LocalLock(hMem: int | None) -> int:
    """Count one lock more. Returns: the address of the object's data; 0 for failure: ERROR_DISCARDED,
    ERROR_INVALID_HANDLE. A FIXED object counts none."""
    return moveable.lock(_RULES, hMem)


@fails_with(False)
def LocalUnlock(hMem: int | None) -> bool:
    """Count one lock less. Returns: True while locks are left; False with NO_ERROR if that was the last, with
    ERROR_NOT_LOCKED if there was none."""
    return moveable.unlock(_RULES, hMem)


@fails_with(int(LMEM_INVALID_HANDLE))
def LocalFlags(hMem: int | None) -> int:
    """LMEM_DISCARDABLE, LMEM_DISCARDED and, in the low byte, the number of locks; LMEM_INVALID_HANDLE for
    failure."""
    return moveable.flags_of(_RULES, hMem)


@fails_with(0)
def LocalHandle(pMem: int | None) -> int:
    """The handle of the object whose data is at an address; of a FIXED one the address itself. 0 for failure."""
    return moveable.handle_of(_RULES, pMem)


def LocalDiscard(hMem: int | None) -> int:
    """Give an unlocked object's bytes back and keep its handle: LocalReAlloc(hMem, 0, LMEM_MOVEABLE)."""
    return LocalReAlloc(hMem, 0, LMEM_MOVEABLE)
