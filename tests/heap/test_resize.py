"""Heap.resize: a block that changes size where it lies keeps its address, its generation and its bytes."""

from __future__ import annotations

import random

import pytest

from heapd.arena import Arena
from heapd.errors import (
    BlockTooLargeError,
    CannotResizeInPlaceError,
    DoubleFreeError,
    HeapFullError,
    NotABlockError,
    StaleHandleError,
)
from heapd.heap import Heap
from heapd.records import Grant
from heapd.sizeclass import CLASSES
from heapd.units import KIB, MIB, PAGE_SIZE, align_up
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap, fill, heap_picture, pattern, read

SESSION = 7


def resize(heap: Heap, grant: Grant, size: int, *, in_place_only: bool = True) -> Grant:
    """Resize, and check what must hold of every resize that succeeds."""
    after = heap.resize(grant.address, grant.generation, size, in_place_only=in_place_only)
    assert (after.slot, after.address, after.generation) == (grant.slot, grant.address, grant.generation)
    assert after.extent >= size
    word = heap.arena.words[grant.slot]
    form = heap.arena.shape.word_format(grant.slot)
    assert (form.size(word), form.session(word), form.generation(word)) == (size, SESSION, grant.generation)
    return after


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if not kind.is_run], ids=lambda kind: str(kind.extent))
def test_a_slab_block_takes_any_size_up_to_its_extent_and_none_beyond(heap: Heap, kind: object) -> None:
    """Grow and shrink within the class's extent are one store; the first byte beyond is refused."""
    extent: int = kind.extent  # type: ignore[attr-defined]
    grant, _ = heap.alloc(extent, SESSION), heap.alloc(extent, SESSION)
    for size in (0, 1, extent // 2, extent - 1, extent):
        resize(heap, grant, size)
    before = heap_picture(heap)
    with pytest.raises(CannotResizeInPlaceError):
        heap.resize(grant.address, grant.generation, extent + 1, in_place_only=True)
    assert heap_picture(heap) == before
    check_heap(heap)


def test_a_shrink_that_wastes_most_of_a_slab_block_is_refused_unless_it_must_stay(heap: Heap) -> None:
    """Moving it saves more than the copy costs; `in_place_only` keeps it where it is."""
    grant = heap.alloc(1000, SESSION)
    with pytest.raises(CannotResizeInPlaceError):
        heap.resize(grant.address, grant.generation, 100, in_place_only=False)
    resize(heap, grant, 600, in_place_only=False)
    resize(heap, grant, 100, in_place_only=True)
    check_heap(heap)


@pytest.mark.parametrize("maximum", [0, 32 * MIB])
@pytest.mark.parametrize("size", [12 * KIB, 200 * KIB, 3 * MIB])
def test_a_run_that_shrinks_gives_its_pages_back(make_heap: MakeHeap, arena: Arena, maximum: int, size: int) -> None:
    """To the page; the rest of its bytes stay, and the pages can be had by others."""
    heap = make_heap(maximum=maximum)
    heap.alloc(4096, SESSION)
    grant, _ = heap.alloc(size, SESSION), heap.alloc(4096, SESSION)
    fill(arena, grant.address, size, 1)
    for smaller in (size - PAGE_SIZE, size // 2, PAGE_SIZE, 10, 0):
        after = resize(heap, grant, smaller)
        assert after.extent == max(align_up(smaller, PAGE_SIZE), PAGE_SIZE)
        assert read(arena, grant.address, smaller) == pattern(size, 1)[:smaller]
        check_heap(heap)
        check_arena(arena, [heap])
    heap.free(grant.address, grant.generation)
    check_heap(heap)


def test_a_run_grows_into_spare_pages_behind_it(make_heap: MakeHeap, arena: Arena) -> None:
    """Up to the next block, to the page, keeping its bytes."""
    heap = make_heap(maximum=MIB)
    grant, gap, wall = (heap.alloc(20 * KIB, SESSION) for _ in range(3))
    fill(arena, grant.address, 20 * KIB, 2)
    before = heap_picture(heap)
    with pytest.raises(CannotResizeInPlaceError):
        heap.resize(grant.address, grant.generation, 20 * KIB + 1, in_place_only=True)
    assert heap_picture(heap) == before
    heap.free(gap.address, gap.generation)
    assert resize(heap, grant, 40 * KIB).address + 40 * KIB == wall.address
    with pytest.raises(CannotResizeInPlaceError):
        heap.resize(grant.address, grant.generation, 40 * KIB + 1, in_place_only=True)
    assert read(arena, grant.address, 20 * KIB) == pattern(20 * KIB, 2)
    check_heap(heap)


def test_a_run_does_not_grow_over_the_end_of_its_region(heap: Heap) -> None:
    """Not even where the pages behind are spare, and the heap's own: they are another region's."""
    grant, passing = heap.alloc(60 * KIB, SESSION), heap.alloc(500 * KIB, SESSION)
    anchor = heap.alloc(100 * KIB, SESSION)
    assert passing.address == grant.address + 64 * KIB
    heap.free(passing.address, passing.generation)
    resize(heap, grant, 64 * KIB)
    assert heap.space.spare.count_at(passing.address // PAGE_SIZE) == 500 * KIB // PAGE_SIZE
    with pytest.raises(CannotResizeInPlaceError):
        heap.resize(grant.address, grant.generation, 64 * KIB + 1, in_place_only=True)
    check_heap(heap)
    heap.free(anchor.address, anchor.generation)
    check_heap(heap)


def test_a_big_run_grows_with_its_region_while_nobody_is_behind_it(heap: Heap, arena: Arena) -> None:
    """Address space is taken as it grows, and given back as it shrinks."""
    grant = heap.alloc(2 * MIB, SESSION)
    fill(arena, grant.address, 2 * MIB, 3)
    for size in (2 * MIB + 1, 5 * MIB, 5 * MIB + 100 * KIB, 3 * MIB, 9 * MIB, MIB, 100):
        resize(heap, grant, size)
        region = heap.space.in_order()[-1]
        assert region.page_count * PAGE_SIZE == align_up(max(size, 1), 64 * KIB)
        check_heap(heap)
        check_arena(arena, [heap])
    with pytest.raises(CannotResizeInPlaceError):
        resize(heap, grant, 20 * MIB)  # to commit as much at once would keep others waiting
    resize(heap, grant, 16 * MIB)
    resize(heap, grant, 32 * MIB)
    assert read(arena, grant.address, 100) == pattern(100, 3)
    heap.free(grant.address, grant.generation)
    arena.settle_all()
    check_arena(arena, [heap])


def test_a_big_run_does_not_grow_over_a_neighbour(heap: Heap) -> None:
    """What lies behind is somebody else's."""
    grant, wall = heap.alloc(2 * MIB, SESSION), heap.alloc(2 * MIB, SESSION)
    assert wall.address == grant.address + 2 * MIB
    before = heap_picture(heap)
    with pytest.raises(CannotResizeInPlaceError):
        heap.resize(grant.address, grant.generation, 2 * MIB + 1, in_place_only=True)
    assert heap_picture(heap) == before
    heap.free(wall.address, wall.generation)
    resize(heap, grant, 3 * MIB)
    check_heap(heap)


def test_a_small_run_that_outgrows_a_mib_stays_in_its_region(heap: Heap) -> None:
    """It is a run like any other there, and is freed as one."""
    anchor = heap.alloc(900 * KIB, SESSION)
    grant = heap.alloc(900 * KIB, SESSION)
    resize(heap, grant, 1100 * KIB)
    check_heap(heap)
    for gone in (grant, anchor):
        heap.free(gone.address, gone.generation)
    assert check_heap(heap).regions == 1


def test_growing_over_the_limit_leaves_the_block_as_it_was(heap: Heap, arena: Arena) -> None:
    """HeapFullError for memory; address space taken for it is released."""
    for size in (8 * KIB, 2 * MIB):
        grant = heap.alloc(size, SESSION)
        arena.budget.limit = arena.budget.committed
        before = heap_picture(heap), arena.reserved
        with pytest.raises(HeapFullError):
            heap.resize(grant.address, grant.generation, size + 16 * KIB, in_place_only=True)
        assert (heap_picture(heap), arena.reserved) == before
        check_heap(heap)
        arena.budget.limit = 200 * MIB
    check_arena(arena, [heap])


def test_what_is_no_block_is_refused_as_by_free(heap: Heap) -> None:
    """Interior, stale, freed: the same errors as free, and nothing changes."""
    grant, other = heap.alloc(64, SESSION), heap.alloc(64, SESSION)
    before = heap_picture(heap)
    with pytest.raises(NotABlockError):
        heap.resize(grant.address + 16, grant.generation, 10, in_place_only=True)
    with pytest.raises(StaleHandleError):
        heap.resize(grant.address, grant.generation + 1, 10, in_place_only=True)
    with pytest.raises(BlockTooLargeError):
        heap.resize(grant.address, grant.generation, 2**64 - 1, in_place_only=True)
    assert heap_picture(heap) == before
    heap.free(other.address, other.generation)
    with pytest.raises(DoubleFreeError):
        heap.resize(other.address, other.generation, 10, in_place_only=True)


@pytest.mark.parametrize("maximum", [0, 24 * MIB])
def test_random_resizes_of_neighbours_never_touch_each_other(make_heap: MakeHeap, arena: Arena, maximum: int) -> None:
    """Many runs that grow and shrink side by side: each keeps the bytes it had up to the smaller size."""
    random_ = random.Random(11)
    heap = make_heap(maximum=maximum)
    sizes = [random_.choice([8 * KIB, 100 * KIB, 600 * KIB, 2 * MIB]) for _ in range(12)]
    grants = [heap.alloc(size, SESSION) for size in sizes]
    for number, grant in enumerate(grants):
        fill(arena, grant.address, sizes[number], number)
    done = 0
    for _ in range(300):
        number = random_.randrange(len(grants))
        size = max(1, int(sizes[number] * random_.choice([0.3, 0.8, 0.95, 1.05, 1.3, 2.0])))
        if size > 4 * MIB:
            continue
        try:
            resize(heap, grants[number], size)
        except CannotResizeInPlaceError:
            continue
        done += 1
        kept = min(size, sizes[number])
        assert read(arena, grants[number].address, kept) == pattern(kept, number)
        fill(arena, grants[number].address, size, number)
        sizes[number] = size
    assert done > 100
    for number, grant in enumerate(grants):
        assert read(arena, grant.address, sizes[number]) == pattern(sizes[number], number)
    check_heap(heap)
    check_arena(arena, [heap])
