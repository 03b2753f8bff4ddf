"""Toolhelp: the heaps of a process by its id, and their blocks.

A snapshot holds which heaps there are; blocks are read when they are asked for. Looking opens nothing: the heaps of
another process stay its own. A heap's id is its handle.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from ctypes import Structure, sizeof
from itertools import count
from typing import Any, Final, TypeVar

from heapd.errors import HeapDestroyedError, NoSuchHeapError
from heapd.records import HeapInfo

from .arguments import address, dword, instance_of
from .checked_heap import tail_of
from .constants import (
    ERROR_ACCESS_DENIED,
    ERROR_INVALID_DATA,
    ERROR_INVALID_HANDLE,
    ERROR_INVALID_PARAMETER,
    ERROR_NO_MORE_FILES,
    HF32_DEFAULT,
    HF32_SHARED,
    INVALID_HANDLE_VALUE,
    LF32_FIXED,
    LF32_FREE,
    TH32CS_SNAPALL,
    TH32CS_SNAPHEAPLIST,
    TH32CS_SNAPMODULE32,
)
from .elements import Element, Kind, elements
from .last_error import Failure, fails_with
from .process import Process, process
from .structures import HEAPENTRY32, HEAPLIST32
from .walk import Walks

__all__ = [
    "CloseHandle",
    "CreateToolhelp32Snapshot",
    "Heap32First",
    "Heap32ListFirst",
    "Heap32ListNext",
    "Heap32Next",
]

_T = TypeVar("_T", bound=Structure)
_SOMETHING: Final = int(TH32CS_SNAPALL | TH32CS_SNAPMODULE32)
_HEAP_LIST: Final = int(TH32CS_SNAPHEAPLIST)
_FLAGS: Final = {Kind.BUSY: int(LF32_FIXED), Kind.FREE: int(LF32_FREE)}

# Handles of snapshots: small, so that none is a heap's. Each has what it found: (process id, heap's handle, HF32_*).
_snapshots: Final[dict[int, list[tuple[int, int, int]]]] = {}
_handles: Final = count(4, 4)
_walks: Final = Walks()


# -- which heaps -----------------------------------------------------------------------------------------------------
@fails_with(INVALID_HANDLE_VALUE)
def CreateToolhelp32Snapshot(dwFlags: int, th32ProcessID: int) -> int:
    """Note down which heaps a process has now. Returns: the snapshot's handle; INVALID_HANDLE_VALUE for failure:
    ERROR_INVALID_PARAMETER if there is no such process, ERROR_ACCESS_DENIED if it is no client of the daemon.

    Args: dwFlags (TH32CS_SNAPHEAPLIST; processes, threads and modules are accepted and not looked at), th32ProcessID
    (0: this process).
    """
    flags, pid = dword(dwFlags), dword(th32ProcessID)
    if not flags & _SOMETHING:
        raise Failure(ERROR_INVALID_PARAMETER, "the snapshot is of nothing")
    found = _list_heaps(process(), pid or os.getpid()) if flags & _HEAP_LIST else []
    handle = next(_handles)
    _snapshots[handle] = found
    return handle


def _list_heaps(owner: Process, pid: int) -> list[tuple[int, int, int]]:
    """(process id, heap's handle, HF32_*) of each heap. Raises: Failure if the process has no session."""
    infos = _heaps_of(owner, pid)
    if not infos and not any(session.is_live for session in owner.session.sessions(pid)):
        is_there = os.path.exists(f"/proc/{pid}")
        code = ERROR_ACCESS_DENIED if is_there else ERROR_INVALID_PARAMETER
        raise Failure(code, f"process {pid} is no client of {owner.session.endpoint}")
    default = _default_of(owner, pid, infos)
    found = []
    for info in sorted(infos, key=lambda info: info.heap_id != default):
        flags = int(HF32_DEFAULT) if info.heap_id == default else 0
        flags |= int(HF32_SHARED) if info.name is not None or info.sessions > 1 else 0
        found.append((pid, info.base, flags))
    return found


def _heaps_of(owner: Process, pid: int) -> list[HeapInfo]:
    """The heaps that a process has open: of this one, as GetProcessHeaps lists them."""
    if pid == os.getpid():
        return [found.heap.info for found in owner.open_heaps()]
    return owner.session.heaps(pid)


def _default_of(owner: Process, pid: int, infos: list[HeapInfo]) -> int:
    """Id of the process heap; 0 if the process never asked for it."""
    if pid == os.getpid():
        return owner.default_heap().heap.id
    numbers = {session.number for session in owner.session.sessions(pid)}
    return next((info.heap_id for info in infos if info.is_default and info.creator in numbers), 0)


@fails_with(False)
def CloseHandle(hObject: int | None) -> bool:
    """End a snapshot. False for what is none: ERROR_INVALID_HANDLE."""
    if _snapshots.pop(address(hObject), None) is None:
        raise Failure(ERROR_INVALID_HANDLE, "no snapshot")
    return True


@fails_with(False)
def Heap32ListFirst(hSnapshot: int | None, lphl: Any) -> bool:
    """The first heap of a snapshot. False: ERROR_NO_MORE_FILES if it has none, ERROR_INVALID_PARAMETER if dwSize is
    not set, ERROR_INVALID_HANDLE."""
    handle, entry = address(hSnapshot), instance_of(lphl, HEAPLIST32)
    found, entry = _snapshot(handle), _checked(entry)
    return _fill_list(entry, found, 0)


@fails_with(False)
def Heap32ListNext(hSnapshot: int | None, lphl: Any) -> bool:
    """The heap after the one that the structure holds. False as Heap32ListFirst."""
    handle, entry = address(hSnapshot), instance_of(lphl, HEAPLIST32)
    found, entry = _snapshot(handle), _checked(entry)
    handles = [handle for _, handle, _ in found]
    at = handles.index(entry.th32HeapID) + 1 if entry.th32HeapID in handles else len(handles)
    return _fill_list(entry, found, at)


def _snapshot(handle: int) -> list[tuple[int, int, int]]:
    found = _snapshots.get(handle)
    if found is None:
        raise Failure(ERROR_INVALID_HANDLE, "no snapshot")
    return found


def _checked(entry: _T | None) -> _T:
    """The caller's structure. Raises: Failure if it is NULL, or its dwSize is not its size."""
    if entry is None or entry.dwSize != sizeof(entry):
        raise Failure(ERROR_INVALID_PARAMETER, "a structure is needed, its size in dwSize")
    return entry


def _fill_list(entry: HEAPLIST32, found: list[tuple[int, int, int]], at: int) -> bool:
    if at >= len(found):
        raise Failure(ERROR_NO_MORE_FILES, "there are no more heaps")
    entry.th32ProcessID, entry.th32HeapID, entry.dwFlags = found[at]
    return True


# -- which blocks ----------------------------------------------------------------------------------------------------
class _Look(threading.local):
    """The heap whose blocks the calling thread was told of last: asking for it anew would be a request a block."""

    place: tuple[int, int] = (0, 0)  # process id, handle
    info: HeapInfo | None = None


_last: Final = _Look()


@fails_with(False)
def Heap32First(lphe: Any, th32ProcessID: int, th32HeapID: int) -> bool:
    """The first block of a heap of a process, busy or free. False: ERROR_NO_MORE_FILES if there is none, or no such
    heap; ERROR_INVALID_PARAMETER if dwSize is not set."""
    pid, handle = dword(th32ProcessID) or os.getpid(), address(th32HeapID)
    entry, owner = _checked(instance_of(lphe, HEAPENTRY32)), process()
    info = _find_heap(owner, pid, handle)
    if info is None:
        raise Failure(ERROR_NO_MORE_FILES, f"process {pid} has no heap {handle:#x}")
    if pid == os.getpid():
        owner.find(handle).heap.trim()
    with suppress(NoSuchHeapError, HeapDestroyedError):
        element = _walks.start(info.heap_id, owner.session.arena, lambda: _elements(owner, info))
        _last.place, _last.info = (pid, handle), info
        return _fill_entry(entry, _block(owner, info, element), pid, handle, 0)
    raise Failure(ERROR_NO_MORE_FILES, "the heap is gone")


@fails_with(False)
def Heap32Next(lphe: Any) -> bool:
    """The block after the one that the structure holds. False: ERROR_NO_MORE_FILES at the end, ERROR_INVALID_DATA if
    the heap has gone meanwhile."""
    entry, owner = _checked(instance_of(lphe, HEAPENTRY32)), process()
    pid, handle = entry.th32ProcessID, entry.th32HeapID
    info = _last.info
    if info is None or _last.place != (pid, handle) or not owner.session.arena.has_heap(info.heap_id):
        info = _find_heap(owner, pid, handle)
    if info is not None:
        with suppress(NoSuchHeapError, HeapDestroyedError):
            element = _go_on(owner, info, (entry.dwAddress, False))
            return _fill_entry(entry, _block(owner, info, element), pid, handle, entry.dwResvd + 1)
    raise Failure(ERROR_INVALID_DATA, "the heap is gone")


def _find_heap(owner: Process, pid: int, handle: int) -> HeapInfo | None:
    return next((info for info in _heaps_of(owner, pid) if info.base == handle), None)


def _elements(owner: Process, info: HeapInfo) -> Iterator[Element]:
    return elements(owner.session.walk(info.heap_id), tail_of(info.flags))


def _go_on(owner: Process, info: HeapInfo, last: tuple[int, bool]) -> Element | None:
    return _walks.go_on(last, info.heap_id, owner.session.arena, lambda: _elements(owner, info))


def _block(owner: Process, info: HeapInfo, element: Element | None) -> Element | None:
    """The element, or the first one after it that is a block."""
    while element is not None and element.kind not in _FLAGS:
        element = _go_on(owner, info, (element.address, element.kind == Kind.REGION))
    return element


def _fill_entry(entry: HEAPENTRY32, element: Element | None, pid: int, handle: int, number: int) -> bool:
    if element is None:
        raise Failure(ERROR_NO_MORE_FILES, "there are no more blocks")
    entry.hHandle = entry.th32HeapID = handle
    entry.th32ProcessID = pid
    entry.dwAddress, entry.dwBlockSize, entry.dwFlags = element.address, element.size, _FLAGS[element.kind]
    entry.dwLockCount, entry.dwResvd = 0, number
    return True
