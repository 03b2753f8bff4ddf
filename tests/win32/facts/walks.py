"""HeapWalk: what the elements are, their order, and that the structure holds the whole state."""

from __future__ import annotations

import ctypes
from itertools import pairwise

from heapd_client import win32
from tests.win32.facts import holds
from tests.win32.tools import KIB, MIB, expect, new_heap, raw, walk

REGION = int(win32.PROCESS_HEAP_REGION)
UNCOMMITTED = int(win32.PROCESS_HEAP_UNCOMMITTED_RANGE)
BUSY = int(win32.PROCESS_HEAP_ENTRY_BUSY)


@holds("H-WALK-01")
def the_structure_is_the_whole_state_of_a_walk() -> None:
    with new_heap() as heap, new_heap() as other:
        for size in (10, 20, 5_000, 200_000, 2 * MIB):
            win32.HeapAlloc(heap, 0, size)
        whole = raw(walk(heap))
        entry = win32.PROCESS_HEAP_ENTRY()
        ctypes.memset(ctypes.byref(entry), 0xCC, ctypes.sizeof(entry))
        entry.lpData = 0
        found = []
        while win32.HeapWalk(heap, ctypes.byref(entry)):
            found.append(bytes(entry))
            walk(other)  # another walk in between disturbs nothing
            entry = win32.PROCESS_HEAP_ENTRY.from_buffer_copy(entry)
        assert found == whole
        again = win32.PROCESS_HEAP_ENTRY.from_buffer_copy(whole[2])
        assert win32.HeapWalk(heap, ctypes.pointer(again))
        assert bytes(again) == whole[3]


@holds("H-WALK-02", "H-WALK-04")
def a_walk_ends_with_no_more_items() -> None:
    with new_heap() as heap:
        entry = win32.PROCESS_HEAP_ENTRY()
        while win32.HeapWalk(heap, entry):
            last = entry.lpData
        assert win32.GetLastError() == win32.ERROR_NO_MORE_ITEMS
        assert entry.lpData == last
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapWalk, heap, None)
    expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapWalk, heap, win32.PROCESS_HEAP_ENTRY())


@holds("H-WALK-03")
def under_the_lock_a_walk_goes_through() -> None:
    with new_heap() as heap:
        blocks = [win32.HeapAlloc(heap, 0, size) for size in range(50, 5_000, 50)]
        assert win32.HeapLock(heap)
        found = [entry.lpData for entry in walk(heap) if entry.wFlags & BUSY]
        assert win32.HeapUnlock(heap)
        assert sorted(found) == sorted(blocks)


@holds("H-WALK-05", "H-WALK-07", "H-WALK-08", "H-WALK-10", "H-WALK-12")
def a_fresh_heap_is_a_region_a_free_block_and_an_uncommitted_range() -> None:
    with new_heap() as heap:
        region, free, rest = walk(heap)
        assert (region.wFlags, region.lpData, region.cbOverhead, region.iRegionIndex) == (REGION, heap, 0, 0)
        committed, uncommitted = region.Region.dwCommittedSize, region.Region.dwUnCommittedSize
        assert committed + uncommitted == 0x10000
        assert free.wFlags == 0
        assert free.cbData
        assert (rest.wFlags, rest.lpData, rest.cbOverhead) == (UNCOMMITTED, heap + committed, 0)
        assert rest.cbData == uncommitted


@holds("H-WALK-11")
def a_region_tells_its_first_block_and_its_end() -> None:
    with new_heap() as heap:
        region = walk(heap)[0].Region
        assert region.lpFirstBlock == heap
        assert region.lpLastBlock == heap + 0x10000


