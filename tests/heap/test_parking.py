"""Empty slabs: a small one a class is kept while the heap is in use, and costs nobody else memory or a true picture."""

from __future__ import annotations

import pytest

from heapd.arena import Arena
from heapd.errors import DoubleFreeError
from heapd.heap import Heap
from heapd.units import KIB, PAGE_SIZE
from tests.arenas import Commits, finish
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap, walk_all

SESSION = 7


@pytest.fixture
def heap(make_heap: MakeHeap) -> Heap:
    """A fixed heap of 128 KiB with one run, so that it is in use."""
    heap = make_heap(maximum=128 * KIB)
    heap.alloc(8 * KIB, SESSION)
    return heap


def test_one_block_that_comes_and_goes_makes_one_slab(heap: Heap, commits: Commits) -> None:
    """The same address each time, the next generation, and no call to the system."""
    first = grant = heap.alloc(500, SESSION)
    commits.fail(1, persistent=True)
    for number in range(1, 100):
        heap.free(grant.address, grant.generation)
        grant = heap.alloc(500, SESSION)
        assert (grant.address, grant.generation) == (first.address, first.generation + number)
    assert commits.calls == 0
    check_heap(heap)


def test_the_last_block_s_double_free_is_told_as_such(heap: Heap) -> None:
    """The slab is still there, and knows."""
    grant = heap.alloc(500, SESSION)
    heap.free(grant.address, grant.generation)
    with pytest.raises(DoubleFreeError):
        heap.free(grant.address, grant.generation)


def test_only_one_empty_slab_a_class_is_kept(heap: Heap) -> None:
    """And none of many pages."""
    grants = [heap.alloc(16, SESSION) for _ in range(600)]
    assert check_heap(heap).slabs > 1
    for grant in grants:
        heap.free(grant.address, grant.generation)
    assert check_heap(heap).slabs == 1
    large = [heap.alloc(5000, SESSION) for _ in range(6)]
    for grant in large:
        heap.free(grant.address, grant.generation)
    assert check_heap(heap).slabs == 1


def test_its_bytes_are_told_as_free_and_overhead(heap: Heap) -> None:
    """The sums of statistics and walk hold with it."""
    grant = heap.alloc(500, SESSION)
    heap.free(grant.address, grant.generation)
    found = check_heap(heap)
    assert (found.slabs, found.busy_blocks, found.free_blocks) == (1, 1, 1)


def test_compact_gives_it_back(heap: Heap) -> None:
    """Nothing of it stays committed."""
    grant = heap.alloc(500, SESSION)
    heap.free(grant.address, grant.generation)
    finish(heap.compact())
    found = check_heap(heap)
    assert found.slabs == 0
    assert found.committed <= 8 * KIB + PAGE_SIZE


def test_its_pages_serve_whoever_needs_them(heap: Heap) -> None:
    """A fixed heap is not full while slabs without a block hold its pages."""
    for size in (16, 64, 500, 900):
        grant = heap.alloc(size, SESSION)
        heap.free(grant.address, grant.generation)
    assert check_heap(heap).slabs == 4
    heap.alloc(120 * KIB, SESSION)
    assert check_heap(heap).slabs == 0


def test_a_heap_with_nothing_lent_looks_as_when_it_was_made(make_heap: MakeHeap, arena: Arena) -> None:
    """Walk and statistics alike: no slab, one region, no more than its first page."""
    heap = make_heap()
    fresh = [(entry.kind, entry.address, entry.extent) for entry in walk_all(heap)]
    grants = [heap.alloc(size, SESSION) for size in (16, 500, 3000, 70_000)]
    for grant in grants:
        heap.free(grant.address, grant.generation)
    check_heap(heap)
    assert heap.slabs == {}
    assert len(walk_all(heap)) <= len(fresh)
    assert heap.space.committed <= 1
    check_arena(arena, [heap])
