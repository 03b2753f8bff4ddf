"""Leases: blocks lent to a front end in a batch, which allocates and frees them by storing their words."""

from __future__ import annotations

import pytest

from heapd.arena import Arena
from heapd.errors import BlockTooLargeError, DoubleFreeError, HeapFullError
from heapd.heap import Heap
from heapd.layout import BUSY, CACHED
from heapd.units import KIB, MIB, PAGE_SIZE
from tests.arenas import Commits
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap

SESSION = 7


@pytest.mark.parametrize("size", [16, 100, 5000, 8 * KIB, 2 * MIB])
def test_leased_blocks_are_cached_by_the_session(heap: Heap, size: int) -> None:
    """Distinct blocks of the class, words that say CACHED, session and generation."""
    grants = heap.lease(size, 4, SESSION)
    assert len({grant.address for grant in grants}) == 4
    for grant in grants:
        form, word = heap.arena.shape.word_format(grant.slot), heap.arena.words[grant.slot]
        assert (form.state(word), form.session(word), form.generation(word)) == (CACHED, SESSION, grant.generation)
        assert grant.extent >= size
    assert check_heap(heap).cached_blocks == 4


def test_a_front_end_allocates_by_adding_the_size_to_the_word(heap: Heap) -> None:
    """And frees by storing the word as it was with the next generation: the back end needs to do nothing."""
    [grant] = heap.lease(100, 1, SESSION)
    form, words = heap.arena.shape.word_format(grant.slot), heap.arena.words
    cached = words[grant.slot]
    words[grant.slot] = cached + 100
    assert (form.state(words[grant.slot]), form.size(words[grant.slot])) == (BUSY, 100)
    assert check_heap(heap).busy == 100
    words[grant.slot] = cached + (1 << form.generation_shift)
    assert check_heap(heap).cached_blocks == 1
    assert heap.give_back(grant.address, SESSION)


def test_a_cached_block_cannot_be_freed_by_rpc(heap: Heap) -> None:
    """It is free already, whatever generation is shown."""
    [grant] = heap.lease(64, 1, SESSION)
    with pytest.raises(DoubleFreeError):
        heap.free(grant.address, grant.generation)


def test_only_what_the_session_caches_is_taken_back(heap: Heap) -> None:
    """Busy blocks, another session's, free ones and nonsense are let alone, one by one."""
    mine, busy = heap.lease(64, 1, SESSION)[0], heap.alloc(64, SESSION)
    assert heap.give_back(busy.address, SESSION) is False
    assert heap.give_back(mine.address, SESSION + 1) is False
    assert heap.give_back(mine.address + 8, SESSION) is False
    assert heap.give_back(0, SESSION) is False
    assert heap.give_back(2**63, SESSION) is False
    assert heap.give_back(mine.address, SESSION) is True
    assert heap.give_back(mine.address, SESSION) is False
    assert check_heap(heap).busy_blocks == 1


def test_fewer_are_lent_when_memory_runs_short(make_heap: MakeHeap) -> None:
    """As many as there are; none at all is an error."""
    heap = make_heap(maximum=64 * KIB)
    assert len(heap.lease(16 * KIB, 10, SESSION)) == 4
    with pytest.raises(HeapFullError):
        heap.lease(16 * KIB, 10, SESSION)
    assert check_heap(heap).cached_blocks == 4


def test_other_sizes_come_along_one_block_each(heap: Heap) -> None:
    """After the batch, in the order asked for; each cached by the session."""
    grants = heap.lease(100, 3, SESSION, [5000, 16, 8 * KIB])
    assert [grant.extent for grant in grants] == [128, 128, 128, 5120, 16, 8 * KIB]
    assert check_heap(heap).cached_blocks == 6


def test_what_there_is_no_memory_for_ends_the_batch(make_heap: MakeHeap) -> None:
    """Whether it is one of the others or too large for the heap: what was lent before is told."""
    heap = make_heap(maximum=64 * KIB)
    assert len(heap.lease(16 * KIB, 2, SESSION, [16 * KIB, 128 * KIB, 16])) == 3
    assert len(heap.lease(16 * KIB, 1, SESSION, [16 * KIB])) == 1
    assert check_heap(heap).cached_blocks == 4


def test_too_large_a_size_is_refused(make_heap: MakeHeap) -> None:
    """As by alloc."""
    with pytest.raises(BlockTooLargeError):
        make_heap(max_block=100).lease(101, 2, SESSION)


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_commit_that_fails_in_the_middle_costs_only_the_rest(heap: Heap, commits: Commits, nth: int) -> None:
    """What was lent before it stays lent and is told."""
    commits.fail(nth, persistent=True)
    try:
        lent = len(heap.lease(3000, 30, SESSION))
    except HeapFullError:
        lent = 0
    commits.work()
    assert check_heap(heap).cached_blocks == lent


def test_everything_given_back_leaves_an_empty_heap(heap: Heap, arena: Arena) -> None:
    """Leases are blocks like any other."""
    grants = [grant for size in (16, 1000, 5000, 70_000, MIB) for grant in heap.lease(size, 8, SESSION)]
    for grant in grants[::2] + grants[1::2]:
        assert heap.give_back(grant.address, SESSION)
    found = check_heap(heap)
    assert (found.busy_blocks, found.cached_blocks, found.regions) == (0, 0, 1)
    assert found.committed <= PAGE_SIZE
    check_arena(arena, [heap])
