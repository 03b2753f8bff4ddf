"""Memory that runs out at any moment: each commit of each operation fails in turn, once and for good.

The operation raises HeapFullError, leaves every block, region and counter as it was, and succeeds when done again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import pytest

from heapd.arena import Arena
from heapd.errors import HeapFullError
from heapd.heap import SLICE_BYTES, Heap
from heapd.layout import CHUNK_PAGES
from heapd.records import Grant
from heapd.units import KIB, MIB, PAGE_SHIFT, PAGE_SIZE
from tests.arenas import Commits, fail_each_commit, finish, private_arena
from tests.invariants import check_arena, check_heap, fill, heap_picture, pattern, read

SESSION = 7
CHUNK = CHUNK_PAGES * PAGE_SIZE


@dataclass
class Stage:
    """A heap with some blocks in it, each filled with a pattern of its own."""

    arena: Arena
    heap: Heap
    blocks: list[tuple[Grant, int]] = field(default_factory=list)

    def alloc(self, size: int) -> Grant:
        grant = (
            finish(self.heap.alloc_in_slices(size, SESSION)) if size > SLICE_BYTES else self.heap.alloc(size, SESSION)
        )
        assert isinstance(grant, Grant)
        fill(self.arena, grant.address, size, len(self.blocks))
        self.blocks.append((grant, size))
        return grant

    def resize(self, number: int, size: int) -> None:
        grant, _ = self.blocks[number]
        self.heap.resize(grant.address, grant.generation, size, in_place_only=True)

    def check(self) -> None:
        """Invariants, and every byte of every block."""
        check_heap(self.heap)
        self.arena.settle_all()
        check_arena(self.arena, [self.heap])
        for number, (grant, size) in enumerate(self.blocks):
            kept = min(size, grant.extent, 10_000)
            assert read(self.arena, grant.address, kept) == pattern(size, number)[:kept]


StageOf = Callable[[], AbstractContextManager[Stage]]


def staged(*sizes: int, maximum: int = 0, freed: tuple[int, ...] = ()) -> StageOf:
    """Makes a heap with blocks of these sizes, of which those at the places in `freed` are freed again."""

    @contextmanager
    def stage() -> Iterator[Stage]:
        with private_arena() as arena:
            arena.prepare_control(0)
            it = Stage(arena, Heap(arena, 0, maximum=maximum))
            for size in sizes:
                it.alloc(size)
            for number in freed:
                grant, _ = it.blocks[number]
                it.heap.free(grant.address, grant.generation)
            it.blocks = [block for number, block in enumerate(it.blocks) if number not in freed]
            for number, (grant, size) in enumerate(it.blocks):
                fill(arena, grant.address, size, number)
            yield it

    return stage


CASES: dict[str, tuple[StageOf, Callable[[Stage], object]]] = {
    "slab, a new one": (staged(4096), lambda it: it.alloc(64)),
    "slab, the next page": (staged(*[1000] * 3), lambda it: it.alloc(1000)),
    "slab, in a new region": (staged(60 * KIB), lambda it: it.alloc(1500)),
    "slab, across chunks": (staged(CHUNK - 8 * KIB, maximum=3 * CHUNK), lambda it: it.alloc(10_000)),
    "run": (staged(100), lambda it: it.alloc(8 * KIB)),
    "run, in a new region": (staged(60 * KIB), lambda it: it.alloc(200 * KIB)),
    "run, partly committed": (staged(*[20 * KIB] * 4, maximum=128 * KIB, freed=(2, 3)), lambda it: it.alloc(80 * KIB)),
    "run, across chunks": (staged(CHUNK - 8 * KIB, maximum=3 * CHUNK), lambda it: it.alloc(20 * KIB)),
    "run, over several chunks": (staged(100, maximum=4 * CHUNK), lambda it: it.alloc(3 * CHUNK)),
    "big run": (staged(100), lambda it: it.alloc(MIB)),
    "big run, over several chunks": (staged(100), lambda it: it.alloc(3 * CHUNK + 5)),
    "in slices": (staged(100), lambda it: it.alloc(SLICE_BYTES + 3 * CHUNK + 1)),
    "in slices, fixed heap": (staged(100, maximum=64 * MIB), lambda it: it.alloc(SLICE_BYTES + 3 * CHUNK + 1)),
    "grow a run": (staged(100_000, maximum=MIB), lambda it: it.resize(0, 200_000)),
    "grow a run across chunks": (staged(CHUNK - 8 * KIB, maximum=3 * CHUNK), lambda it: it.resize(0, CHUNK + 9000)),
    "grow a big run": (staged(MIB + 1), lambda it: it.resize(0, 5 * MIB)),
    "grow a big run within its granule": (staged(MIB + 1), lambda it: it.resize(0, MIB + 40 * KIB)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_commit_that_fails_leaves_everything_as_it_was(commits: Commits, case: str) -> None:
    """The 1st, 2nd, 3rd, ... commit of the operation, until none fails."""
    stage, operate = CASES[case]
    failed = fail_each_commit(commits, stage, operate, lambda it: heap_picture(it.heap), Stage.check)
    assert failed >= 2


@pytest.mark.parametrize("maximum", [0, 100_000, 8 * MIB])
def test_a_heap_that_cannot_be_made_leaves_no_region(commits: Commits, maximum: int) -> None:
    """Its address space and its commit are given back, and the same call succeeds when there is memory."""

    def make(arena: Arena) -> None:
        heaps.append(Heap(arena, 0, initial=70_000, maximum=maximum))

    heaps: list[Heap] = []

    @contextmanager
    def stage() -> Iterator[Arena]:
        heaps.clear()
        with private_arena() as arena:
            arena.prepare_control(0)
            yield arena

    def check(arena: Arena) -> None:
        arena.settle_all()
        check_arena(arena, heaps)

    fail_each_commit(commits, stage, make, lambda arena: arena.reserved, check)


def test_shrinking_that_fails_leaves_the_block_as_it_was(commits: Commits) -> None:
    """Where a chunk of the page map must be split for it, and cannot be."""
    fail_each_commit(
        commits,
        staged(4 * CHUNK),
        lambda it: it.resize(0, CHUNK + 64 * KIB),
        lambda it: heap_picture(it.heap),
        Stage.check,
    )


def test_the_error_says_that_the_machine_is_short_of_memory(commits: Commits) -> None:
    """ENOSPC from the system is the bound "memory", with advice, and never an OSError."""
    with private_arena() as arena:
        heap = Heap(arena, 0)
        block = heap.alloc(3 * MIB, SESSION)
        heap.free(block.address, block.generation)
        commits.fail(1, persistent=True)
        with pytest.raises(HeapFullError) as refused:
            heap.alloc(3 * MIB, SESSION)
        assert refused.value.bound == "memory"
        assert refused.value.requested == 3 * MIB
        assert "free blocks" in str(refused.value)


def test_failures_do_not_make_the_next_regions_larger(commits: Commits) -> None:
    """A heap that could not grow a hundred times grows by the same step when it can."""
    with private_arena() as arena:
        arena.prepare_control(0)
        heap = Heap(arena, 0)
        heap.alloc(60 * KIB, SESSION)
        for _ in range(20):
            commits.fail(1, persistent=True)
            with pytest.raises(HeapFullError):
                heap.alloc(60 * KIB, SESSION)
        commits.work()
        before = heap.space.reserved
        heap.alloc(60 * KIB, SESSION)
        assert (heap.space.reserved - before) << PAGE_SHIFT == MIB
