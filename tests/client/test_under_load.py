"""What heapd says of itself while processes are at work on it: each answer adds up, not only those of quiet moments."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

import heapd_client as hc
from heapd.records import EntryKind, HeapStatistics
from heapd.units import KIB
from heapd_client import errors
from tests.client.tools import fork
from tests.harness import Daemon
from tests.invariants import check_sums, check_tiling
from tests.kill.actor import Actor, Post

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
HEAPS = ("serialized", "unserialized", "small")


@pytest.fixture
def busy_heaps(session: hc.Session) -> Iterator[list[hc.Heap]]:
    """Heaps on which two processes allocate, free, resize, lock, trim and hand blocks to each other."""
    heaps = [
        session.create_heap("serialized"),
        session.create_heap("unserialized", serialize=False),
        session.create_heap("small", maximum=1024 * KIB),
    ]
    inboxes = [Post(), Post()]

    def work(me: int) -> None:
        actor = Actor(session, HEAPS, inboxes[me], [inboxes[1 - me]], seed=me)
        while True:
            actor.step()

    pids = [fork(lambda: work(0)), fork(lambda: work(1))]
    try:
        yield heaps
        ended = [pid for pid in pids if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        assert ended == [], "a process that was at work failed"
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for inbox in inboxes:
            inbox.close()


def _looks(heaps: list[hc.Heap], has_seen_all: Callable[[], bool] = lambda: True) -> Iterator[hc.Heap]:
    """The heaps in turn, for some time, and then until there is nothing left to be seen."""
    start, looks = time.monotonic(), 0
    while looks < 10 or time.monotonic() - start < 0.8 or not has_seen_all():
        yield heaps[looks % len(heaps)]
        looks += 1
        assert time.monotonic() - start < 30, "the processes at work do not come to what is to be seen"


def test_the_sums_of_statistics_hold_at_every_moment(session: hc.Session, busy_heaps: list[hc.Heap]) -> None:
    """Of each heap and of the arena; totals never go down; and blocks were seen in every state."""
    before: dict[str | None, HeapStatistics] = {}
    cached = busy = 0

    def has_seen_all() -> bool:
        return bool(cached and busy) and all(before[heap.name].allocations > 100 for heap in busy_heaps)

    for heap in _looks(busy_heaps, has_seen_all):
        now = heap.statistics()
        check_sums(now)
        assert now.allocations - now.releases >= 0
        last = before.get(heap.name, now)
        assert now.allocations >= last.allocations
        assert now.releases >= last.releases
        assert now.acquisitions >= last.acquisitions
        before[heap.name] = now
        cached, busy = cached + now.cached_blocks, busy + now.busy_blocks
        arena = session.statistics()
        assert arena.size == arena.tables_reserved + arena.reserved + arena.unreserved
        assert arena.committed == arena.tables + arena.heaps
        assert arena.committed <= arena.peak_committed


def test_every_part_of_a_walk_is_whole(session: hc.Session, busy_heaps: list[hc.Heap]) -> None:
    """What one answer of the walk tells tiles its region; what is busy or cached has a session that lives."""
    seen: set[EntryKind] = set()
    for heap in _looks(busy_heaps, lambda: seen == set(EntryKind)):
        entries = list(heap.walk())
        live = {info.number for info in session.sessions() if info.is_live}
        for one, following in pairwise(entries):
            assert following.kind is EntryKind.REGION or following.address >= one.address, "the walk goes back"
        if len(entries) < 1000:  # one answer: the whole heap at one moment
            check_tiling(entries)
        for entry in entries:
            seen.add(entry.kind)
            if entry.kind in (EntryKind.BUSY, EntryKind.CACHED):
                assert entry.session in live
                assert not entry.orphaned


def test_a_heap_at_work_is_valid(busy_heaps: list[hc.Heap]) -> None:
    """No state in between is taken for a fault."""
    for heap in _looks(busy_heaps):
        assert heap.validate() == []


@pytest.mark.parametrize("size", [64, 5000, 70_000])
def test_a_cached_block_is_told_as_free_and_with_its_holder(session: hc.Session, size: int) -> None:
    """By walk, statistics and validate; size and realloc know that it was freed."""
    heap = session.create_heap()
    block = heap.alloc(size)
    twin = session.open(block.handle)
    block.free()
    (entry,) = (found for found in heap.walk() if found.address == block.address and found.kind is EntryKind.CACHED)
    assert (entry.session, entry.size, entry.orphaned) == (session.number, entry.extent, False)
    statistics = heap.statistics()
    assert statistics.cached >= entry.extent >= size
    assert (statistics.busy, statistics.busy_blocks, statistics.padding) == (0, 0, 0)
    (violation,) = heap.validate(twin)
    assert (violation.what, violation.session) == ("free-block", session.number)
    assert heap.validate() == []
    assert block.size == 0
    for freed, error in ((block, errors.ClosedError), (twin, errors.DoubleFreeError)):
        with pytest.raises(error):
            freed.realloc(size + 1)


def test_another_session_cannot_use_what_one_caches(shared_daemon: Daemon, session: hc.Session) -> None:
    """It is nobody's block: neither address nor handle leads to it, and the daemon refuses to free it."""
    heap = session.create_heap("shared")
    block = heap.alloc(64)
    handle, address = block.handle, block.address
    block.free()
    with hc.connect(shared_daemon.endpoint, autostart=False) as other:
        other.open_heap("shared")
        with pytest.raises(errors.StaleHandleError):
            other.open(handle)
        with pytest.raises(errors.NotABlockError):
            other.block_at(address)
