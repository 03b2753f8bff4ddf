"""HeapCreate and HeapDestroy: what may be asked for, the limits of fixed heaps, what goes with a heap."""

from __future__ import annotations

from heapd.layout import C_HEAP_ID, PAGE_FREE
from heapd_client import win32
from tests.win32.facts import holds
from tests.win32.tools import KIB, MIB, SENTINEL, expect, new_heap, raised_by, summary, walk


@holds("H-CREATE-01")
def failure_is_null_with_the_last_error_set() -> None:
    expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapCreate, 0, 0, 1 << 45)
    expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapCreate, 0, -1, 0)


@holds("H-CREATE-02", "H-LIMIT-06", "B-03")
def a_maximum_of_0_grows_any_other_is_reserved_at_once() -> None:
    with new_heap() as heap, new_heap(maximum=4 * MIB) as fixed:
        before = summary(heap).cbReserved
        assert win32.HeapAlloc(heap, 0, 8 * MIB)
        assert summary(heap).cbReserved >= before + 8 * MIB
        reserved = summary(fixed).cbReserved
        assert reserved >= 4 * MIB
        while win32.HeapAlloc(fixed, 0, 512 * KIB):
            assert summary(fixed).cbReserved == reserved
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, fixed, 0, 2 * MIB)


@holds("H-CREATE-03", "H-RTL-03")
def the_initial_size_is_committed_by_whole_pages() -> None:
    for initial, committed in ((0, 4 * KIB), (1, 4 * KIB), (5_000, 8 * KIB), (100 * KIB, 100 * KIB)):
        with new_heap(initial=initial) as heap:
            assert summary(heap).cbCommitted == committed, initial


@holds("H-CREATE-04", "B-10")
def a_heap_commits_further_pages_on_demand() -> None:
    for maximum in (0, MIB):
        with new_heap(initial=8 * KIB, maximum=maximum) as heap:
            before = summary(heap).cbCommitted
            assert win32.HeapAlloc(heap, 0, 40 * KIB)
            assert summary(heap).cbCommitted > before
            if maximum:
                assert summary(heap).cbReserved == MIB


@holds("H-CREATE-04")
def a_small_fixed_heap_gives_its_maximum_in_blocks_of_any_size() -> None:
    for size in (100, 1_000, 3_000, 5_000, 15_000):
        with new_heap(maximum=64 * KIB) as heap:
            assert win32.HeapAlloc(heap, 0, 50)
            blocks = []
            while block := win32.HeapAlloc(heap, 0, size):
                blocks.append(block)
            assert len(blocks) * size > 40 * KIB, size
            assert all(win32.HeapFree(heap, 0, block) for block in blocks)
            assert win32.HeapAlloc(heap, 0, 50 * KIB)


@holds("H-CREATE-05")
def initial_may_be_the_maximum() -> None:
    with new_heap(initial=MIB, maximum=MIB) as heap:
        assert win32.HeapAlloc(heap, 0, 500 * KIB)


@holds("H-CREATE-06")
def a_fixed_heap_cannot_give_one_block_of_its_size() -> None:
    with new_heap(maximum=64 * KIB) as heap:
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, 64 * KIB)
        assert win32.HeapAlloc(heap, 0, 32 * KIB)


@holds("H-CREATE-07", "K-02", "S-01")
def a_handle_is_the_address_of_the_first_region() -> None:
    with new_heap() as heap:
        assert heap % (64 * KIB) == 0
        assert walk(heap)[0].lpData == heap


@holds("H-CREATE-08")
def the_maximum_is_rounded_up_to_8_kib() -> None:
    for maximum in (*range(0x100, 0xFF00, 0x1300), 0x2000, 0x2001, 0xFF00, 0x10001):
        with new_heap(maximum=maximum) as heap:
            reserved = (maximum + 0x1FFF) & ~0x1FFF
            assert summary(heap).cbReserved == reserved, maximum
            blocks = 0
            while win32.HeapAlloc(heap, 0, 4 * KIB):
                blocks += 1
            assert blocks * 4 * KIB <= reserved, maximum


@holds("H-CREATE-09")
def a_growable_heap_reserves_its_initial_size_and_64_kib() -> None:
    for initial in (0, 0x80000, 0x150000):
        with new_heap(initial=initial) as heap:
            assert summary(heap).cbReserved == initial + 0x10000


@holds("H-CREATE-11")
def later_regions_double_from_1_mib() -> None:
    with new_heap() as heap:
        for _ in range(44):
            assert win32.HeapAlloc(heap, 0, 300 * KIB)
        sizes = [
            entry.Region.dwCommittedSize + entry.Region.dwUnCommittedSize
            for entry in walk(heap)
            if entry.wFlags & win32.PROCESS_HEAP_REGION
        ]
        assert sizes[:4] == [0x10000, 1 * MIB, 2 * MIB, 4 * MIB]
        assert sizes[4] == 8 * MIB


