"""How a heap grows and shrinks: its regions, those of large blocks, and when memory goes back to the system."""

from __future__ import annotations

import pytest

from heapd.arena import Arena
from heapd.errors import HeapFullError, InvalidArgumentError
from heapd.heap import Heap
from heapd.heap.space import Space
from heapd.records import Grant
from heapd.units import GRANULE_PAGES, GRANULE_SIZE, KIB, MIB, PAGE_SHIFT, PAGE_SIZE
from tests.arenas import finish
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap

SESSION = 7


def region_sizes(heap: Heap) -> list[int]:
    """Bytes reserved by each region, in the order of a walk."""
    return [region.page_count << PAGE_SHIFT for region in heap.space.in_order()]


def free_all(heap: Heap, grants: list[Grant]) -> None:
    for grant in grants:
        heap.free(grant.address, grant.generation)


# -- birth -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "reserved", "committed"),
    [
        ({}, 64 * KIB, 4 * KIB),
        ({"initial": 1}, 128 * KIB, 4 * KIB),
        ({"initial": 0x80000}, 0x90000, 0x80000),
        ({"initial": 0x150000}, 0x160000, 0x150000),
        ({"reserve": MIB, "initial": 4096}, MIB, 4096),
        ({"maximum": 64 * KIB}, 64 * KIB, 4 * KIB),
        ({"maximum": 65 * KIB}, 68 * KIB, 4 * KIB),
        ({"maximum": 1}, 4 * KIB, 4 * KIB),
        ({"maximum": MIB, "initial": MIB}, MIB, MIB),
        ({"maximum": 100_000, "initial": 5000}, 100 * KIB, 8 * KIB),
    ],
    ids=str,
)
def test_a_new_heap_reserves_and_commits_what_win32_would(
    make_heap: MakeHeap, arena: Arena, options: dict[str, int], reserved: int, committed: int
) -> None:
    """The first region: initial + 64 KiB of a growable heap, the maximum of a fixed one; a page at least committed."""
    heap = make_heap(**options)
    assert region_sizes(heap) == [reserved]
    assert heap.space.committed << PAGE_SHIFT == committed
    check_heap(heap)
    check_arena(arena, [heap])


@pytest.mark.parametrize(
    "options",
    [{"maximum": MIB, "initial": MIB + 1}, {"initial": 257 * MIB}, {"maximum": 2**63}, {"reserve": 2**64 - 1}],
    ids=str,
)
def test_sizes_that_contradict_each_other_or_the_arena_are_refused(
    make_heap: MakeHeap, arena: Arena, options: dict[str, int]
) -> None:
    """InvalidArgumentError, and nothing is reserved."""
    with pytest.raises(InvalidArgumentError):
        make_heap(**options)
    check_arena(arena, [])


def test_a_heap_whose_initial_size_cannot_be_committed_leaves_nothing(make_heap: MakeHeap, arena: Arena) -> None:
    """Over the commit limit: the region is released again."""
    with pytest.raises(HeapFullError):
        make_heap(initial=201 * MIB)
    arena.settle_all()
    check_arena(arena, [])


