"""GetProcessHeap(s), HeapValidate, HeapCompact, HeapLock, HeapUnlock, HeapSummary, the information classes."""

from __future__ import annotations

import ctypes
import threading

from heapd_client import win32
from tests.win32.facts import holds
from tests.win32.tools import (
    KIB,
    MIB,
    NO_BLOCK,
    Elsewhere,
    compatibility,
    expect,
    new_heap,
    read,
    set_compatibility,
    summary,
    write,
)

NO_SERIALIZE = win32.HEAP_NO_SERIALIZE
COMPATIBILITY = win32.HeapCompatibilityInformation


# -- which heaps -----------------------------------------------------------------------------------------------------
@holds("H-PROC-01", "H-DEFAULT-02")
def the_process_heap_is_one_and_grows() -> None:
    heap = win32.GetProcessHeap()
    assert heap
    assert win32.GetProcessHeap() == heap == Elsewhere(win32.GetProcessHeap).get()
    blocks = [win32.HeapAlloc(heap, 0, 900 * KIB) for _ in range(4)]
    assert all(blocks)
    for block in blocks:
        assert win32.HeapFree(heap, 0, block)


@holds("H-PROC-02", "H-PROC-03", "H-PROC-05", "H-PROC-06")
def heaps_are_listed_the_process_heap_first_the_newest_last() -> None:
    count = win32.GetProcessHeaps(0, None)
    assert count >= 1
    heaps = [win32.HeapCreate(0, 0, 0) for _ in range(3)]
    assert win32.GetProcessHeaps(0, None) == count + 3
    listed = [0] * (count + 3)
    assert win32.GetProcessHeaps(count + 3, listed) == count + 3
    assert listed[0] == win32.GetProcessHeap()
    assert listed[-3:] == heaps
    for heap in heaps:
        win32.HeapDestroy(heap)


@holds("H-PROC-04", "H-PROC-07")
def a_buffer_gets_as_many_handles_as_there_is_room_for() -> None:
    with new_heap(), new_heap():
        count = win32.GetProcessHeaps(0, None)
        for room in (1, 2):
            small = (ctypes.c_size_t * 4)(7, 7, 7, 7)
            assert win32.GetProcessHeaps(room, small) == count
            assert list(small)[room:] == [7] * (4 - room)
            assert all(handle != 7 for handle in list(small)[:room])
        large = [7] * (count + 2)
        assert win32.GetProcessHeaps(count + 2, large) == count
        assert large[count:] == [7, 7]


# -- validate, compact -----------------------------------------------------------------------------------------------
@holds("H-VALID-01")
def validate_looks_at_a_block_or_at_all_and_sets_no_error() -> None:
    with new_heap() as heap:
        block = win32.HeapAlloc(heap, 0, 100)
        expect(True, None, win32.HeapValidate, heap, 0, None)
        expect(True, None, win32.HeapValidate, heap, 0, block)
        expect(False, None, win32.HeapValidate, heap, 0, NO_BLOCK)
    expect(False, None, win32.HeapValidate, heap, 0, None)


@holds("H-VALID-06", "G-ALLOC-14")
def the_data_of_a_moveable_object_is_a_block_its_handle_is_none() -> None:
    heap, handle = win32.GetProcessHeap(), win32.GlobalAlloc(win32.GMEM_MOVEABLE, 20)
    data = win32.GlobalLock(handle)
    expect(False, None, win32.HeapValidate, heap, 0, handle)
    assert win32.HeapValidate(heap, 0, data)
    assert win32.HeapSize(heap, 0, data) == 20
    assert win32.GlobalFree(handle) == 0


@holds("H-COMPACT-01", "H-COMPACT-04")
def compact_tells_the_largest_committed_free_block() -> None:
    with new_heap() as heap:
        block, _ = win32.HeapAlloc(heap, 0, 50 * KIB), win32.HeapAlloc(heap, 0, 10)
        win32.HeapFree(heap, 0, block)
        assert win32.HeapCompact(heap, 0) >= 50 * KIB
        assert win32.HeapCompact(heap, 0) < 50 * KIB  # it was given back to the system