@holds("H-CREATE-13", "H-ALLOC-03", "S-08")
def a_heap_made_to_raise_raises_at_every_failure() -> None:
    with new_heap(win32.HEAP_GENERATE_EXCEPTIONS) as heap:
        assert raised_by(win32.HeapAlloc, heap, 0, -1) == win32.STATUS_NO_MEMORY
        block = win32.HeapAlloc(heap, 0, 100)
        assert raised_by(win32.HeapReAlloc, heap, 0, block, -1) == win32.STATUS_NO_MEMORY
        assert win32.HeapSize(heap, 0, block) == 100
    assert raised_by(win32.HeapAlloc, heap, win32.HEAP_GENERATE_EXCEPTIONS, 10) == win32.STATUS_ACCESS_VIOLATION


@holds("H-CREATE-17")
def an_initial_size_above_the_maximum_raises_the_maximum() -> None:
    with new_heap(initial=256 * KIB, maximum=64 * KIB) as heap:
        assert summary(heap).cbReserved == 256 * KIB


@holds("H-LIMIT-01", "H-LIMIT-04")
def a_fixed_heap_refuses_blocks_of_about_a_megabyte() -> None:
    with new_heap(maximum=2 * MIB) as heap:
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, MIB)
        for size in (256 * KIB, 512 * KIB):
            assert win32.HeapAlloc(heap, 0, size)
    with new_heap(maximum=16 * MIB) as heap:
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, MIB)


@holds("H-LIMIT-05")
def the_limit_is_below_a_megabyte_by_less_than_12_kib() -> None:
    with new_heap(maximum=4 * MIB) as heap:
        assert win32.HeapAlloc(heap, 0, 0xFD000)
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, 0xFF000)


@holds("H-LIMIT-07")
def the_limit_of_a_small_fixed_heap_is_a_little_below_its_size() -> None:
    with new_heap(maximum=256 * KIB) as heap:
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, 256 * KIB - 0x600)
        block = win32.HeapAlloc(heap, 0, 256 * KIB - 0xC00)
        assert win32.HeapSize(heap, 0, block) == 256 * KIB - 0xC00


@holds("H-DESTROY-01", "H-DESTROY-06")
def destroying_a_heap_frees_all_of_it() -> None:
    heap = win32.HeapCreate(0, 0, 0)
    session = win32.process.process().session
    heap_id = session.open_heaps[-1].id
    blocks = [win32.HeapAlloc(heap, 0, size) for size in (10, 5_000, 100_000, 3 * MIB)]
    assert win32.HeapDestroy(heap)
    for block in blocks:
        assert win32.HeapSize(heap, 0, block) == win32.SIZE_T_MAX
        assert win32.HeapFree(heap, 0, block) is False
    arena = session.arena
    for block in blocks:
        info = arena.find_page(block)  # free, or another heap's by now
        assert info is not None
        control = arena.shape.control_slot(info.heap)
        assert info.state == PAGE_FREE or arena.words[control + C_HEAP_ID] != heap_id


@holds("H-DESTROY-02")
def the_process_heap_is_not_to_be_destroyed() -> None:
    heap = win32.GetProcessHeap()
    expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapDestroy, heap)
    assert win32.HeapFree(heap, 0, win32.HeapAlloc(heap, 0, 10))


@holds("H-DESTROY-03")
def destroying_null_succeeds() -> None:
    expect(True, None, win32.HeapDestroy, None)
    expect(True, None, win32.HeapDestroy, 0)


@holds("H-DESTROY-04")
def what_is_no_heap_cannot_be_destroyed() -> None:
    heap = win32.HeapCreate(0, 0, 0)
    assert win32.HeapDestroy(heap)
    for handle in (heap, 8, 64 * KIB, 1 << 50, -1, 3 * heap + 1):
        expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapDestroy, handle)


@holds("H-DESTROY-05", "H-PROC-09", "H-PROC-08")
def a_destroyed_heap_leaves_the_list_at_once() -> None:
    heaps = [win32.HeapCreate(0, 0, 0) for _ in range(3)]
    count = win32.GetProcessHeaps(0, None)
    assert win32.HeapDestroy(heaps[1])
    assert win32.GetProcessHeaps(0, None) == count - 1
    listed = [0] * (count - 1)
    win32.GetProcessHeaps(count - 1, listed)
    assert listed[-2:] == [heaps[0], heaps[2]]
    win32.SetLastError(SENTINEL)
    for heap in (heaps[0], heaps[2]):
        win32.HeapDestroy(heap)
    assert win32.GetLastError() == SENTINEL
    expect(0, win32.ERROR_INVALID_HANDLE, win32.HeapAlloc, heaps[2], 0, 10)
