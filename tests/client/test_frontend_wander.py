"""Blocks that wander: allocated by one process, freed by another; never lost, never given out twice, and what was freed
never comes back to life under an old name."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

import heapd_client as hc
from heapd.records import EntryKind
from heapd.units import KIB, MIB
from heapd_client import errors
from tests.client.programs import in_child, wait_for
from tests.client.tools import blocks_of, cached_by, check_empty, fork
from tests.harness import wait_until

TOLD = (errors.DoubleFreeError, errors.StaleHandleError, errors.ClosedError)
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


# -- by the thousand ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [24, 64, 3000, 4096, 70_000])
def test_blocks_wander_one_way_without_growth(
    session: hc.Session, other: hc.Session, shared: hc.Heap, theirs: hc.Heap, size: int
) -> None:
    """Thousands from A to B: what B caches of them is bounded, not a part of what passed; A leases an eighth ahead."""
    rounds = 4_000 if size < 4096 else 800
    seen = []
    for number in range(rounds):
        other.open(shared.alloc(size).handle).free()
        if number in (rounds // 4 - 1, rounds - 1):
            theirs.statistics()  # what they gave back without waiting is given back by now
            seen.append((cached_by(shared, session), cached_by(shared, other)))
    kept = 64 * MIB if size > 65_536 else max(1 * MIB, session.statistics().committed // 32) * 9 // 8
    limit = kept // size + 64
    assert all(b <= limit and a <= limit + rounds // 8 for a, b in seen), seen
    theirs.trim()
    check_empty(shared)


@pytest.mark.parametrize(("size", "turns"), [(64, 3_000), (4096, 1_500), (70_000, 1_500)])
def test_blocks_wander_both_ways_without_growth(
    session: hc.Session, other: hc.Session, shared: hc.Heap, theirs: hc.Heap, size: int, turns: int
) -> None:
    """In balance each side lives on what the other sends: after a while hardly a block is asked for."""
    for turn in range(turns):
        ours_out, theirs_out = shared.alloc(size).handle, theirs.alloc(size).handle
        other.open(ours_out).free()
        session.open(theirs_out).free()
        if turn == 500:
            theirs.statistics()
            early = cached_by(shared, session) + cached_by(shared, other)
    theirs.statistics()
    assert cached_by(shared, session) + cached_by(shared, other) <= early + 64
    theirs.trim()
    check_empty(shared)


def _exchange(heap: hc.Heap, mine: Connection, tag: int, count: int) -> None:
    """Send blocks with unique contents, free what comes; half of them after a while."""
    session, kept = heap.session, []
    for number in range(count):
        block = heap.alloc(64 if number % 3 else 200)
        block.view[:16] = (tag << 64 | number).to_bytes(16, "little")
        mine.send_bytes(block.handle.encode())
        got = session.open(mine.recv_bytes())
        assert int.from_bytes(got.view[:16], "little") == (tag ^ 1) << 64 | number, "somebody else's bytes"
        kept.append(got)
        if number % 2:
            kept.pop(number * 7919 % len(kept)).free()
    for block in kept:
        block.free()


def test_processes_exchange_thousands_of_blocks(session: hc.Session, shared: hc.Heap) -> None:
    """Both ways at once between two processes; a third one sees no block lost or shared."""
    here, there = multiprocessing.Pipe()
    pids = [
        fork(lambda: _exchange(shared, here, 0, 2_500)),
        fork(lambda: _exchange(shared, there, 1, 2_500)),
    ]
    looks = 0
    while not all(_has_ended(pid) for pid in pids):
        busy = blocks_of(shared, EntryKind.BUSY)
        assert len({entry.address for entry in busy}) == len(busy)
        assert shared.validate() == []
        looks += 1
    assert [wait_for(pid) for pid in pids] == [0, 0]
    assert looks > 3
    for end in (here, there):
        end.close()
    assert shared.statistics().busy_blocks == 0
    shared.trim()
    wait_until(lambda: shared.statistics().cached_blocks == 0)  # the dead processes' caches
    check_empty(shared)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# -- double free -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 10, 64, 4096, 70_000, 20 * MIB])
@pytest.mark.parametrize("is_reused", [False, True])
def test_a_second_free_in_one_process_is_told(session: hc.Session, shared: hc.Heap, size: int, is_reused: bool) -> None:
    """Through the same object, a second one by handle, a third; also when the memory is somebody's again."""
    block = shared.alloc(size)
    twins = [session.open(block.handle), session.open(block.handle)]
    [block, *twins][size % 3].free()
    again = [shared.alloc(size) for _ in range(3)] if is_reused else []
    for each in (block, *twins):
        with pytest.raises(TOLD):
            each.free()
    for each in again:
        each.free()
    check_empty(shared)


