"""The heap functions: create, allocate, resize, free, lock, validate, compact, destroy.

HeapAlloc and HeapFree do the common case in their first lines (no flags, or zeroed memory; a heap without debug
checking; a block that this process allocated): what it costs there beyond the heap's own alloc and free is two dict
operations. Whatever is unusual, or fails, is done again from the start by their `_slowly`, which also judges the
arguments. A dict takes a float for the int that it equals, so what is not the very object that was given out has its
type looked at. A block is taken out of `blocks` before it is freed: afterwards its address may be another thread's
block.
"""

from __future__ import annotations

import warnings
from typing import Any, Final

from heapd.errors import ExecuteError, HeapdError, InvalidArgumentError
from heapd.layout import F_EXECUTABLE, F_FREE_CHECK, F_GENERATE_EXCEPTIONS, F_SERIALIZE, F_TAIL_CHECK
from heapd.units import align_up

from . import corruption
from .arguments import address, dword, handles_buffer, size_t
from .constants import (
    ERROR_INVALID_HANDLE,
    ERROR_INVALID_PARAMETER,
    ERROR_NOT_ENOUGH_MEMORY,
    HEAP_CREATE_ENABLE_EXECUTE,
    HEAP_FREE_CHECKING_ENABLED,
    HEAP_GENERATE_EXCEPTIONS,
    HEAP_NO_SERIALIZE,
    HEAP_REALLOC_IN_PLACE_ONLY,
    HEAP_TAIL_CHECKING_ENABLED,
    HEAP_ZERO_MEMORY,
    NO_ERROR,
    SIZE_T_MAX,
)
from .last_error import Failure, SetLastError, fails_with, patiently
from .process import heap_of, hot, process

__all__ = [
    "GetProcessHeap",
    "GetProcessHeaps",
    "HeapAlloc",
    "HeapCompact",
    "HeapCreate",
    "HeapDestroy",
    "HeapFree",
    "HeapLock",
    "HeapReAlloc",
    "HeapSize",
    "HeapUnlock",
    "HeapValidate",
]

_NO_FLAGS: Final = 0
# As ints: an operation with an IntFlag takes half a microsecond.
_EXCEPTIONS, _ZERO, _IN_PLACE = int(HEAP_GENERATE_EXCEPTIONS), int(HEAP_ZERO_MEMORY), int(HEAP_REALLOC_IN_PLACE_ONLY)

_FIXED_UNIT: Final = 8 * 1024  # the maximum of a fixed heap is rounded up to it, as measured on Windows
_FIXED_OVERHEAD: Final = 2 * 1024  # the largest block of a small fixed heap is so much smaller than the heap
_FIXED_LIMIT: Final = 0xFE000  # and that of any fixed heap no larger than this: slightly below 1 MB


# -- heaps -----------------------------------------------------------------------------------------------------------
@fails_with(0)
def HeapCreate(flOptions: int, dwInitialSize: int, dwMaximumSize: int) -> int:
    """Make a heap of this process. Returns: its handle; 0 for failure: ERROR_NOT_ENOUGH_MEMORY, or
    ERROR_ACCESS_DENIED if it was to be executable and /dev/shm is not.

    Args: flOptions (HEAP_NO_SERIALIZE, HEAP_GENERATE_EXCEPTIONS, HEAP_CREATE_ENABLE_EXECUTE,
    HEAP_TAIL_CHECKING_ENABLED, HEAP_FREE_CHECKING_ENABLED; others count for nothing), dwInitialSize (bytes committed
    at once), dwMaximumSize (bytes; 0: it grows; else no block may be about 1 MB or larger).
    """
    options, initial, maximum = dword(flOptions), size_t(dwInitialSize), size_t(dwMaximumSize)
    max_block = 0
    if maximum:
        maximum = align_up(max(maximum, initial), _FIXED_UNIT)
        max_block = min(maximum - _FIXED_OVERHEAD, _FIXED_LIMIT)
    owner = process()
    try:
        heap = owner.session.make_heap(None, initial, min(maximum, SIZE_T_MAX), _flags(options), max_block)
    except InvalidArgumentError as error:  # more than the arena
        raise Failure(ERROR_NOT_ENOUGH_MEMORY, str(error)) from error
    except ExecuteError as error:
        warnings.warn(f"HeapCreate: {error}", RuntimeWarning, stacklevel=4)
        raise
    return owner.make(heap).handle


