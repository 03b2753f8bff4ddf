"""A block over 16 MiB is committed in slices: between two of them anything may happen to the heap."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import pytest

from heapd.arena import Arena
from heapd.errors import HeapDestroyedError, HeapFullError, NotABlockError
from heapd.heap import SLICE_BYTES, Heap, collect_statistics, validate_heap
from heapd.records import EntryKind, Grant
from heapd.units import GIB, MIB, PAGE_SIZE
from tests.arenas import finish
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap, check_sums, everyone, fill, pattern, read, walk_all

SESSION = 7
SIZE = 3 * SLICE_BYTES + 100_000


@pytest.fixture(params=[0, 150 * MIB], ids=["growable", "fixed"])
def heap(request: pytest.FixtureRequest, make_heap: MakeHeap) -> Heap:
    """Both kinds: a large block has a region of its own, or lies among the others."""
    return make_heap(maximum=request.param)


def begin(heap: Heap, slices: int = 1) -> Generator[None, None, Grant]:
    """A large alloc that has committed so many slices."""
    job = heap.alloc_in_slices(SIZE, SESSION)
    for _ in range(slices):
        next(job)
    return job


def check_all(heap: Heap) -> None:
    check_heap(heap)
    heap.arena.settle_all()
    check_arena(heap.arena, [heap])


def test_it_pauses_after_each_16_mib(heap: Heap, arena: Arena) -> None:
    """So that nobody waits longer than a slice takes."""
    sizes: list[int] = []
    grant = finish(heap.alloc_in_slices(SIZE, SESSION), lambda: sizes.append(arena.segment.allocated_bytes))
    assert len(sizes) == 4
    assert max(after - before for before, after in itertools.pairwise(sizes)) <= SLICE_BYTES + 64 * PAGE_SIZE
    assert grant.fresh == (heap.maximum == 0)  # else the page that a heap commits when it is made is among its pages
    assert grant.extent >= SIZE
    fill(arena, grant.address, SIZE, 1)
    assert read(arena, grant.address, SIZE) == pattern(SIZE, 1)
    check_all(heap)


def test_the_block_is_told_as_busy_from_the_first_slice_on(heap: Heap) -> None:
    """Its address space is taken: nobody else is given it."""
    job = begin(heap)
    [entry] = [entry for entry in walk_all(heap) if entry.kind is EntryKind.BUSY]
    assert (entry.size, entry.session) == (SIZE, SESSION)
    other = heap.alloc(50_000, SESSION)
    grant = finish(job)
    assert grant.address == entry.address
    assert not grant.address <= other.address < grant.address + grant.extent
    check_all(heap)


def test_validate_and_statistics_are_sound_between_slices(heap: Heap) -> None:
    """Uncommitted pages of it are counted as such, and touched by nobody."""
    job = begin(heap, 2)
    before = heap.arena.segment.allocated_bytes
    assert finish(validate_heap(heap, everyone)) == []
    check_sums(finish(collect_statistics(heap, everyone)))
    assert heap.arena.segment.allocated_bytes == before
    finish(job)
    check_all(heap)


def test_two_at_once_get_a_place_each(heap: Heap) -> None:
    """Slice by slice in turn."""
    one, other = begin(heap), begin(heap)
    grants = []
    for job in (one, other):
        next(job)
    grants = [finish(one), finish(other)]
    low, high = sorted(grant.address for grant in grants)
    assert low + SIZE <= high
    check_all(heap)


def test_memory_that_runs_out_in_the_middle_gives_every_slice_back(heap: Heap, arena: Arena) -> None:
    """HeapFullError, and the heap is as it was."""
    heap.alloc(100, SESSION)
    before = heap.space.committed, heap.space.reserved
    arena.budget.limit = arena.budget.committed + 2 * SLICE_BYTES
    with pytest.raises(HeapFullError):
        finish(heap.alloc_in_slices(SIZE, SESSION))
    assert (heap.space.committed, heap.space.reserved) == before
    check_all(heap)
    arena.budget.limit = 200 * MIB
    finish(heap.alloc_in_slices(SIZE, SESSION))
    check_all(heap)


def test_two_that_do_not_fit_together_fail_or_succeed_each_as_a_whole(heap: Heap, arena: Arena) -> None:
    """The limit is reached while both are half committed: at most one gets its block, and nothing is lost."""
    arena.budget.limit = arena.budget.committed + SIZE + SLICE_BYTES
    jobs = [begin(heap, 0), begin(heap, 0)]
    grants = []
    while jobs:
        for job in list(jobs):
            try:
                next(job)
            except StopIteration as end:
                grants.append(end.value)
                jobs.remove(job)
            except HeapFullError:
                jobs.remove(job)
    assert len(grants) <= 1
    assert check_heap(heap).busy_blocks == len(grants)
    check_all(heap)


def test_a_heap_closed_in_the_middle_ends_it_and_keeps_nothing(heap: Heap, arena: Arena, make_heap: MakeHeap) -> None:
    """HeapDestroyedError; the address space, another heap's by then, is not touched."""
    job = begin(heap, 2)
    heap.close()
    arena.settle_all()
    other = make_heap(maximum=100 * MIB)
    grant = other.alloc(MIB, SESSION)
    fill(arena, grant.address, MIB, 5)
    with pytest.raises(HeapDestroyedError):
        finish(job)
    assert read(arena, grant.address, MIB) == pattern(MIB, 5)
    check_all(other)


@pytest.mark.parametrize("how", ["free", "shrink", "grow", "give back"])
def test_a_block_that_is_not_given_out_yet_is_nobody_s_to_change(heap: Heap, how: str) -> None:
    """A walk tells of it, but no free, resize or reap reaches it before its job has ended."""
    job = begin(heap, 2)
    [entry] = [entry for entry in walk_all(heap) if entry.kind is EntryKind.BUSY]
    address, generation = entry.address, entry.generation
    attempts = {
        "free": lambda: heap.free(address, generation),
        "give back": lambda: heap.take_back(*heap.locate(address)),
        "shrink": lambda: heap.resize(address, generation, 5000, in_place_only=True),
        "grow": lambda: heap.resize(address, generation, SIZE + MIB, in_place_only=True),
    }
    with pytest.raises(NotABlockError):
        attempts[how]()
    assert list(heap.lent_slots()) == []
    other = heap.alloc(20 * MIB, SESSION)
    fill(heap.arena, other.address, 20 * MIB, 6)
    grant = finish(job)
    assert grant.address + grant.extent <= other.address or other.address + other.extent <= grant.address
    assert read(heap.arena, other.address, 20 * MIB) == pattern(20 * MIB, 6)
    check_all(heap)


def test_a_job_that_nobody_goes_on_with_leaves_a_sound_heap(heap: Heap) -> None:
    """Dropped between two slices: the block is given back, for nobody was ever told of it."""
    job = begin(heap, 2)
    job.close()
    assert check_heap(heap).busy_blocks == 0
    check_all(heap)


def test_more_than_the_reserve_is_refused_at_once(make_heap: MakeHeap, arena: Arena) -> None:
    """Before the first slice is committed."""
    arena.budget.limit = GIB
    heap = make_heap()
    before = arena.segment.allocated_bytes
    finish(heap.alloc_in_slices(150 * MIB, SESSION))
    job = heap.alloc_in_slices(150 * MIB, SESSION)
    with pytest.raises(HeapFullError) as refused:
        next(job)
    assert refused.value.bound == "reserve"
    assert arena.segment.allocated_bytes - before <= 151 * MIB
    check_all(heap)