@holds("H-COMPACT-02")
def compact_of_a_full_heap_is_0_without_error() -> None:
    with new_heap(maximum=64 * KIB) as heap:
        while win32.HeapAlloc(heap, 0, 4 * KIB):
            pass
        expect(0, win32.NO_ERROR, win32.HeapCompact, heap, 0)
    expect(0, win32.ERROR_INVALID_HANDLE, win32.HeapCompact, heap, 0)


# -- locks -----------------------------------------------------------------------------------------------------------
@holds("H-LOCK-01", "H-LOCK-02", "H-LOCK-03")
def a_lock_is_recursive_and_keeps_other_threads_out() -> None:
    with new_heap() as heap:
        block = win32.HeapAlloc(heap, 0, 10)
        for _ in range(3):
            expect(True, None, win32.HeapLock, heap)
        assert win32.HeapAlloc(heap, 0, 10)
        waiting = [
            Elsewhere(win32.HeapAlloc, heap, 0, 10),
            Elsewhere(win32.HeapFree, heap, 0, block),
            Elsewhere(lambda: win32.HeapLock(heap) and win32.HeapUnlock(heap)),
        ]
        for _ in range(2):
            expect(True, None, win32.HeapUnlock, heap)
        assert all(thread.is_waiting(0.06) for thread in waiting)
        assert win32.HeapUnlock(heap)
        assert all(thread.get() for thread in waiting)


@holds("H-LOCK-05", "H-CREATE-14")
def a_heap_without_serialization_locks_nobody_out() -> None:
    with new_heap(NO_SERIALIZE) as heap:
        assert win32.HeapLock(heap)
        assert Elsewhere(win32.HeapLock, heap).get() is True
        assert Elsewhere(win32.HeapAlloc, heap, 0, 10).get()
        assert win32.HeapUnlock(heap)
        assert win32.HeapUnlock(heap)
        assert not set_compatibility(heap, 2)


@holds("H-LOCK-07")
def what_is_no_heap_cannot_be_locked() -> None:
    heap = win32.HeapCreate(0, 0, 0)
    win32.HeapDestroy(heap)
    for handle in (heap, None, 0, 12, -1):
        expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapLock, handle)
        expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapUnlock, handle)


@holds("H-LOCK-08")
def unlocking_what_one_does_not_hold_fails() -> None:
    with new_heap() as heap:
        expect(False, win32.ERROR_NOT_LOCKED, win32.HeapUnlock, heap)
        assert win32.HeapLock(heap)
        assert Elsewhere(win32.HeapUnlock, heap).get() is False
        assert win32.HeapUnlock(heap)


@holds("H-LOCK-09", "S-03")
def a_lock_whose_thread_ends_is_free_again() -> None:
    with new_heap() as heap:
        assert Elsewhere(win32.HeapLock, heap).get()
        assert Elsewhere(lambda: win32.HeapLock(heap) and win32.HeapUnlock(heap)).get()
        assert win32.HeapValidate(heap, 0, None)


@holds("S-02")
def the_last_error_is_the_threads_own() -> None:
    win32.SetLastError(1)
    seen, both = [], threading.Barrier(2, timeout=10)

    def other() -> None:
        seen.append(win32.GetLastError())
        win32.SetLastError(2)
        both.wait()
        both.wait()
        seen.append(win32.GetLastError())

    thread = Elsewhere(other)
    both.wait()
    assert win32.GetLastError() == 1
    win32.SetLastError(3)
    both.wait()
    thread.get()
    assert seen == [0, 2]


# -- sums and information --------------------------------------------------------------------------------------------
@holds("H-SUMM-01")
def a_summary_needs_its_size_and_no_flags() -> None:
    with new_heap() as heap:
        size = ctypes.sizeof(win32.HEAP_SUMMARY)
        for cb, flags in ((0, 0), (size - 1, 0), (size + 8, 0), (size, 1)):
            found = win32.HEAP_SUMMARY(cb=cb)
            expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapSummary, heap, flags, found)
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapSummary, heap, 0, None)