@pytest.mark.parametrize("is_reused", [False, True])
def test_a_second_free_by_another_process_is_told(
    session: hc.Session, other: hc.Session, shared: hc.Heap, theirs: hc.Heap, is_reused: bool
) -> None:
    """Whoever is first; the other one, and whoever opens the handle later, is told."""
    for turn in range(200):
        block = (shared if turn % 2 else theirs).alloc(64)
        handle = block.handle
        twin = (other if turn % 2 else session).open(handle)
        first, second = (block, twin) if turn % 3 else (twin, block)
        first.free()
        again = [shared.alloc(64), theirs.alloc(64)] if is_reused else []
        with pytest.raises(TOLD):
            second.free()
        with pytest.raises(errors.StaleHandleError):
            session.open(handle)
        for each in again:
            each.free()
    theirs.trim()
    check_empty(shared)


def test_of_many_threads_that_free_a_block_one_succeeds(session: hc.Session, shared: hc.Heap) -> None:
    """At the same instant, through one object or one each, with and without a view of it; never two, never none."""
    threads, rounds = 4, 150
    barrier = threading.Barrier(threads)
    turns: list[list[hc.Block]] = []
    for turn in range(rounds):
        block = shared.alloc(64)
        if turn % 2:
            block.view[0] = 1
        turns.append([block] * threads if turn % 3 else [session.open(block.handle) for _ in range(threads)])
    succeeded = [0] * rounds

    def work(me: int) -> None:
        for turn, blocks in enumerate(turns):
            barrier.wait(30)
            while True:
                try:
                    blocks[me].free()
                    succeeded[turn] += 1  # alone, so no other thread writes here
                except errors.BlockInUseError:
                    continue  # another thread is looking at the view
                except TOLD:
                    pass
                break

    workers = [threading.Thread(target=work, args=(me,)) for me in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert succeeded == [1] * rounds
    check_empty(shared)


@pytest.mark.parametrize(("size", "count"), [(64, 300), (4096, 200), (70_000, 200)])
def test_of_many_processes_that_free_a_block_one_succeeds(session: hc.Session, size: int, count: int) -> None:
    """In a serialized heap, at the same instant: always."""
    heap = session.create_heap("raced")
    processes = 3
    handles = [heap.alloc(size).handle for _ in range(count)]
    barrier = multiprocessing.Barrier(processes)
    board = heap.alloc(count * processes)
    board.view[:] = bytes(count * processes)

    def work(me: int) -> None:
        blocks = [session.open(handle) for handle in handles]
        view = board.view
        barrier.wait(30)
        for number, block in enumerate(blocks):
            try:
                block.free()
                view[number * processes + me] = 1
            except TOLD:
                pass

    pids = [fork(lambda me=me: work(me)) for me in range(processes)]  # type: ignore[misc]
    assert [wait_for(pid) for pid in pids] == [0] * processes
    marks = bytes(board.view)
    assert all(sum(marks[at : at + processes]) == 1 for at in range(0, len(marks), processes))
    board.free()
    heap.trim()
    wait_until(lambda: heap.statistics().cached_blocks == 0)
    check_empty(heap)


# -- stale references --------------------------------------------------------------------------------------------------
class _Fuzz:
    """Random calls on a few heaps' worth of blocks, with references kept in lists, closures and bound methods.

    `live` maps each allocated block's address to its tag; every reference that was freed must stay dead.
    """

    def __init__(self, heaps: list[hc.Heap], seed: int) -> None:
        self.heaps = heaps
        self.random = random.Random(seed)
        self.live: list[tuple[hc.Block, int]] = []
        self.dead: list[Callable[[], hc.Block]] = []
        self.dead_frees: list[Callable[[], None]] = []
        self.tags = 0

    def step(self) -> None:
        roll = self.random.random()
        if roll < 0.5 or not self.live:
            self.allocate()
        elif roll < 0.85:
            self.free(self.live.pop(self.random.randrange(len(self.live))))
        else:
            self.poke()

    def allocate(self) -> None:
        self.tags += 1
        block = self.random.choice(self.heaps).alloc(self.random.choice((16, 64, 64, 64, 200, 4096, 70_000)))
        block.view[:8] = self.tags.to_bytes(8, "little")
        self.live.append((block, self.tags))

    def free(self, pair: tuple[hc.Block, int]) -> None:
        block, tag = pair
        assert int.from_bytes(block.view[:8], "little") == tag, "somebody else's bytes"
        way = self.random.randrange(4)
        if way == 0:
            self.dead.append(lambda: block)
        elif way == 1:
            self.dead_frees.append(block.free)
        elif way == 2:
            heap = self.random.choice(self.heaps)
            twin = heap.session.open(block.handle)
            self.dead.append(lambda: twin)
            self.dead.append(lambda: block)
            (twin if self.random.random() < 0.5 else block).free()
            return
        block.free()

    def poke(self) -> None:
        if self.dead:
            block = self.random.choice(self.dead)()
            for use in (block.free, lambda: block.realloc(100), lambda: block.view):
                try:
                    use()
                except TOLD:
                    continue
                if use is block.free or block.is_free:
                    raise AssertionError(f"{block!r} came back to life")
        if self.dead_frees:
            with pytest.raises(TOLD):
                self.random.choice(self.dead_frees)()
        if len(self.dead) > 60:
            del self.dead[:30], self.dead_frees[:30]

    def finish(self) -> None:
        for pair in self.live:
            self.free(pair)
        self.live.clear()


@pytest.mark.parametrize("seed", range(3))
def test_what_was_freed_stays_dead(shared: hc.Heap, theirs: hc.Heap, seed: int) -> None:
    """Objects kept in lists, closures and bound methods, and copies by handle, in two sessions."""
    fuzz = _Fuzz([shared, theirs], seed)
    for _ in range(1_500):
        fuzz.step()
    fuzz.finish()
    theirs.trim()
    check_empty(shared)


@pytest.mark.parametrize("seed", range(2))
def test_what_was_freed_stays_dead_across_forks(session: hc.Session, shared: hc.Heap, seed: int) -> None:
    """Parent and child have copies of the same objects; each frees some of them and allocates anew: the other's copies
    of those are dead, and the rest is whole, whoever frees it."""
    generator = random.Random(seed)
    blocks = [shared.alloc(64) for _ in range(400)]
    for number, block in enumerate(blocks):
        block.view[:8] = number.to_bytes(8, "little")
    for block in [shared.alloc(64) for _ in range(100)]:
        block.free()
    by_child = set(generator.sample(range(400), 150))
    by_parent = set(generator.sample(sorted(set(range(400)) - by_child), 150))

    def free_and_allocate(mine: set[int]) -> list[hc.Block]:
        for number in mine:
            blocks[number].free()
        anew = [shared.alloc(64) for _ in range(200)]
        for block in anew:
            block.view[:8] = b"\xff" * 8
        return anew

    ready, go = multiprocessing.Pipe()

    def child() -> None:
        anew = free_and_allocate(by_child)
        go.send("freed")
        go.recv()
        check_dead(by_child | by_parent)
        assert all(block.view[0] == 0xFF for block in anew)
        for block in anew:
            block.free()

    def check_dead(numbers: set[int]) -> None:
        for number in numbers:
            with pytest.raises(TOLD):
                blocks[number].free()

    pid = fork(child)
    anew = free_and_allocate(by_parent)
    ready.recv()
    check_dead(by_child | by_parent)
    ready.send("look")
    assert wait_for(pid) == 0
    for end in (ready, go):
        end.close()
    assert all(block.view[0] == 0xFF for block in anew)
    for number in set(range(400)) - by_child - by_parent:
        assert blocks[number].view[:8] == number.to_bytes(8, "little")
        blocks[number].free()
    for block in anew:
        block.free()
    shared.trim()
    wait_until(lambda: shared.statistics().cached_blocks == 0)
    check_empty(shared)


def test_a_child_does_not_use_its_parents_cache(session: hc.Session, shared: hc.Heap) -> None:
    """What the parent caches stays the parent's; the child leases its own."""
    for block in [shared.alloc(64) for _ in range(200)]:
        block.free()
    cached = {entry.address for entry in blocks_of(shared, EntryKind.CACHED)}
    assert cached

    def child() -> None:
        mine = [shared.alloc(64) for _ in range(100)]
        assert not cached & {block.address for block in mine}
        for block in mine:
            block.free()
        session.close()

    assert in_child(child) == 0
    assert {entry.address for entry in blocks_of(shared, EntryKind.CACHED)} == cached
    check_empty(shared)


# -- realloc of what others know ---------------------------------------------------------------------------------------
def test_a_block_resized_elsewhere_goes_to_the_bin_of_its_real_size(
    other: hc.Session, shared: hc.Heap, theirs: hc.Heap
) -> None:
    """A run that B shrank where it was: A's object still says the old extent, and must not cache it as that."""
    block = shared.alloc(1 * MIB)
    other.open(block.handle).realloc(100 * KIB)
    neighbour = theirs.alloc(800 * KIB)
    block.free()
    for size in (1 * MIB, 100 * KIB, 600 * KIB):
        again = shared.alloc(size)
        span = range(again.address, again.address + size)
        assert neighbour.address not in span
        assert again.address not in range(neighbour.address, neighbour.address + 800 * KIB)
    assert shared.validate() == []


def test_a_block_resized_elsewhere_is_resized_within_its_real_extent(
    other: hc.Session, shared: hc.Heap, theirs: hc.Heap
) -> None:
    """A's object says 1 MiB, the run has 100 KiB: growing it again takes the daemon, and keeps the bytes."""
    block = shared.alloc(1 * MIB)
    block.view[:3] = b"abc"
    other.open(block.handle).realloc(100 * KIB)
    neighbour = theirs.alloc(800 * KIB)
    neighbour.view[:] = b"\x55" * (800 * KIB)
    block.realloc(1 * MIB - 10)
    assert block.view[:3] == b"abc"
    block.view[3:] = bytes(1 * MIB - 13)
    assert set(bytes(neighbour.view)) == {0x55}
    assert shared.validate() == []


@pytest.mark.parametrize("seed", range(2))
def test_resized_blocks_keep_their_bytes(session: hc.Session, shared: hc.Heap, theirs: hc.Heap, seed: int) -> None:
    """Random reallocs through one session or the other, among blocks that come and go in both."""
    generator = random.Random(seed)
    choices = (0, 1, 16, 60, 64, 100, 4000, 4096, 5000, 60_000, 65_536, 65_537, 200_000, 1_000_000)
    live: list[tuple[Any, bytes]] = []
    for step in range(500):
        heap = generator.choice((shared, theirs))
        if len(live) < 20 or generator.random() < 0.3:
            block = heap.alloc(generator.choice(choices))
            text = step.to_bytes(2, "little") * 8
            block.view[:] = (text * (block.size // 16 + 1))[: block.size]
            live.append((block.handle, bytes(block.view[:16])))
            continue
        handle, text = live.pop(generator.randrange(len(live)))
        block = heap.session.open(handle)
        assert bytes(block.view[:16]) == text
        if generator.random() < 0.5:
            block.free()
            continue
        old = block.size
        block.realloc(generator.choice(choices))
        kept = min(old, block.size, 16)
        assert bytes(block.view[:kept]) == text[:kept]
        text = text[:kept] if block.size >= 16 and kept < 16 else bytes(block.view[:16])
        block.view[:16] = text = (text + b"\0" * 16)[: min(block.size, 16)]
        live.append((block.handle, text))
    assert shared.validate() == []
    for handle, text in live:
        block = session.open(handle)
        assert bytes(block.view[:16]) == text
        block.free()
    theirs.trim()
    check_empty(shared)