def _flags(options: int) -> int:
    """HEAP_* options of a new heap as layout.F_*."""
    flags = 0 if options & HEAP_NO_SERIALIZE else F_SERIALIZE
    for option, flag in (
        (HEAP_CREATE_ENABLE_EXECUTE, F_EXECUTABLE),
        (HEAP_GENERATE_EXCEPTIONS, F_GENERATE_EXCEPTIONS),
        (HEAP_TAIL_CHECKING_ENABLED, F_TAIL_CHECK),
        (HEAP_FREE_CHECKING_ENABLED, F_FREE_CHECK),
    ):
        flags |= flag if options & option else 0
    return flags


@fails_with(False)
def HeapDestroy(hHeap: int | None) -> bool:
    """Give back a heap with all its blocks. False for the process heap, and for what is no heap that this process made
    or opened: ERROR_INVALID_HANDLE."""
    handle = address(hHeap)
    if not handle:
        return True
    owner = process()
    found = owner.find_open(handle)
    if found is None:
        raise Failure(ERROR_INVALID_HANDLE, f"{handle:#x} is no heap of this process")
    if found.heap.info.is_default:
        raise Failure(ERROR_INVALID_HANDLE, "a process heap cannot be destroyed")
    owner.destroy(found)
    return True


@fails_with(0)
def GetProcessHeap() -> int:
    """The handle of the process heap, the same at each call; 0 for failure: ERROR_NOT_ENOUGH_MEMORY."""
    return process().default_heap().handle


@fails_with(0)
def GetProcessHeaps(NumberOfHeaps: int, ProcessHeaps: Any) -> int:
    """Handles of the heaps of this process: the process heap, then those it made or opened, oldest first.

    Args:    NumberOfHeaps (room in the buffer), ProcessHeaps (a list of at least that length, or a ctypes array of
             integers; None if the room is 0).
    Returns: how many heaps there are; so many handles were written as there is room for.
    """
    room, buffer = dword(NumberOfHeaps), handles_buffer(ProcessHeaps)
    handles = [found.handle for found in process().open_heaps()]
    if room and buffer is None:
        raise Failure(ERROR_INVALID_PARAMETER, "a buffer is needed")
    if buffer is not None:
        for at, handle in enumerate(handles[: min(room, len(buffer))]):
            buffer[at] = handle
    return len(handles)


# -- blocks ----------------------------------------------------------------------------------------------------------
def HeapAlloc(hHeap: int | None, dwFlags: int, dwBytes: int) -> int:
    """Allocate a block. Returns: its address; 0 for failure: ERROR_NOT_ENOUGH_MEMORY, ERROR_INVALID_HANDLE.

    Args:   dwFlags (HEAP_GENERATE_EXCEPTIONS, HEAP_NO_SERIALIZE, HEAP_ZERO_MEMORY), dwBytes (0 gives a real block).
    Raises: StructuredException in place of a failure, with HEAP_GENERATE_EXCEPTIONS here or at HeapCreate.
    """
    try:
        if dwFlags is _NO_FLAGS:
            heap, blocks, handle = hot[hHeap]  # type: ignore[index]
            if hHeap is not handle and type(hHeap) is not int:
                raise TypeError
            block = heap.alloc(dwBytes)
            where = block.address
            blocks[where] = block
            return where
        if dwFlags is _ZERO or dwFlags is HEAP_ZERO_MEMORY:
            heap, blocks, handle = hot[hHeap]  # type: ignore[index]
            if hHeap is not handle and type(hHeap) is not int:
                raise TypeError
            block = heap.alloc(dwBytes)
            try:
                heap.mapping.zero(block.address, dwBytes)
            except BaseException:
                block.free()
                raise
            blocks[block.address] = block
            return block.address
    except (LookupError, TypeError, HeapdError):
        pass
    try:
        return _alloc_slowly(hHeap, dwFlags, dwBytes)
    except Failure as failure:
        return failure.set(0)


def _alloc_slowly(hHeap: Any, dwFlags: Any, dwBytes: Any) -> int:
    handle, flags, size = address(hHeap), dword(dwFlags), size_t(dwBytes)
    raises = bool(flags & _EXCEPTIONS)
    try:
        found = heap_of(handle)
        raises = raises or found.raises
        return found.alloc(flags, size, zero=bool(flags & _ZERO))
    except Failure as failure:
        if raises:
            failure.throw()
        raise


