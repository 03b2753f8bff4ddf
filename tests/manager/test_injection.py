"""Memory that runs out at any moment of any request: each commit of each operation fails in turn, once and for good.

The request is answered with HeapFullError, and leaves heaps, blocks, names, sessions, page map and budget as they were;
or, like a lease that becomes shorter, it does with less. Done again when there is memory, it succeeds. Every operation
of the protocol is here: either with what it commits, or among those that need no memory at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from heapd.layout import CHUNK_PAGES, F_PERSISTENT, F_SERIALIZE
from heapd.manager import HeapManager
from heapd.records import Grant, HeapInfo
from heapd.units import MIB, PAGE_SIZE
from heapd.wire import OPS
from heapd.wire import messages as m
from tests.arenas import Commits, fail_each_commit, finish, private_arena
from tests.invariants import check_manager, fill, pattern, picture, read
from tests.manager.clients import Client

CHUNK = CHUNK_PAGES * PAGE_SIZE
_FILLED = 10_000  # bytes of a block that are looked at


@dataclass
class Stage:
    """A manager with two clients, a shared heap of each kind, and blocks in both, each filled with a pattern."""

    manager: HeapManager
    client: Client
    other: Client
    growing: HeapInfo
    fixed: HeapInfo
    blocks: list[tuple[HeapInfo, Grant, int]] = field(default_factory=list)

    def alloc(self, heap: HeapInfo, size: int) -> Grant:
        grant = self.client.alloc(heap, size)
        fill(self.manager.arena, grant.address, min(size, _FILLED), len(self.blocks))
        self.blocks.append((heap, grant, size))
        return grant

    def largest(self, heap: HeapInfo) -> Grant:
        return next(grant for its_heap, grant, _ in reversed(self.blocks) if its_heap is heap)

    def publish_and_unpublish(self) -> None:
        self.client.publish(self.growing, "name", self.blocks[0][1])
        self.client.unpublish(self.growing, "name")

    def check(self) -> None:
        """Invariants, and the first bytes of every block."""
        check_manager(self.manager)
        for number, (_, grant, size) in enumerate(self.blocks):
            kept = min(size, _FILLED)
            assert read(self.manager.arena, grant.address, kept) == pattern(kept, number)


@contextmanager
def stage() -> Iterator[Stage]:
    """All heaps' first chunks are split already, so that what a request itself commits is what fails."""
    with private_arena() as arena:
        manager = HeapManager(arena)
        client, other = Client(manager), Client(manager)
        growing, fixed = client.create("growing"), client.create("fixed", maximum=64 * MIB)
        it = Stage(manager, client, other, growing, fixed)
        for size in (64, 5000, 100_000, 2 * MIB):
            it.alloc(growing, size)
            it.alloc(fixed, size)
        other.open("growing")
        yield it