@holds("H-SUMM-02", "H-SUMM-03", "H-SUMM-04")
def a_summary_adds_up_what_was_asked_for() -> None:
    for options in (0, win32.HEAP_TAIL_CHECKING_ENABLED, NO_SERIALIZE):
        with new_heap(options) as heap:
            blocks = [win32.HeapAlloc(heap, 0, size) for size in (0x100, 0x200, 0x300, 0x60000)]
            win32.HeapFree(heap, 0, blocks[2])
            found = summary(heap)
            assert found.cbAllocated == 0x60300
            assert found.cbAllocated <= found.cbCommitted <= found.cbReserved == found.cbMaxReserve


@holds("H-INFO-01", "H-INFO-02")
def a_fresh_heap_has_no_front_end() -> None:
    with new_heap() as heap:
        assert compatibility(heap) == 0


@holds("H-INFO-03", "H-INFO-04")
def the_buffer_may_be_larger_and_not_smaller() -> None:
    with new_heap() as heap:
        for length in (0, 3):
            needed = ctypes.c_size_t(0)
            expect(
                False,
                win32.ERROR_INSUFFICIENT_BUFFER,
                win32.HeapQueryInformation,
                *(heap, COMPATIBILITY, ctypes.c_uint32(), length, ctypes.byref(needed)),
            )
            assert needed.value == 4
            expect(
                False,
                win32.ERROR_INSUFFICIENT_BUFFER,
                win32.HeapQueryInformation,
                *(heap, COMPATIBILITY, None, length, None),
            )
        large, written = (ctypes.c_uint32 * 4)(9, 9, 9, 9), ctypes.c_size_t(0)
        assert win32.HeapQueryInformation(heap, COMPATIBILITY, large, 16, written)
        assert (list(large), written.value) == ([0, 9, 9, 9], 4)


@holds("H-INFO-05")
def no_heap_is_no_access() -> None:
    needed = ctypes.c_size_t(77)
    arguments = (None, COMPATIBILITY, ctypes.c_uint32(), 4, needed)
    expect(False, win32.ERROR_NOACCESS, win32.HeapQueryInformation, *arguments)
    assert needed.value == 77


@holds("H-INFO-06", "H-INFO-07", "H-INFO-10")
def the_front_end_can_be_had_and_not_undone() -> None:
    with new_heap() as heap:
        assert set_compatibility(heap, 2)
        assert compatibility(heap) == 2
        value = ctypes.c_uint32(0)
        for value.value in (0, 1):
            arguments = (heap, COMPATIBILITY, ctypes.byref(value), 4)
            expect(False, win32.ERROR_GEN_FAILURE, win32.HeapSetInformation, *arguments)
        assert compatibility(heap) == 2
        assert set_compatibility(heap, 2)
        win32.HeapCompact(heap, 0)
        assert compatibility(heap) == 2


@holds("H-INFO-08", "H-INFO-09", "F-LFH-03")
def some_heaps_cannot_have_a_front_end() -> None:
    checked = win32.HEAP_TAIL_CHECKING_ENABLED, win32.HEAP_FREE_CHECKING_ENABLED
    for options, maximum in ((NO_SERIALIZE, 0), (0, MIB), *((option, 0) for option in checked)):
        with new_heap(options, maximum=maximum) as heap:
            arguments = (heap, COMPATIBILITY, ctypes.c_uint32(2), 4)
            expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapSetInformation, *arguments)
            win32.HeapAlloc(heap, 0, 10)
            assert compatibility(heap) == 0


@holds("H-INFO-11")
def allocating_turns_the_front_end_on() -> None:
    with new_heap() as heap:
        for _ in range(18):
            win32.HeapAlloc(heap, 0, 0)
        assert compatibility(heap) == 2


@holds("H-INFO-14")
def optimizing_gives_back_what_is_free() -> None:
    info = win32.HEAP_OPTIMIZE_RESOURCES_INFORMATION(win32.HEAP_OPTIMIZE_RESOURCES_CURRENT_VERSION, 0)
    with new_heap() as heap:
        for which in (heap, None):
            blocks = [win32.HeapAlloc(heap, 0, 20 * KIB) for _ in range(8)]
            for block in blocks:
                win32.HeapFree(heap, 0, block)
            before = summary(heap).cbCommitted
            assert win32.HeapSetInformation(which, win32.HeapOptimizeResources, info, 8)
            assert summary(heap).cbCommitted < before
        info.Version = 0
        arguments = (heap, win32.HeapOptimizeResources, info, 8)
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapSetInformation, *arguments)


