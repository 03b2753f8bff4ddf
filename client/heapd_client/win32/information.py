"""HeapSetInformation, HeapQueryInformation and HeapSummary."""

from __future__ import annotations

import ctypes
from typing import Any, Final

from heapd.layout import F_FREE_CHECK, F_TAIL_CHECK

from . import corruption
from .arguments import address, buffer_of, dword, instance_of, size_t
from .checked_heap import tail_of
from .constants import (
    ERROR_GEN_FAILURE,
    ERROR_INSUFFICIENT_BUFFER,
    ERROR_INVALID_HANDLE,
    ERROR_INVALID_PARAMETER,
    ERROR_NOACCESS,
    HEAP_OPTIMIZE_RESOURCES_CURRENT_VERSION,
    HeapCompatibilityInformation,
    HeapEnableTerminationOnCorruption,
    HeapOptimizeResources,
)
from .last_error import Failure, fails_with, patiently
from .open_heap import OpenHeap
from .process import heap_of, process
from .structures import HEAP_OPTIMIZE_RESOURCES_INFORMATION, HEAP_SUMMARY

__all__ = ["HeapQueryInformation", "HeapSetInformation", "HeapSummary"]

_STANDARD: Final = 0
_FRONT_END: Final = 2  # Windows' low-fragmentation heap
_ULONG: Final = 4  # bytes


def _may_have_front_end(found: OpenHeap) -> bool:
    """By Windows' rules: not if the heap is not serialized, of a fixed size, or has debug checking."""
    info = found.heap.info
    return found.is_serialized and not info.maximum and not info.flags & (F_TAIL_CHECK | F_FREE_CHECK)


def _compatibility(found: OpenHeap) -> int:
    return _FRONT_END if _may_have_front_end(found) and found.heap.has_had_front_end else _STANDARD


@fails_with(False)
def HeapQueryInformation(
    HeapHandle: int | None,
    HeapInformationClass: int,
    HeapInformation: Any,
    HeapInformationLength: int,
    ReturnLength: Any = None,
) -> bool:
    """Of HeapCompatibilityInformation: 2 once the heap has a front end in this process, else 0.

    Args: HeapInformation (a ctypes object of 4 bytes or more), HeapInformationLength (its bytes; below 4:
    ERROR_INSUFFICIENT_BUFFER), ReturnLength (a ctypes integer that gets the bytes written or needed, or None).
    """
    handle, kind, length = address(HeapHandle), dword(HeapInformationClass), size_t(HeapInformationLength)
    buffer, returned = buffer_of(HeapInformation), buffer_of(ReturnLength)
    if kind != HeapCompatibilityInformation:
        raise Failure(ERROR_INVALID_PARAMETER, f"no information class {kind}")
    if not handle:
        raise Failure(ERROR_NOACCESS, "NULL is no heap")
    value = _compatibility(heap_of(handle))
    if returned is not None:
        _store(returned, _ULONG, min(ctypes.sizeof(returned), ctypes.sizeof(ctypes.c_size_t)))
    if length < _ULONG:
        raise Failure(ERROR_INSUFFICIENT_BUFFER, f"{length} bytes are too few")
    if buffer is None or ctypes.sizeof(buffer) < _ULONG:
        raise Failure(ERROR_NOACCESS, "no buffer")
    _store(buffer, value, _ULONG)
    return True


def _store(buffer: Any, value: int, size: int) -> None:
    ctypes.memmove(ctypes.addressof(buffer), value.to_bytes(size, "little"), size)


@fails_with(False)
def HeapSetInformation(
    HeapHandle: int | None, HeapInformationClass: int, HeapInformation: Any, HeapInformationLength: int
) -> bool:
    """Set one of three things.

    HeapCompatibilityInformation: 2 gives the heap its front end at once, for good; it cannot be had by a heap that is
    not serialized, of a fixed size, or checked (ERROR_INVALID_PARAMETER), nor taken away (ERROR_GEN_FAILURE).
    HeapEnableTerminationOnCorruption (heap None, buffer None): from now on freeing or resizing what is no block ends
    this process. HeapOptimizeResources (a HEAP_OPTIMIZE_RESOURCES_INFORMATION): give back what the heap, or with None
    every heap with a front end, has free.
    """
    handle, kind, length = address(HeapHandle), dword(HeapInformationClass), size_t(HeapInformationLength)
    buffer = buffer_of(HeapInformation)
    if kind == HeapEnableTerminationOnCorruption:
        corruption.is_fatal = True
        return True
    if kind == HeapCompatibilityInformation:
        return _set_compatibility(handle, buffer, length)
    if kind == HeapOptimizeResources:
        return _optimize(handle, buffer, length)
    raise Failure(ERROR_INVALID_PARAMETER, f"no information class {kind}")


def _set_compatibility(handle: int, buffer: Any, length: int) -> bool:
    if length < _ULONG:
        raise Failure(ERROR_INSUFFICIENT_BUFFER, f"{length} bytes are too few")
    if not handle:
        raise Failure(ERROR_INVALID_HANDLE, "NULL is no heap")
    found = heap_of(handle)
    if buffer is None or ctypes.sizeof(buffer) < _ULONG:
        raise Failure(ERROR_NOACCESS, "no buffer")
    wanted = int.from_bytes(ctypes.string_at(ctypes.addressof(buffer), _ULONG), "little")
    if wanted != _FRONT_END:
        raise Failure(ERROR_GEN_FAILURE, "a front end cannot be taken away")
    if not _may_have_front_end(found) or not patiently(found.heap.open_front_end):
        raise Failure(ERROR_INVALID_PARAMETER, "this heap cannot have a front end")
    return True


def _optimize(handle: int, buffer: Any, length: int) -> bool:
    if length < ctypes.sizeof(HEAP_OPTIMIZE_RESOURCES_INFORMATION):
        raise Failure(ERROR_INSUFFICIENT_BUFFER, f"{length} bytes are too few")
    wanted = instance_of(buffer, HEAP_OPTIMIZE_RESOURCES_INFORMATION)
    if wanted is None or wanted.Version != HEAP_OPTIMIZE_RESOURCES_CURRENT_VERSION or wanted.Flags:
        raise Failure(ERROR_INVALID_PARAMETER, "version 1 and flags 0 are needed")
    heaps = [heap_of(handle)] if handle else [each for each in process().open_heaps() if _compatibility(each)]
    for found in heaps:
        patiently(found.heap.compact)
    return True


@fails_with(False)
def HeapSummary(hHeap: int | None, dwFlags: int, lpSummary: Any) -> bool:
    """Sums of a heap, in bytes: cbAllocated (asked for by its blocks), cbCommitted, cbReserved, cbMaxReserve.

    False with ERROR_INVALID_PARAMETER unless dwFlags is 0 and cb is the structure's size.
    """
    summary, flags, handle = instance_of(lpSummary, HEAP_SUMMARY), dword(dwFlags), address(hHeap)
    if flags or summary is None or summary.cb != ctypes.sizeof(HEAP_SUMMARY):
        raise Failure(ERROR_INVALID_PARAMETER, "flags 0 and the structure's size in cb are needed")
    heap = heap_of(handle).heap
    statistics = heap.statistics()
    summary.cbAllocated = statistics.busy - statistics.busy_blocks * tail_of(heap.info.flags)
    summary.cbCommitted = statistics.committed
    summary.cbReserved = summary.cbMaxReserve = statistics.reserved
    return True