@contextmanager
def stage_full_of_controls() -> Iterator[Stage]:
    """The next heap needs another page of control blocks."""
    with stage() as it:
        for _ in range(13):
            it.other.create()
        assert len(it.manager.heaps) % (PAGE_SIZE // 256) == 15
        it.other.create()
        yield it


BLOCKS: dict[str, Callable[[Stage, HeapInfo], object]] = {
    "heap.alloc slab": lambda it, heap: it.client.alloc(heap, 700),
    "heap.alloc run": lambda it, heap: it.client.alloc(heap, 200_000),
    "heap.alloc large": lambda it, heap: it.client.alloc(heap, 3 * MIB),
    "heap.alloc in slices": lambda it, heap: it.client.alloc(heap, 20 * MIB),
    "heap.alloc_many": lambda it, heap: it.client.alloc_many(heap, [16, 900, 70_000, 3000, 8192]),
    "heap.alloc_many in slices": lambda it, heap: it.client.alloc_many(heap, [2 * MIB, 2 * MIB, 700, 2 * MIB]),
    "heap.alloc_many of jobs": lambda it, heap: it.client.alloc_many(heap, [17 * MIB, 300, 17 * MIB]),
    "heap.lease": lambda it, heap: it.client.lease(heap, 700, 40),
    "heap.lease others": lambda it, heap: it.client.ask(m.HeapLease(heap.heap_id, 700, 3, [16, 20_000, 300_000])),
    "heap.resize": lambda it, heap: it.client.resize(heap, it.largest(heap), 7 * MIB),
}  # fmt: skip
HEAPS: dict[str, Callable[[Stage], object]] = {
    "heap.create": lambda it: it.client.create("new", initial=300_000),
    "heap.create fixed": lambda it: it.client.create(maximum=3 * CHUNK, initial=CHUNK + 1),
    "heap.create persistent": lambda it: it.client.create("new", flags=F_SERIALIZE | F_PERSISTENT),
    "heap.default": lambda it: it.client.default(reserve=3 * MIB, commit=MIB),
}
# No commit at all: these succeed where there is no memory whatever.
MODEST: dict[str, Callable[[Stage], object]] = {
    "session.close": lambda it: it.client.end(),
    "session.list": lambda it: it.client.sessions(),
    "arena.statistics": lambda it: it.client.ask(m.ArenaStatisticsGet()),
    "arena.reclaim": lambda it: it.client.ask(m.ArenaReclaim()),
    "heap.open": lambda it: it.other.open("fixed"),
    "heap.open_id": lambda it: it.other.open_id(it.fixed.heap_id),
    "heap.close": lambda it: it.client.close(it.fixed),
    "heap.destroy": lambda it: it.client.destroy(it.growing),
    "heap.list": lambda it: it.client.heaps(),
    "heap.free": lambda it: it.client.free(*it.blocks[-1][:2]),
    "heap.free_many": lambda it: it.client.free_many(it.growing, [g for h, g, _ in it.blocks if h is it.growing]),
    "heap.give_back": lambda it: it.client.ask(m.HeapGiveBack(it.growing.heap_id, [], 1)),
    "heap.walk": lambda it: it.client.walk(it.growing),
    "heap.validate": lambda it: it.client.validate(it.growing),
    "heap.compact": lambda it: it.client.ask(m.HeapCompact(it.growing.heap_id)),
    "heap.statistics": lambda it: it.client.statistics(it.growing),
    "name.publish": lambda it: it.client.publish(it.growing, "name", it.blocks[0][1]),
    "name.lookup": lambda it: it.client.wait(it.growing, "name"),
    "name.unpublish": Stage.publish_and_unpublish,
    "name.list": lambda it: it.client.names(it.growing),
}  # fmt: skip


def test_every_operation_is_here() -> None:
    """An operation that is added must say what becomes of it where memory is short."""
    named = {case.split()[0] for case in (*BLOCKS, *HEAPS, *MODEST)}
    assert named == {kind.name for kind in OPS.values()}


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_without_memory(commits: Commits, case: str, kind: str) -> None:
    """All of the request or nothing of it, for each commit on the way."""
    fail_each_commit(
        commits,
        stage,
        lambda it: BLOCKS[case](it, getattr(it, kind)),
        lambda it: picture(it.manager) if "lease" not in case else None,
        Stage.check,
    )


@pytest.mark.parametrize("make", [stage, stage_full_of_controls])
@pytest.mark.parametrize("case", HEAPS)
def test_heaps_without_memory(commits: Commits, case: str, make: Callable[[], Iterator[Stage]]) -> None:
    """No name, no control block and no region is left of a heap that could not be made."""
    failed = fail_each_commit(commits, make, HEAPS[case], lambda it: picture(it.manager), Stage.check)
    assert failed >= (4 if make is stage_full_of_controls else 2)


@pytest.mark.parametrize("case", MODEST)
def test_what_needs_no_memory(commits: Commits, case: str) -> None:
    """It is done where every commit fails; so nobody is kept from giving back what he has."""
    with stage() as it:
        commits.fail(1, persistent=True)
        MODEST[case](it)
        assert commits.calls == 0
        commits.work()
        check_manager(it.manager)
        for session in list(it.manager.sessions):
            finish(it.manager.end_session(session))
        check_manager(it.manager)


def test_a_session_that_ends_during_a_job_that_fails_leaves_nothing(commits: Commits) -> None:
    """Whichever comes first, the end or the failing commit."""
    for nth in range(1, 8):
        with stage() as it:
            committed = it.manager.arena.budget.committed
            task = it.other.begin(m.HeapAllocMany(it.growing.heap_id, [20 * MIB, 20 * MIB]))
            commits.fail(nth, persistent=True)
            end = it.manager.end_session(it.other.session)
            while not task.step():
                next(end, None)
            finish(end)
            commits.work()
            it.check()
            assert it.client.statistics(it.growing).busy_blocks == 4
            it.client.ask(m.ArenaReclaim())
            assert it.manager.arena.budget.committed <= committed + 16 * PAGE_SIZE
