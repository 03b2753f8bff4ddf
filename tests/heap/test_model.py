"""Random operations on one heap against a dict of bytes: after each, every invariant; at the end, every byte.

A failure prints the seed and the operations that led to it, shortest last.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from heapd.arena import Arena
from heapd.errors import BlockTooLargeError, CannotResizeInPlaceError, HeapFullError
from heapd.heap import SLICE_BYTES, Heap
from heapd.records import Grant
from heapd.units import KIB, MIB
from tests.arenas import finish
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap, fill, pattern, read

SESSION = 7
FULL = (HeapFullError, BlockTooLargeError)


@dataclass
class Model:
    """What the heap should hold: blocks by address, each filled with the pattern of its seed."""

    arena: Arena
    heap: Heap
    seed: int
    largest: int
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.blocks: dict[int, tuple[Grant, int, int]] = {}  # address -> (grant, size, seed of its pattern)
        self.leased: dict[int, Grant] = {}
        self.patterns = 0

    # -- operations ----------------------------------------------------------------------------------------------------
    def size(self) -> int:
        """Log-uniform: small ones are common, and each power of two as likely as the next."""
        return int(self.largest ** self.random.random()) - 1

    def pick(self) -> tuple[Grant, int, int]:
        return self.blocks[self.random.choice(sorted(self.blocks))]

    def alloc(self) -> None:
        size = self.size()
        self.log.append(f"alloc({size})")
        try:
            if size > SLICE_BYTES:
                grant: Grant = finish(self.heap.alloc_in_slices(size, SESSION))
            else:
                grant = self.heap.alloc(size, SESSION)
        except FULL:
            self.log[-1] += " -> full"
            return
        self.log[-1] += f" -> {grant.address:#x}"
        assert grant.extent >= size
        self.check_apart(grant)
        if grant.fresh:
            assert not any(read(self.arena, grant.address, grant.extent))
        self.keep(grant, size)

    def keep(self, grant: Grant, size: int) -> None:
        self.patterns += 1
        fill(self.arena, grant.address, size, self.patterns)
        self.blocks[grant.address] = grant, size, self.patterns

    def check_apart(self, grant: Grant) -> None:
        """The new block overlaps none that is out."""
        for other in (*(block[0] for block in self.blocks.values()), *self.leased.values()):
            assert grant.address + grant.extent <= other.address or other.address + other.extent <= grant.address

    def free(self) -> None:
        grant, size, seed = self.pick()
        self.log.append(f"free({grant.address:#x})")
        assert read(self.arena, grant.address, size) == pattern(size, seed)
        self.heap.free(grant.address, grant.generation)
        del self.blocks[grant.address]

    def resize(self) -> None:
        grant, size, seed = self.pick()
        wanted = self.random.choice([self.size(), max(0, size - self.size() % 5000), size + self.size() % 5000])
        in_place_only = self.random.random() < 0.7
        self.log.append(f"resize({grant.address:#x}, {size} -> {wanted}, {in_place_only})")
        try:
            after = self.heap.resize(grant.address, grant.generation, wanted, in_place_only=in_place_only)
        except (*FULL, CannotResizeInPlaceError) as error:
            self.log[-1] += f" -> {type(error).__name__}"
            return
        kept = min(size, wanted)
        assert read(self.arena, grant.address, kept) == pattern(size, seed)[:kept]
        self.keep(after, wanted)

    def lease(self) -> None:
        size, count = self.size() % 20_000, self.random.randrange(1, 9)
        self.log.append(f"lease({size}, {count})")
        try:
            grants = self.heap.lease(size, count, SESSION)
        except FULL:
            return
        for grant in grants:
            self.check_apart(grant)
            self.leased[grant.address] = grant

    def give_back(self) -> None:
        if self.leased:
            address = self.random.choice(sorted(self.leased))
            self.log.append(f"give_back({address:#x})")
            assert self.heap.give_back(address, SESSION)
            del self.leased[address]

    def compact(self) -> None:
        self.log.append("compact()")
        finish(self.heap.compact())

    # -- the run -------------------------------------------------------------------------------------------------------
    def step(self) -> None:
        operations: list[tuple[Callable[[], None], int]] = [(self.alloc, 10), (self.lease, 1), (self.give_back, 3)]
        operations += [(self.compact, 1)]
        if self.blocks:
            shrinking = self.random.random() < 0.3 or len(self.blocks) > 80
            operations += [(self.free, 14 if shrinking else 6), (self.resize, 5)]
        kinds, weights = zip(*operations, strict=True)
        self.random.choices(kinds, weights)[0]()

    def check(self) -> None:
        found = check_heap(self.heap)
        assert found.busy == sum(size for _, size, _ in self.blocks.values())
        assert (found.busy_blocks, found.cached_blocks) == (len(self.blocks), len(self.leased))
        self.arena.settle_all()
        check_arena(self.arena, [self.heap])

    def check_bytes(self) -> None:
        for grant, size, seed in self.blocks.values():
            assert read(self.arena, grant.address, size) == pattern(size, seed), f"the block at {grant.address:#x}"

    def run(self, steps: int) -> None:
        """`steps` random operations; then everything is freed, and the heap is as it was made."""
        try:
            for number in range(steps):
                self.step()
                self.check()
                if number % 20 == 0:
                    self.check_bytes()
            self.check_bytes()
            while self.blocks:
                self.free()
            while self.leased:
                self.give_back()
            self.check()
            assert check_heap(self.heap).regions == 1
        except Exception as error:
            lines = "\n  ".join(self.log[-60:])
            pytest.fail(f"seed {self.seed}, after {len(self.log)} operations: {error!r}\n  {lines}")


@pytest.mark.parametrize("seed", range(6))
def test_a_growable_heap_holds_what_was_put_into_it(make_heap: MakeHeap, arena: Arena, seed: int) -> None:
    """Sizes of 0 to 3 MiB: slabs, runs, and large runs with regions of their own."""
    Model(arena, make_heap(), seed, largest=3 * MIB).run(220)


@pytest.mark.parametrize("seed", range(6, 12))
def test_a_small_fixed_heap_that_is_often_full_holds_it_too(make_heap: MakeHeap, arena: Arena, seed: int) -> None:
    """512 KiB: every second alloc is refused, and nothing is lost."""
    Model(arena, make_heap(maximum=512 * KIB), seed, largest=200 * KIB).run(300)


@pytest.mark.parametrize("seed", range(18, 22))
def test_a_heap_smaller_than_a_slab_holds_it_too(make_heap: MakeHeap, arena: Arena, seed: int) -> None:
    """64 KiB: slabs are short, and are cut where others need the pages."""
    Model(arena, make_heap(maximum=64 * KIB), seed, largest=10 * KIB).run(300)


@pytest.mark.parametrize("seed", range(12, 16))
def test_a_heap_at_the_commit_limit_holds_it_too(make_heap: MakeHeap, arena: Arena, seed: int) -> None:
    """The daemon's limit is met again and again, by tables as well as by blocks."""
    arena.budget.limit = MIB
    Model(arena, make_heap(), seed, largest=300 * KIB).run(250)


@pytest.mark.parametrize("seed", range(16, 18))
def test_blocks_that_are_committed_in_slices_are_blocks_like_others(
    make_heap: MakeHeap, arena: Arena, seed: int
) -> None:
    """Sizes up to 60 MiB in 200 MiB, in a growable and in a fixed heap."""
    Model(arena, make_heap(maximum=0 if seed % 2 else 150 * MIB), seed, largest=60 * MIB).run(40)