# -- growth ------------------------------------------------------------------------------------------------------------
def test_a_growable_heap_adds_regions_of_1_2_4_8_and_then_15_8_mib(heap: Heap) -> None:
    """64 KiB first, then doubling up to Windows' cap of 0xFD0000 bytes."""
    for _ in range(50 * MIB // (512 * KIB)):
        heap.alloc(512 * KIB, SESSION)
    sizes = [64 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 0xFD0000, 0xFD0000]
    assert region_sizes(heap)[:7] == sizes
    assert set(region_sizes(heap)[7:]) <= {0xFD0000}
    check_heap(heap)


def test_a_released_region_is_grown_again_in_the_same_size(heap: Heap) -> None:
    """What doubles is the number of regions that there are, not the number there ever were."""
    for _ in range(5):
        grants = [heap.alloc(512 * KIB, SESSION) for _ in range(3)]
        assert region_sizes(heap) == [64 * KIB, MIB, 2 * MIB]
        free_all(heap, grants)
        assert region_sizes(heap) == [64 * KIB]


def test_a_fixed_heap_never_reserves_more(make_heap: MakeHeap) -> None:
    """It is full instead; blocks of a MiB and more come from the same region."""
    heap = make_heap(maximum=4 * MIB)
    heap.alloc(3 * MIB, SESSION)
    with pytest.raises(HeapFullError):
        heap.alloc(2 * MIB, SESSION)
    heap.alloc(MIB, SESSION)
    assert region_sizes(heap) == [4 * MIB]
    check_heap(heap)


@pytest.mark.parametrize("maximum", [4_000, 5_000, 65 * KIB, 100_000])
def test_a_fixed_heap_uses_no_page_beyond_its_maximum(make_heap: MakeHeap, arena: Arena, maximum: int) -> None:
    """Rounded up to a page, and not to the 64 KiB that address space comes in; a neighbour begins there."""
    heap, neighbour = make_heap(maximum=maximum), make_heap()
    pages = (maximum + PAGE_SIZE - 1) // PAGE_SIZE
    for _ in range(pages):
        heap.alloc(min(maximum, PAGE_SIZE), SESSION)
    with pytest.raises(HeapFullError) as refused:
        heap.alloc(min(maximum, PAGE_SIZE), SESSION)
    assert (refused.value.used, refused.value.limit) == (maximum, maximum)
    assert heap.space.committed == pages
    assert neighbour.space.in_order()[0].first == heap.space.in_order()[0].first + GRANULE_PAGES * (1 + pages // 16)
    check_heap(heap)
    check_arena(arena, [heap, neighbour])
    heap.close()
    arena.settle_all()
    check_arena(arena, [neighbour])


def test_address_space_is_the_last_resort(heap: Heap) -> None:
    """Spare pages of any region are used before one is added."""
    grants = [heap.alloc(512 * KIB, SESSION) for _ in range(14)]
    before = region_sizes(heap)
    free_all(heap, grants[3:9])
    for _ in range(6):
        heap.alloc(512 * KIB, SESSION)
    assert region_sizes(heap) == before


# -- large blocks ------------------------------------------------------------------------------------------------------
def test_a_block_of_a_mib_has_a_region_of_its_own(heap: Heap) -> None:
    """Rounded up to 64 KiB; one byte less than a MiB's pages has none."""
    big = heap.alloc(MIB + 1, SESSION)
    assert region_sizes(heap) == [64 * KIB, MIB + GRANULE_SIZE]
    heap.alloc(MIB - PAGE_SIZE, SESSION)
    assert region_sizes(heap) == [64 * KIB, MIB, MIB + GRANULE_SIZE]
    heap.free(big.address, big.generation)
    assert region_sizes(heap) == [64 * KIB, MIB]
    check_heap(heap)


def test_regions_of_large_blocks_come_last_in_a_walk(heap: Heap) -> None:
    """By birth within each kind."""
    first = heap.alloc(2 * MIB, SESSION)
    heap.alloc(500 * KIB, SESSION)
    second = heap.alloc(3 * MIB, SESSION)
    firsts = [region.first << PAGE_SHIFT for region in heap.space.in_order()]
    assert firsts[2:] == [first.address, second.address]


# -- giving back -------------------------------------------------------------------------------------------------------
def test_an_emptied_region_is_released_and_the_first_one_is_not(heap: Heap, arena: Arena) -> None:
    """The first keeps the heap alive, and at most its initial commit."""
    grants = [heap.alloc(300 * KIB, SESSION) for _ in range(12)]
    assert len(region_sizes(heap)) > 2
    free_all(heap, grants)
    assert region_sizes(heap) == [64 * KIB]
    assert heap.space.committed <= 1
    check_arena(arena, [heap])


def test_a_few_spare_pages_stay_committed(make_heap: MakeHeap) -> None:
    """Up to 16: a stream of small allocs and frees pays for no system calls."""
    heap = make_heap(maximum=MIB)
    anchor = heap.alloc(4096, SESSION)
    assert anchor
    block = heap.alloc(15 * PAGE_SIZE, SESSION)
    heap.free(block.address, block.generation)
    assert heap.space.spare_committed == 15
    again = heap.alloc(15 * PAGE_SIZE, SESSION)
    assert (again.address, again.fresh) == (block.address, False)


def test_more_than_the_threshold_is_decommitted_at_once(make_heap: MakeHeap, arena: Arena) -> None:
    """Over 16 spare pages and a 256th of what is committed: the extent just freed goes back to the system."""
    heap = make_heap(maximum=4 * MIB)
    heap.alloc(4096, SESSION)
    block, anchor = heap.alloc(40 * PAGE_SIZE, SESSION), heap.alloc(4096, SESSION)
    assert anchor
    before = arena.segment.allocated_bytes
    heap.free(block.address, block.generation)
    assert arena.segment.allocated_bytes == before - 40 * PAGE_SIZE
    assert heap.space.spare_committed == 0
    check_heap(heap)


def test_the_threshold_grows_with_the_heap(make_heap: MakeHeap) -> None:
    """A 1024th of 96 MiB: 96 KiB may stay, twice that may not."""
    heap = make_heap(maximum=128 * MIB)
    heap.alloc(96 * MIB, SESSION)
    for size, stays in ((96 * KIB, True), (192 * KIB, False)):
        block, anchor = heap.alloc(size, SESSION), heap.alloc(4096, SESSION)
        heap.free(block.address, block.generation)
        assert (heap.space.spare_committed >= size // PAGE_SIZE) is stays
        heap.free(anchor.address, anchor.generation)
        finish(heap.compact())


def test_closing_gives_every_page_back_whatever_is_allocated(heap: Heap, arena: Arena) -> None:
    """Blocks of every kind and all."""
    before = arena.segment.allocated_bytes - PAGE_SIZE
    for size in (10, 5000, 70_000, 3 * MIB, 20 * MIB):
        heap.alloc(size, SESSION)
    heap.close()
    arena.settle_all()
    assert arena.reserved == 0
    assert arena.segment.allocated_bytes - before <= 20 * PAGE_SIZE  # of the page map
    check_arena(arena, [])


# -- neighbours --------------------------------------------------------------------------------------------------------
def neighbours(arena: Arena) -> tuple[Space, int, int]:
    """A growable space with two regions that touch, and the first page of each."""
    space = Space(arena, 0, maximum=0)
    low = space.open(GRANULE_PAGES, 0)
    high = space._add_region(GRANULE_PAGES, is_big=False)
    assert low.end == high.first
    return space, low.first, high.first


def test_spare_pages_of_two_regions_are_never_one_extent(arena: Arena) -> None:
    """Each region is released on its own, and no block lies across their border."""
    space, low, high = neighbours(arena)
    assert list(space.spare) == [(low, GRANULE_PAGES), (high, GRANULE_PAGES)]
    assert space.spare.take(GRANULE_PAGES + 1) is None


def test_a_border_that_is_gone_does_not_divide_a_later_region(arena: Arena) -> None:
    """A region that ends where a large block's began is released, then the block, then one region lies over both."""
    space = Space(arena, 0, maximum=0)
    space.open(GRANULE_PAGES, 0)
    small = space._add_region(GRANULE_PAGES, is_big=False)
    big = space.take_big(2 * GRANULE_PAGES)
    assert big == small.end
    space._drop_region(small)
    space.give_big(big)
    region = space._add_region(3 * GRANULE_PAGES, is_big=False)
    assert region.first < big < region.end
    space.spare.take_at(region.first, GRANULE_PAGES)
    space.give(region.first, GRANULE_PAGES)
    assert len(space.regions) == 1, "the region is empty, and was not released"
