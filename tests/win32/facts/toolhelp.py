"""Toolhelp: the heaps of a process, and their blocks."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from heapd_client import win32
from tests.client.programs import in_child
from tests.win32.facts import holds
from tests.win32.tools import MIB, expect, new_heap

SNAPHEAPLIST = win32.TH32CS_SNAPHEAPLIST


@contextmanager
def snapshot(pid: int = 0) -> Iterator[int]:
    handle = win32.CreateToolhelp32Snapshot(SNAPHEAPLIST, pid)
    assert handle != win32.INVALID_HANDLE_VALUE, win32.GetLastError()
    try:
        yield handle
    finally:
        assert win32.CloseHandle(handle)


def list_entry() -> win32.HEAPLIST32:
    return win32.HEAPLIST32(dwSize=ctypes.sizeof(win32.HEAPLIST32))


def block_entry() -> win32.HEAPENTRY32:
    return win32.HEAPENTRY32(dwSize=ctypes.sizeof(win32.HEAPENTRY32))


def heaps_in(handle: int) -> list[tuple[int, int, int]]:
    """(process id, heap id, flags) of a snapshot's heaps."""
    found, entry = [], list_entry()
    more = win32.Heap32ListFirst(handle, ctypes.byref(entry))
    while more:
        found.append((entry.th32ProcessID, entry.th32HeapID, entry.dwFlags))
        more = win32.Heap32ListNext(handle, ctypes.byref(entry))
    assert win32.GetLastError() == win32.ERROR_NO_MORE_FILES
    return found


def blocks_of(pid: int, heap: int) -> list[tuple[int, int, int]]:
    """(address, size, flags) of a heap's blocks."""
    found, entry = [], block_entry()
    more = win32.Heap32First(ctypes.byref(entry), pid, heap)
    while more:
        assert entry.dwLockCount == 0
        found.append((entry.dwAddress, entry.dwBlockSize, entry.dwFlags))
        more = win32.Heap32Next(ctypes.byref(entry))
    assert win32.GetLastError() == win32.ERROR_NO_MORE_FILES
    return found


@holds("H-TOOL-01", "H-TOOL-04", "S-06")
def a_snapshot_fails_with_minus_1() -> None:
    nobody = 2**22 + 1  # beyond the largest process id
    expect(-1 % 2**64, win32.ERROR_INVALID_PARAMETER, win32.CreateToolhelp32Snapshot, SNAPHEAPLIST, nobody)
    expect(win32.INVALID_HANDLE_VALUE, win32.ERROR_INVALID_PARAMETER, win32.CreateToolhelp32Snapshot, 0, 0)
    alive = 1  # and no client
    expect(win32.INVALID_HANDLE_VALUE, win32.ERROR_ACCESS_DENIED, win32.CreateToolhelp32Snapshot, SNAPHEAPLIST, alive)


@holds("H-TOOL-02", "H-TOOL-09", "H-TOOL-10", "H-TOOL-22", "S-05")
def process_0_is_the_caller_with_the_heaps_of_get_process_heaps() -> None:
    with new_heap(), new_heap(), snapshot(0) as handle:
        listed = [0] * win32.GetProcessHeaps(0, None)
        win32.GetProcessHeaps(len(listed), listed)
        found = heaps_in(handle)
        assert [heap for _, heap, _ in found] == listed
        assert {pid for pid, _, _ in found} == {os.getpid()}
        defaults = [heap for _, heap, flags in found if flags & win32.HF32_DEFAULT]
        assert defaults == [win32.GetProcessHeap()]
        with snapshot(os.getpid()) as same:
            assert heaps_in(same) == found


@holds("H-TOOL-03", "H-TOOL-08")
def a_snapshot_is_fixed_until_it_is_closed() -> None:
    handle = win32.CreateToolhelp32Snapshot(SNAPHEAPLIST, 0)
    before = heaps_in(handle)
    with new_heap():
        assert heaps_in(handle) == before
        entry = list_entry()
        for _ in range(2):
            assert win32.Heap32ListFirst(handle, entry)
        assert entry.th32HeapID == before[0][1]
    expect(True, None, win32.CloseHandle, handle)
    expect(False, win32.ERROR_INVALID_HANDLE, win32.CloseHandle, handle)
    expect(False, win32.ERROR_INVALID_HANDLE, win32.Heap32ListFirst, handle, list_entry())
    expect(False, win32.ERROR_INVALID_HANDLE, win32.Heap32ListNext, handle, list_entry())