def HeapFree(hHeap: int | None, dwFlags: int, lpMem: int | None) -> bool:
    """Give a block back; NULL is no block and succeeds. False for what is none: ERROR_NOACCESS beyond the arena,
    ERROR_INVALID_PARAMETER for a block that is free or of another heap, the last error kept for any other address."""
    try:
        if dwFlags is _NO_FLAGS:
            _, blocks, handle = hot[hHeap]  # type: ignore[index]
            block = blocks[lpMem]  # type: ignore[index]
            if (hHeap is not handle and type(hHeap) is not int) or (
                lpMem is not block.address and type(lpMem) is not int
            ):
                raise TypeError
            del blocks[lpMem]
            try:
                block.free()
                return True
            except BaseException:
                if not block.is_free:
                    blocks[block.address] = block
                raise
    except (LookupError, TypeError, HeapdError):
        pass
    return _free_slowly(hHeap, dwFlags, lpMem)


@fails_with(False)
def _free_slowly(hHeap: Any, dwFlags: Any, lpMem: Any) -> bool:
    handle, flags, where = address(hHeap), dword(dwFlags), address(lpMem)
    if where:
        found = heap_of(handle)
        try:
            found.free(flags, where)
        except Failure as failure:
            corruption.notice(failure)
            raise
    return True


def HeapReAlloc(hHeap: int | None, dwFlags: int, lpMem: int | None, dwBytes: int) -> int:
    """Resize a block; a smaller one stays where it is. Returns: its address; 0 for failure, the block is as it was.

    An exception of a signal handler, such as Ctrl-C's, leaves it where it was, too.
    Args:   dwFlags (HEAP_GENERATE_EXCEPTIONS, HEAP_NO_SERIALIZE, HEAP_REALLOC_IN_PLACE_ONLY, HEAP_ZERO_MEMORY: bytes
            beyond the old size read as zero), lpMem (NULL: 0, and the last error is 0), dwBytes (0 frees nothing).
    Raises: StructuredException, as HeapAlloc.
    """
    try:
        return _realloc(hHeap, dwFlags, lpMem, dwBytes)  # nothing else is called once the block has moved
    except Failure as failure:
        return failure.set(0)


def _realloc(hHeap: Any, dwFlags: Any, lpMem: Any, dwBytes: Any) -> int:
    handle, flags, where, size = address(hHeap), dword(dwFlags), address(lpMem), size_t(dwBytes)
    if not where:
        raise Failure(NO_ERROR, "NULL is no block")
    raises = bool(flags & _EXCEPTIONS)
    try:
        found = patiently(heap_of, handle)
        raises = raises or found.raises
        return found.realloc(flags, where, size, zero=bool(flags & _ZERO), in_place=bool(flags & _IN_PLACE))
    except Failure as failure:
        corruption.notice(failure)
        if raises:
            failure.throw()
        raise


@fails_with(SIZE_T_MAX)
def HeapSize(hHeap: int | None, dwFlags: int, lpMem: int | None) -> int:
    """The bytes that were asked for; SIZE_T_MAX for what is no block: ERROR_INVALID_PARAMETER."""
    handle, _, where = address(hHeap), dword(dwFlags), address(lpMem)
    try:
        return heap_of(handle).size_of(where)
    except Failure as failure:
        raise Failure(failure.code or ERROR_INVALID_PARAMETER, failure.reason) from failure


# -- the whole heap --------------------------------------------------------------------------------------------------
@fails_with(False)
def HeapValidate(hHeap: int | None, dwFlags: int, lpMem: int | None) -> bool:
    """Whether a block is in order, or with NULL the whole heap. The last error is never set."""
    handle, flags, where = address(hHeap), dword(dwFlags), address(lpMem)
    try:
        return heap_of(handle).validate(flags, where)
    except Failure as failure:
        raise Failure(None, failure.reason) from failure


@fails_with(0)
def HeapCompact(hHeap: int | None, dwFlags: int) -> int:
    """Give what is free back to the system. Returns: bytes of the largest committed free block before that; 0 and
    the last error 0 if there is none."""
    handle, flags = address(hHeap), dword(dwFlags)
    found = heap_of(handle)
    largest = found.call(flags, found.heap.compact)
    if not largest:
        SetLastError(NO_ERROR)
    return largest


def HeapLock(hHeap: int | None) -> bool:
    """Take the heap's lock for the calling thread; it may hold it more than once. Waits without limit.

    In a heap made with HEAP_NO_SERIALIZE it excludes nobody.
    """
    try:
        found = patiently(heap_of, address(hHeap))
        if found.is_serialized:
            found.lock()
        return True  # nothing else is called once it is held: see OpenHeap.lock
    except Failure as failure:
        return failure.set(False)


@fails_with(False)
def HeapUnlock(hHeap: int | None) -> bool:
    """Give the heap's lock up once. False if the calling thread does not hold it: ERROR_NOT_LOCKED."""
    found = heap_of(address(hHeap))
    if found.is_serialized:
        found.unlock()
    return True