@holds("H-WALK-06", "H-WALK-17", "B-09")
def regions_come_by_birth_their_blocks_by_address_big_ones_last() -> None:
    with new_heap() as heap:
        big = [win32.HeapAlloc(heap, 0, 2 * MIB)]
        for _ in range(6):
            win32.HeapAlloc(heap, 0, 300 * KIB)
        big.append(win32.HeapAlloc(heap, 0, 3 * MIB))
        entries = walk(heap)
        inside, outside = entries[:-2], entries[-2:]
        assert [(entry.lpData, entry.cbData) for entry in outside] == [(big[0], 2 * MIB), (big[1], 3 * MIB)]
        assert all((e.wFlags, e.cbOverhead, e.iRegionIndex) == (BUSY, 0, 64) for e in outside)
        starts = [at for at, entry in enumerate(inside) if entry.wFlags & REGION]
        assert starts[0] == 0
        assert len(starts) >= 2
        assert [inside[at].iRegionIndex for at in starts] == list(range(len(starts)))
        for at, end in zip(starts, [*starts[1:], len(inside)], strict=True):
            region, *rest = inside[at:end]
            addresses = [entry.lpData for entry in rest]
            assert addresses == sorted(addresses)
            assert all(region.lpData <= where < region.Region.lpLastBlock for where in addresses)
            assert all(entry.iRegionIndex == region.iRegionIndex for entry in rest)


@holds("H-WALK-13")
def elements_of_a_region_follow_each_other() -> None:
    with new_heap() as heap:
        for _ in range(5):
            win32.HeapAlloc(heap, 0, 64)
        _, *rest = walk(heap)
        for one, next_ in pairwise(rest):
            assert one.lpData + one.cbData <= next_.lpData


@holds("H-WALK-14")
def a_busy_element_is_the_pointer_and_the_size() -> None:
    with new_heap() as heap:
        sizes = (0, 1, 63, 64, 100, 5_000, 65_536, 300_000, 2 * MIB)
        blocks = {win32.HeapAlloc(heap, 0, size): size for size in sizes}
        found = [entry for entry in walk(heap) if entry.wFlags & BUSY]
        assert {entry.lpData: entry.cbData for entry in found} == blocks
        assert all(entry.cbOverhead for entry in found if entry.iRegionIndex != 64)


@holds("H-WALK-16", "H-ALLOC-10")
def each_small_block_adds_one_element_behind_the_others() -> None:
    with new_heap() as heap:
        before, last = walk(heap), 0
        for number in range(20):
            block = win32.HeapAlloc(heap, 0, 24)
            after = walk(heap)
            assert len(after) == len(before) + 1
            kept = 1 + number  # the region, and the blocks so far
            assert raw(after)[:kept] == raw(before)[:kept]
            assert (after[kept].lpData, after[kept].cbData) == (block, 24)
            assert not last or block == last + 32
            before, last = after, block


@holds("H-WALK-16")
def they_lie_in_the_order_of_allocation_without_a_walk_too() -> None:
    with new_heap() as heap:
        blocks = [win32.HeapAlloc(heap, 0, 24) for _ in range(30)]
        assert [entry.lpData for entry in walk(heap) if entry.wFlags & BUSY] == blocks == sorted(blocks)
        assert len(walk(heap)) == 33


@holds("H-WALK-19", "H-WALK-23")
def with_all_freed_a_heap_walks_as_fresh() -> None:
    with new_heap() as heap:
        fresh = raw(walk(heap))
        blocks = [win32.HeapAlloc(heap, 0, size) for size in (*[24] * 17, 100, 5_000, 70_000, 2 * MIB)]
        assert raw(walk(heap)) != fresh
        for block in blocks:
            win32.HeapFree(heap, 0, block)
        assert raw(walk(heap)) == fresh


@holds("H-WALK-20")
def moveable_objects_are_plain_busy_blocks() -> None:
    handle = win32.GlobalAlloc(win32.GMEM_MOVEABLE | win32.GMEM_DDESHARE, 4_321)
    data = win32.GlobalLock(handle)
    (entry,) = [entry for entry in walk(win32.GetProcessHeap()) if entry.lpData == data]
    assert (entry.wFlags, entry.cbData) == (BUSY, 4_321)
    win32.GlobalFree(handle)


@holds("H-WALK-21")
def free_bytes_that_touch_are_one_element() -> None:
    with new_heap() as heap:
        blocks = [win32.HeapAlloc(heap, 0, 64) for _ in range(18)]
        for block in blocks[:17]:
            win32.HeapFree(heap, 0, block)
        _, hole, last, *_ = walk(heap)
        assert (hole.lpData, hole.cbData, last.lpData) == (blocks[0], 17 * 64, blocks[17])
