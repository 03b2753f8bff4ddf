"""Compact: free pages go back to the system, nothing moves, and the answer is the largest free extent before."""

from __future__ import annotations

import itertools
import random

import pytest

from heapd.arena import Arena
from heapd.heap import Heap
from heapd.records import Grant
from heapd.units import KIB, MIB, PAGE_SIZE
from tests.arenas import finish, private_arena
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap, fill, heap_picture, pattern, read

SESSION = 7


def test_an_empty_heap_has_its_initial_commit_free_and_keeps_it(make_heap: MakeHeap) -> None:
    """What was committed when it was made stays."""
    heap = make_heap(initial=100_000)
    assert finish(heap.compact()) == 25 * PAGE_SIZE
    assert heap.space.committed == 25
    check_heap(heap)


def test_spare_pages_are_decommitted_and_blocks_are_not_moved(make_heap: MakeHeap, arena: Arena) -> None:
    """Every block is where it was, with its bytes; no spare page but the initial one stays committed."""
    heap = make_heap(maximum=4 * MIB)
    grants = [heap.alloc(20 * KIB, SESSION) for _ in range(20)]
    for number, grant in enumerate(grants):
        fill(arena, grant.address, 20 * KIB, number)
    for grant in grants[1::7]:
        heap.free(grant.address, grant.generation)
    kept = [(number, grant) for number, grant in enumerate(grants) if number % 7 != 1]
    before = heap_picture(heap)
    assert finish(heap.compact()) == 20 * KIB
    assert heap_picture(heap) == before
    assert heap.space.spare_committed <= 1
    for number, grant in kept:
        assert read(arena, grant.address, 20 * KIB) == pattern(20 * KIB, number)
    check_heap(heap)
    check_arena(arena, [heap])


def test_the_answer_counts_free_blocks_of_slabs_too(heap: Heap) -> None:
    """A free block of 5 KiB beside the one page that stays committed."""
    first, _ = heap.alloc(5000, SESSION), heap.alloc(5000, SESSION)
    finish(heap.compact())
    heap.free(first.address, first.generation)
    assert finish(heap.compact()) == first.extent


def test_a_full_heap_has_nothing_to_give(make_heap: MakeHeap) -> None:
    """Zero: no free extent at all."""
    heap = make_heap(maximum=64 * KIB)
    heap.alloc(64 * KIB, SESSION)
    assert finish(heap.compact()) == 0


def test_it_pauses_between_slices_of_16_mib(make_heap: MakeHeap, arena: Arena) -> None:
    """The loop must not stall; a heap may change or go meanwhile."""
    heap = make_heap(maximum=120 * MIB, initial=100 * MIB)
    heap.space.initial = 0
    job = heap.compact()
    sizes = [arena.segment.allocated_bytes]
    pauses = 0
    for _ in job:
        pauses += 1
        sizes.append(arena.segment.allocated_bytes)
    assert pauses >= 6
    assert max(before - after for before, after in itertools.pairwise(sizes)) <= 16 * MIB
    check_heap(heap)


def test_blocks_that_come_and_go_between_slices_are_safe(make_heap: MakeHeap, arena: Arena) -> None:
    """A page taken meanwhile is not decommitted under its block."""
    random_ = random.Random(2)
    heap = make_heap(maximum=100 * MIB, initial=90 * MIB)
    heap.space.initial = 0
    live: list[Grant] = []
    job = heap.compact()
    for _ in job:
        for size in (10, 5000, 8 * MIB, 70_000):
            grant = heap.alloc(size, SESSION)
            fill(arena, grant.address, size, size)
            live.append(grant)
        if random_.random() < 0.5:
            gone = live.pop(random_.randrange(len(live)))
            heap.free(gone.address, gone.generation)
    for grant in live:
        word = arena.words[grant.slot]
        size = arena.shape.word_format(grant.slot).size(word)
        assert read(arena, grant.address, size) == pattern(size, size)
    check_heap(heap)
    check_arena(arena, [heap])


def test_a_heap_closed_between_two_slices_is_let_alone(make_heap: MakeHeap, arena: Arena) -> None:
    """Its pages may be another heap's by now."""
    heap = make_heap(maximum=100 * MIB, initial=90 * MIB)
    heap.space.initial = 0
    job = heap.compact()
    next(job)
    heap.close()
    arena.settle_all()
    other = make_heap(maximum=100 * MIB)
    grant = other.alloc(50_000, SESSION)
    fill(arena, grant.address, 50_000, 4)
    finish(job)
    assert read(arena, grant.address, 50_000) == pattern(50_000, 4)
    check_heap(other)
    check_arena(arena, [other])


@pytest.mark.parametrize("maximum", [0, 600 * MIB])
def test_half_a_gibibyte_that_was_touched_and_freed_is_given_back(maximum: int) -> None:
    """Alloc 512 MiB in blocks, touch every page, free, compact: under 1 MiB of the heap is left in st_blocks."""
    with private_arena(reserve=1024 * MIB, commit_limit=700 * MIB) as arena:
        arena.prepare_control(0)
        heap = Heap(arena, 0, maximum=maximum)
        grants = [heap.alloc(size, SESSION) for size in [8 * MIB] * 48 + [64 * KIB] * 1024 + [4000] * 15_000]
        assert sum(grant.extent for grant in grants) >= 500 * MIB
        for grant in grants:
            for page in range(grant.address, grant.address + grant.extent, PAGE_SIZE):
                arena.segment.buffer[page] = 1
        tables = arena.committed_in(0, arena.shape.first_page) * PAGE_SIZE
        assert arena.segment.allocated_bytes - tables >= 500 * MIB
        for grant in grants:
            heap.free(grant.address, grant.generation)
        finish(heap.compact())
        assert arena.segment.allocated_bytes - tables < MIB
        check_heap(heap)
        check_arena(arena, [heap])
