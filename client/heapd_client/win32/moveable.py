"""What the Global and the Local functions have in common: objects on the process heap, fixed or behind a handle.

A FIXED object is a block of the process heap and nothing else. A MOVEABLE one is an entry of the process's table, and
its handle is no address: 8 modulo 16, where a block is 0 modulo 16. Where the two families differ, `Rules` says how.
The table (table.py) is changed under the process heap's lock, as Windows' is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from .arguments import address as as_address
from .arguments import dword, size_t
from .constants import (
    ERROR_DISCARDED,
    ERROR_INVALID_HANDLE,
    ERROR_INVALID_PARAMETER,
    ERROR_NOACCESS,
    ERROR_NOT_ENOUGH_MEMORY,
    ERROR_NOT_LOCKED,
    GMEM_DDESHARE,
    GMEM_DISCARDED,
    GMEM_MODIFY,
    GMEM_MOVEABLE,
    GMEM_ZEROINIT,
    NO_ERROR,
)
from .last_error import Failure, SetLastError, patiently
from .open_heap import OpenHeap
from .process import Process, process
from .table import MAX_LOCKS, Moveable, is_handle

__all__ = ["Rules", "alloc", "flags_of", "free", "handle_of", "lock", "realloc", "size_of", "unlock"]

_MOVEABLE, _ZEROINIT, _MODIFY, _DDESHARE = map(int, (GMEM_MOVEABLE, GMEM_ZEROINIT, GMEM_MODIFY, GMEM_DDESHARE))


class Rules(NamedTuple):
    """How one family of functions does it.

    Fields: valid (flags), discardable (the bits that ask for it and report it), tells_share (DDESHARE is reported),
    smallest (bytes that a FIXED object of 0 bytes gets), converts (MODIFY and MOVEABLE make a FIXED object moveable),
    unlocks_all (unlocking what cannot be locked succeeds), and the last errors for an address beyond the arena (None:
    kept): lock_error, unlock_error, flags_error, handle_error.
    """

    valid: int
    discardable: int
    tells_share: bool
    smallest: int
    converts: bool
    unlocks_all: bool
    lock_error: int | None
    unlock_error: int | None
    flags_error: int
    handle_error: int


class _Memory:
    """The process heap and the table, as one call sees them."""

    def __init__(self) -> None:
        owner: Process = process()
        self.heap: OpenHeap = owner.default_heap()
        self.table = owner.table

    def locked(self) -> AbstractContextManager[object]:
        return self.heap.heap.lock()

    def check_block(self, address: int, beyond: int | None) -> None:
        """That a block of the process heap begins at `address`.

        Raises: Failure(`beyond`) beyond the arena, else Failure(ERROR_INVALID_HANDLE).
        """
        try:
            self.heap.find(address)
        except Failure as failure:
            code = beyond if failure.code == ERROR_NOACCESS else ERROR_INVALID_HANDLE
            raise Failure(code, failure.reason) from failure


# -- allocate, resize, free ------------------------------------------------------------------------------------------
def alloc(rules: Rules, uFlags: Any, uBytes: Any) -> int:
    """GlobalAlloc and LocalAlloc. Raises: Failure."""
    flags, size = dword(uFlags), size_t(uBytes)
    if flags & ~rules.valid:
        raise Failure(ERROR_INVALID_PARAMETER, f"unknown flags {flags & ~rules.valid:#x}")
    memory, zero = _Memory(), bool(flags & _ZEROINIT)
    if not flags & _MOVEABLE:
        return memory.heap.alloc(0, max(size, rules.smallest), zero)
    new = Moveable(0, bool(flags & rules.discardable), bool(flags & _DDESHARE))
    with memory.locked():
        handle = memory.table.add(new)
        try:
            if size:
                memory.table.place(handle, memory.heap.alloc(0, size, zero))
        except BaseException:
            memory.table.remove(handle)
            raise
    return handle


def realloc(rules: Rules, hMem: Any, uBytes: Any, uFlags: Any) -> int:
    """GlobalReAlloc and LocalReAlloc: their result. Nothing is called once a FIXED object has moved."""
    mem, size, flags = as_address(hMem), size_t(uBytes), dword(uFlags)
    try:
        result, heap = patiently(_realloc, rules, mem, size, flags)
        if heap is None:
            return result
        return heap.realloc(0, mem, size, zero=bool(flags & _ZEROINIT), in_place=not flags & _MOVEABLE)
    except Failure as failure:
        return failure.set(0)


def _realloc(rules: Rules, mem: int, size: int, flags: int) -> tuple[int, OpenHeap | None]:
    """Do all of it, but for a FIXED object that is to be resized. Returns: the result, or where that one lies.

    Raises: Failure; the object is as it was.
    """
    if not mem:
        raise Failure(ERROR_INVALID_HANDLE, "NULL is no object")
    memory = _Memory()
    if not is_handle(mem):
        memory.check_block(mem, ERROR_NOACCESS)
    with memory.locked():
        found = memory.table.find(mem) if is_handle(mem) else None
        if flags & ~(rules.valid | _MODIFY) or (flags & rules.discardable and not flags & _MODIFY):
            raise Failure(ERROR_INVALID_PARAMETER, "an object is made discardable by MODIFY alone")
        if found is None:
            _check_not_behind_handle(memory, mem)
            if flags & _MODIFY:
                return _modify_fixed(rules, memory, mem, flags), None
            return 0, memory.heap
        if not flags & _MODIFY:
            _resize_moveable(memory, mem, found, size, flags)
        elif flags & rules.discardable:
            found.is_discardable = True
    return mem, None


def _modify_fixed(rules: Rules, memory: _Memory, address: int, flags: int) -> int:
    """Make a FIXED object moveable, where that is done: its data moves to another block."""
    if not (flags & _MOVEABLE and rules.converts):
        return address
    size = memory.heap.size_of(address)
    handle = memory.table.add(Moveable(0, bool(flags & rules.discardable)))
    try:
        if size:
            new = memory.heap.alloc(0, size, False)
            memory.heap.heap.mapping.copy(new, address, size)
            memory.table.place(handle, new)
        memory.heap.free(0, address)
    except BaseException:
        memory.table.remove(handle)
        raise
    return handle


def _resize_moveable(memory: _Memory, handle: int, found: Moveable, size: int, flags: int) -> None:
    may_move = bool(flags & _MOVEABLE)
    if size == 0:
        if found.locks or not may_move:
            raise Failure(ERROR_NOT_ENOUGH_MEMORY, "a locked object, or one that may not move, cannot be discarded")
        if found.address:
            memory.heap.free(0, found.address)
        memory.table.place(handle, 0)
        return
    zero = bool(flags & _ZEROINIT)
    if not found.address:
        memory.table.place(handle, memory.heap.alloc(0, size, zero))
        return
    in_place = bool(found.locks) and not may_move
    old = found.address
    found.address = memory.heap.realloc(0, old, size, zero=zero, in_place=in_place)  # no call gets in between
    memory.table.note_move(handle, old)


def free(hMem: Any) -> int:
    """GlobalFree and LocalFree: 0. Raises: Failure."""
    mem = as_address(hMem)
    if not mem:
        return 0
    memory = _Memory()
    if not is_handle(mem):
        memory.check_block(mem, ERROR_NOACCESS)
        _check_not_behind_handle(memory, mem)
        memory.heap.free(0, mem)
        return 0
    with memory.locked():
        found = memory.table.find(mem)
        if found.address:
            memory.heap.free(0, found.address)
        memory.table.remove(mem)
    return 0


def _check_not_behind_handle(memory: _Memory, address: int) -> None:
    if memory.table.handle_at(address):
        raise Failure(ERROR_INVALID_HANDLE, f"{address:#x} is the data of a moveable object; use its handle")


# -- lock, look ------------------------------------------------------------------------------------------------------
def lock(rules: Rules, hMem: Any) -> int:
    """GlobalLock and LocalLock. Raises: Failure."""
    mem, memory = as_address(hMem), _Memory()
    if not is_handle(mem):
        memory.check_block(mem, rules.lock_error)
        return mem
    with memory.locked():
        found = memory.table.find(mem)
        if not found.address:
            raise Failure(ERROR_DISCARDED, "the object is discarded")
        found.locks = min(found.locks + 1, MAX_LOCKS)
        return found.address


def unlock(rules: Rules, hMem: Any) -> bool:
    """GlobalUnlock and LocalUnlock. Raises: Failure."""
    mem, memory = as_address(hMem), _Memory()
    if not is_handle(mem):
        try:
            memory.check_block(mem, rules.unlock_error)
        except Failure as failure:
            _forgive(rules, failure)
            return True
        if not rules.unlocks_all:
            raise Failure(ERROR_NOT_LOCKED, "a FIXED object is never locked")
        return True
    with memory.locked():
        try:
            found = memory.table.find(mem)
        except Failure as failure:
            _forgive(rules, failure)
            return True
        if not found.locks:
            raise Failure(ERROR_NOT_LOCKED, "the object is not locked")
        found.locks -= 1
        if not found.locks:
            raise Failure(NO_ERROR, "the object is not locked any more")
    return True


def _forgive(rules: Rules, failure: Failure) -> None:
    """Go on where the family's unlock succeeds all the same, with the last error set."""
    if not rules.unlocks_all:
        raise failure
    if failure.code is not None:
        SetLastError(failure.code)


