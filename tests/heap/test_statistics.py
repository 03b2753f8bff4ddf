"""Statistics: two equations that hold at every step, and what is counted as what."""

from __future__ import annotations

import random

import pytest

from heapd.arena import Arena
from heapd.heap import Heap, collect_statistics
from heapd.heap import statistics as statistics_module
from heapd.layout import C_ACQUIRED, C_CONTENDED, C_RECOVERED, C_WAITED_NS
from heapd.records import Grant, HeapStatistics
from heapd.units import KIB, MIB, PAGE_SIZE
from tests.arenas import finish
from tests.heap.conftest import MakeHeap
from tests.invariants import check_heap, check_sums, everyone

SESSION = 7


def statistics(heap: Heap) -> HeapStatistics:
    result: HeapStatistics = finish(collect_statistics(heap, everyone))
    return result


def test_an_empty_heap(heap: Heap) -> None:
    """One committed page that is free; the rest of 64 KiB is not committed."""
    found = statistics(heap)
    assert (found.reserved, found.committed, found.uncommitted) == (64 * KIB, 4 * KIB, 60 * KIB)
    assert (found.busy, found.padding, found.cached, found.overhead) == (0, 0, 0, 0)
    assert (found.free, found.largest_free, found.regions, found.slabs, found.runs) == (4096, 4096, 1, 0, 0)


def test_requested_bytes_are_busy_and_the_rest_of_their_extents_is_padding(heap: Heap) -> None:
    """For blocks of slabs, runs, and large runs."""
    grants = [heap.alloc(size, SESSION) for size in (100, 5000, 70_001, 2 * MIB + 3)]
    found = check_heap(heap)
    assert found.busy == 100 + 5000 + 70_001 + 2 * MIB + 3
    assert found.padding == sum(grant.extent for grant in grants) - found.busy
    assert (found.busy_blocks, found.runs, found.slabs) == (4, 2, 2)


def test_blocks_of_ended_sessions_are_orphaned_and_still_busy(heap: Heap) -> None:
    """Counted in both; blocks cached by anybody are not orphaned."""
    heap.alloc(100, 3), heap.alloc(8192, 3), heap.alloc(50, 4), heap.lease(64, 2, 3)
    found: HeapStatistics = finish(collect_statistics(heap, lambda number: number == 4))
    check_sums(found)
    assert (found.orphaned, found.orphaned_blocks) == (8292, 2)
    assert (found.busy, found.busy_blocks, found.cached_blocks) == (8342, 3, 2)


def test_cached_blocks_count_with_their_whole_extent(heap: Heap) -> None:
    """Nobody asked for a part of them."""
    heap.lease(100, 3, SESSION)
    heap.lease(10_000, 1, SESSION)
    found = check_heap(heap)
    extents = sum(grant.extent for grant in (*heap.lease(100, 3, SESSION), *heap.lease(10_000, 1, SESSION)))
    assert (found.cached, found.cached_blocks, found.busy) == (extents, 4, 0)


def test_allocations_and_releases_are_totals(heap: Heap) -> None:
    """They only grow; their difference is what is out."""
    grants = [heap.alloc(64, SESSION) for _ in range(10)]
    for grant in grants[:4]:
        heap.free(grant.address, grant.generation)
    found = check_heap(heap)
    assert (found.allocations, found.releases) == (10, 4)


def test_lock_counters_are_those_of_the_control_block(heap: Heap, arena: Arena) -> None:
    """Written by the lock's holders, read here."""
    slot = arena.shape.control_slot(heap.index)
    for counter, value in ((C_ACQUIRED, 5), (C_CONTENDED, 2), (C_WAITED_NS, 999), (C_RECOVERED, 1)):
        arena.words[slot + counter] = value
    found = statistics(heap)
    assert (found.acquisitions, found.contended, found.waited_ns, found.recoveries) == (5, 2, 999, 1)


@pytest.mark.parametrize("maximum", [0, 8 * MIB])
def test_the_parts_add_up_after_every_single_operation(make_heap: MakeHeap, maximum: int) -> None:
    """Alloc, free, resize, lease, give back, compact, at random; each followed by the two equations."""
    random_ = random.Random(maximum)
    heap = make_heap(maximum=maximum)
    live: list[Grant] = []
    leased: list[Grant] = []
    for _ in range(400):
        action = random_.random()
        if action < 0.45 and len(live) < 60:
            live.append(heap.alloc(random_.choice([5, 64, 700, 3000, 4096, 9000, 40_000, 100_000]), SESSION))
        elif action < 0.75 and live:
            grant = live.pop(random_.randrange(len(live)))
            heap.free(grant.address, grant.generation)
        elif action < 0.85 and len(leased) < 30:
            leased += heap.lease(random_.choice([64, 1000, 8192]), 4, SESSION)
        elif action < 0.95 and leased:
            assert heap.give_back(leased.pop().address, SESSION)
        else:
            finish(heap.compact())
        found = statistics(heap)
        check_sums(found)
        assert found.committed == heap.space.committed * PAGE_SIZE
        assert (found.busy_blocks, found.cached_blocks) == (len(live), len(leased))
    check_heap(heap)


def test_counting_pauses_between_slices_and_still_adds_up(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks come and go while it counts: each piece is counted as it is when it is read, wholly or not at all."""
    monkeypatch.setattr(statistics_module, "_BLOCKS_A_SLICE", 20)
    live = [heap.alloc(size, SESSION) for size in (16, 300, 1100, 5000, 8192, 70_000, 2 * MIB) * 20]
    random_ = random.Random(5)
    pauses = 0

    def change() -> None:
        nonlocal pauses
        pauses += 1
        for _ in range(3):
            grant = live.pop(random_.randrange(len(live)))
            heap.free(grant.address, grant.generation)
            live.append(heap.alloc(random_.choice([16, 5000, 8192, 70_000]), SESSION))

    check_sums(finish(collect_statistics(heap, everyone), change))
    assert pauses > 5
    check_heap(heap)


def test_counting_a_heap_that_is_closed_meanwhile_ends(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two slices its slabs and runs are gone: no exception but one of heapd's own."""
    monkeypatch.setattr(statistics_module, "_BLOCKS_A_SLICE", 20)
    for size in (16, 300, 8192, 2 * MIB) * 10:
        heap.alloc(size, SESSION)
    job = collect_statistics(heap, everyone)
    next(job)
    heap.close()
    check_sums(finish(job))


def test_counting_commits_nothing(make_heap: MakeHeap, arena: Arena) -> None:
    """Uncommitted pages are counted from the daemon's records."""
    heap = make_heap(maximum=64 * MIB)
    for size in (10, 3000, 10_000, 500_000):
        heap.alloc(size, SESSION)
    before = arena.segment.allocated_bytes
    statistics(heap)
    assert arena.segment.allocated_bytes == before