@holds("H-INFO-15")
def setting_needs_four_bytes_and_a_heap() -> None:
    with new_heap() as heap:
        arguments = (heap, COMPATIBILITY, ctypes.c_uint32(2), 3)
        expect(False, win32.ERROR_INSUFFICIENT_BUFFER, win32.HeapSetInformation, *arguments)
    arguments = (None, COMPATIBILITY, ctypes.c_uint32(2), 4)
    expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapSetInformation, *arguments)


# -- debug fills -----------------------------------------------------------------------------------------------------
TAIL, FREED, NEW = b"\xab" * 16, bytes.fromhex("eefeeefe"), bytes.fromhex("0df0adba")
TAIL_CHECKING, FREE_CHECKING = win32.HEAP_TAIL_CHECKING_ENABLED, win32.HEAP_FREE_CHECKING_ENABLED


@holds("H-DEBUG-01", "H-DEBUG-02", "H-DEBUG-11")
def tail_bytes_follow_every_block() -> None:
    with new_heap(TAIL_CHECKING) as heap:
        for size in (*range(64), 5_000, 2 * MIB):
            block = win32.HeapAlloc(heap, win32.HEAP_ZERO_MEMORY, size)
            assert read(block, size + 16) == bytes(size) + TAIL


@holds("H-DEBUG-03", "H-DEBUG-04")
def a_changed_tail_byte_makes_the_block_invalid() -> None:
    with new_heap(TAIL_CHECKING) as heap:
        block = win32.HeapAlloc(heap, 0, 100)
        assert win32.HeapReAlloc(heap, 0, block, 90) == block
        assert read(block + 90, 16) == TAIL
        for at in range(16):
            write(block + 90 + at, b"\x00")
            expect(False, None, win32.HeapValidate, heap, 0, block)
            write(block + 90 + at, b"\xab")
            assert win32.HeapValidate(heap, 0, block)


@holds("H-DEBUG-05")
def nobody_but_validate_notices_a_changed_tail() -> None:
    with new_heap(TAIL_CHECKING) as heap:
        block = win32.HeapAlloc(heap, 0, 100)
        write(block + 100, b"\x00")
        assert win32.HeapSize(heap, 0, block) == 100
        assert win32.HeapReAlloc(heap, 0, block, 100) == block
        write(block + 100, b"\x00")
        assert win32.HeapFree(heap, 0, block)


@holds("H-DEBUG-06", "H-DEBUG-07")
def a_freed_block_is_filled_and_watched() -> None:
    with new_heap(FREE_CHECKING) as heap:
        block, _ = win32.HeapAlloc(heap, 0, 256), win32.HeapAlloc(heap, 0, 256)
        win32.HeapFree(heap, 0, block)
        assert read(block + 16, 240) == FREED * 60
        for at in (16, 100, 255):
            was = read(block + at, 1)
            write(block + at, b"\x00")
            expect(False, None, win32.HeapValidate, heap, 0, None)
            write(block + at, was)
            assert win32.HeapValidate(heap, 0, None)


@holds("H-DEBUG-08", "H-DEBUG-10")
def new_memory_is_filled_by_whole_dwords() -> None:
    with new_heap(FREE_CHECKING) as heap:
        for size in (0, 1, 3, 4, 7, 100, 5_003):
            block = win32.HeapAlloc(heap, 0, size)
            assert read(block, size - size % 4) == NEW * (size // 4)
            assert read(win32.HeapAlloc(heap, win32.HEAP_ZERO_MEMORY, size), size) == bytes(size)


@holds("H-DEBUG-09")
def growth_is_filled_from_the_next_dword_on() -> None:
    with new_heap(FREE_CHECKING) as heap:
        block = win32.HeapAlloc(heap, 0, 10)
        write(block, b"0123456789ab")
        block = win32.HeapReAlloc(heap, 0, block, 31)
        assert read(block, 10) == b"0123456789"
        assert read(block + 12, 16) == NEW * 4


@holds("H-CREATE-12")
def debug_checking_is_taken_from_heap_create() -> None:
    with new_heap(TAIL_CHECKING | FREE_CHECKING) as heap:
        block = win32.HeapAlloc(heap, 0, 4)
        assert read(block, 20) == NEW + TAIL