def flags_of(rules: Rules, hMem: Any) -> int:
    """GlobalFlags and LocalFlags. Raises: Failure."""
    mem, memory = as_address(hMem), _Memory()
    if not is_handle(mem):
        memory.check_block(mem, rules.flags_error)
        return 0
    found = memory.table.find(mem)
    flags = found.locks
    flags |= rules.discardable if found.is_discardable else 0
    flags |= _DDESHARE if found.is_shared and rules.tells_share else 0
    return flags | (0 if found.address else int(GMEM_DISCARDED))


def handle_of(rules: Rules, pMem: Any) -> int:
    """GlobalHandle and LocalHandle. Raises: Failure."""
    mem = as_address(pMem)
    if not mem:
        raise Failure(ERROR_INVALID_PARAMETER, "NULL is no object")
    memory = _Memory()
    if is_handle(mem):
        memory.table.find(mem)
        return mem
    memory.check_block(mem, rules.handle_error)
    return memory.table.handle_at(mem) or mem


def size_of(hMem: Any) -> int:
    """GlobalSize and LocalSize. Raises: Failure(ERROR_INVALID_HANDLE)."""
    mem, memory = as_address(hMem), _Memory()
    if not is_handle(mem):
        memory.check_block(mem, ERROR_INVALID_HANDLE)
        return memory.heap.size_of(mem)
    found = memory.table.find(mem)
    return memory.heap.size_of(found.address) if found.address else 0