@holds("H-TOOL-05", "H-TOOL-20", "H-TOOL-21")
def the_caller_sets_the_size_of_a_structure() -> None:
    with snapshot() as handle:
        heap = win32.GetProcessHeap()
        for size in (0, ctypes.sizeof(win32.HEAPLIST32) - 1, 1_000):
            entry = win32.HEAPLIST32(dwSize=size)
            expect(False, win32.ERROR_INVALID_PARAMETER, win32.Heap32ListFirst, handle, entry)
            expect(False, win32.ERROR_INVALID_PARAMETER, win32.Heap32ListNext, handle, entry)
            block = win32.HEAPENTRY32(dwSize=size)
            expect(False, win32.ERROR_INVALID_PARAMETER, win32.Heap32First, block, 0, heap)
            expect(False, win32.ERROR_INVALID_PARAMETER, win32.Heap32Next, block)
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.Heap32ListFirst, handle, None)
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.Heap32First, None, 0, heap)
        entry = list_entry()
        assert win32.Heap32ListFirst(handle, entry)
        assert entry.dwSize == ctypes.sizeof(win32.HEAPLIST32)


@holds("H-TOOL-06", "H-TOOL-07")
def a_list_without_heaps_is_at_its_end() -> None:
    handle = win32.CreateToolhelp32Snapshot(win32.TH32CS_SNAPPROCESS, 0)
    expect(False, win32.ERROR_NO_MORE_FILES, win32.Heap32ListFirst, handle, list_entry())
    win32.CloseHandle(handle)
    with snapshot() as heaps:
        entry = list_entry()
        assert win32.Heap32ListFirst(heaps, entry)
        while win32.Heap32ListNext(heaps, entry):
            pass
        expect(False, win32.ERROR_NO_MORE_FILES, win32.Heap32ListNext, heaps, entry)


@holds("H-TOOL-11", "H-TOOL-14", "H-TOOL-15", "H-TOOL-16")
def blocks_are_those_of_now_busy_or_free() -> None:
    with new_heap() as heap:
        blocks = {win32.HeapAlloc(heap, 0, size): size for size in (0, 10, 5_000, 100_000, 2 * MIB)}
        with snapshot():
            freed = next(iter(blocks))
            win32.HeapFree(heap, 0, freed)
            del blocks[freed]
            late = win32.HeapAlloc(heap, 0, 77)
            found = blocks_of(0, heap)
        busy = {address: size for address, size, flags in found if flags == win32.LF32_FIXED}
        assert busy == blocks | {late: 77}
        assert {flags for _, _, flags in found} == {win32.LF32_FIXED, win32.LF32_FREE}
        assert heap not in [address for address, size, _ in found if size == 0x10000]


@holds("H-TOOL-12")
def an_id_that_is_no_heaps_has_no_blocks() -> None:
    win32.GetProcessHeap()  # made now, or it might be made where the other one was
    with new_heap() as heap:
        pass
    for wrong in (heap, 0, 12):
        expect(False, win32.ERROR_NO_MORE_FILES, win32.Heap32First, block_entry(), 0, wrong)


@holds("H-TOOL-13")
def a_heap_that_goes_meanwhile_is_invalid_data() -> None:
    heap = win32.HeapCreate(0, 0, 0)
    for _ in range(3):
        win32.HeapAlloc(heap, 0, 10)
    entry = block_entry()
    assert win32.Heap32First(entry, 0, heap)
    while win32.Heap32Next(entry):
        pass
    assert win32.GetLastError() == win32.ERROR_NO_MORE_FILES
    assert win32.Heap32First(entry, 0, heap)
    win32.HeapDestroy(heap)
    expect(False, win32.ERROR_INVALID_DATA, win32.Heap32Next, entry)


@holds("H-TOOL-17", "H-CREATE-16")
def it_looks_at_other_processes_and_opens_nothing() -> None:
    with new_heap() as heap:
        block, parent = win32.HeapAlloc(heap, 0, 4_321), os.getpid()
        endpoint = win32.process.process().session.endpoint

        def look() -> None:
            win32.detach()
            win32.attach(endpoint)
            count = win32.GetProcessHeaps(0, None)
            with snapshot(parent) as handle:
                assert heap in [id_ for _, id_, _ in heaps_in(handle)]
                assert (block, 4_321, win32.LF32_FIXED) in blocks_of(parent, heap)
            assert win32.GetProcessHeaps(0, None) == count

        assert in_child(look) == 0
