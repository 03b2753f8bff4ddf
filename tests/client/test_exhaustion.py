"""Every bound that a client can meet: the session's quota, the heap's, its maximum, the daemon's commit limit.

Each is a MemoryError of the same family that says which bound it was, what was asked for, how much was used and what to
do; nothing that was cached is in the way; nobody else notices; and what is freed can be had again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.errors import QuotaError
from heapd.units import KIB, MIB
from heapd.wire.messages import ArenaReclaim, HeapLease
from tests.harness import Daemon, mark_run, unique_name

LIMIT = 8 * MIB
MakeHeap = Callable[[hc.Session], hc.Heap]

BOUNDS: dict[str, tuple[list[str], MakeHeap]] = {
    "quota": (["--session-quota", "8MiB"], lambda session: session.create_heap("x")),
    "heap-quota": ([], lambda session: session.create_heap("x", session_quota=LIMIT)),
    "heap": ([], lambda session: session.create_heap("x", maximum=LIMIT)),
    "commit": (["--commit-limit", "8MiB"], lambda session: session.create_heap("x")),
}


@pytest.fixture(params=BOUNDS)
def bound(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def daemon_with() -> Iterator[Callable[[list[str]], Daemon]]:
    """The daemon with these arguments, one for all tests of the module."""
    mark_run()
    directory = Path(tempfile.mkdtemp(prefix="heapd-", dir="/tmp"))
    daemons: dict[str, Daemon] = {}

    def find(arguments: list[str]) -> Daemon:
        key = " ".join(arguments)
        if key not in daemons:
            daemons[key] = Daemon(directory, unique_name(), arguments)
            daemons[key].status()
        return daemons[key]

    for arguments, _ in BOUNDS.values():
        find(arguments)  # before any test: what a test starts must end with it
    yield find
    for daemon in daemons.values():
        daemon.check_clean_end()
    shutil.rmtree(directory)


@pytest.fixture
def sessions(bound: str, daemon_with: Callable[[list[str]], Daemon]) -> Iterator[tuple[hc.Session, hc.Session]]:
    """Two sessions with a daemon that has the bound."""
    daemon = daemon_with(BOUNDS[bound][0])
    with hc.connect(daemon.endpoint, autostart=False) as one, hc.connect(daemon.endpoint, autostart=False) as two:
        yield one, two


@pytest.fixture
def heap(bound: str, sessions: tuple[hc.Session, hc.Session]) -> hc.Heap:
    """A shared heap of the first session, in which the bound will be met."""
    return BOUNDS[bound][1](sessions[0])


def fill_up(heap: hc.Heap, size: int) -> tuple[list[hc.Block], hc.HeapFullError]:
    """Allocate and write until it is refused; the blocks, and the error."""
    blocks: list[hc.Block] = []
    while True:
        try:
            block = heap.alloc(size)
        except hc.HeapFullError as error:
            return blocks, error
        block.view[:] = b"%" * size
        blocks.append(block)
        assert len(blocks) * size <= LIMIT, "more than the bound was given out"


@pytest.mark.parametrize("size", [1000, 8 * KIB, 300 * KIB])
def test_a_bound_is_met_with_an_error_that_says_which(
    bound: str, sessions: tuple[hc.Session, hc.Session], heap: hc.Heap, size: int
) -> None:
    """Not much before it is reached; the blocks are whole, the other session has memory where it can have any, and
    freed blocks can be had again, in another size, too."""
    blocks, error = fill_up(heap, size)
    assert (error.bound, error.requested) == (bound, size) or size % 4096
    assert 0 < error.used <= error.limit == LIMIT
    assert "free blocks" in str(error)
    assert isinstance(error, QuotaError) == ("quota" in bound)
    assert len(blocks) * size > 0.7 * LIMIT
    if "quota" in bound:
        other = sessions[1].open_heap("x")
        assert len(fill_up(other, size)[0]) >= len(blocks) * 0.95
    assert all(block.view[0] == block.view[-1] == ord("%") for block in blocks)
    for block in blocks[::2]:
        block.free()
    again, _ = fill_up(heap, size)
    assert len(again) >= len(blocks) // 2 - 1
    for block in blocks[1::2] + again:
        block.free()
    blocks, _ = fill_up(heap, 40 * KIB)
    assert len(blocks) * 40 * KIB > 0.7 * LIMIT, "what was cached of the old size is in the way of the new one"
    assert heap.validate() == []


def test_alloc_many_and_realloc_meet_it_the_same_way(bound: str, heap: hc.Heap) -> None:
    """All of a batch or none; a block that cannot grow is as it was."""
    for block in heap.alloc_many(100 * KIB, 40):
        block.free()  # cached: must come back by itself
    kept, block = heap.alloc(500 * KIB), heap.alloc(MIB)
    block.view[:3] = b"abc"
    for call in (lambda: heap.alloc_many(100 * KIB, 100), lambda: block.realloc(7 * MIB + 900 * KIB)):
        before = heap.statistics().busy
        with pytest.raises(hc.HeapFullError) as refused:
            call()
        assert refused.value.bound == bound
        assert heap.statistics().busy == before
    assert bytes(block.view[:3]) == b"abc"
    kept.free()
    heap.alloc_many(100 * KIB, 50)
    assert heap.validate() == []


@pytest.mark.parametrize("bound", ["quota", "heap"], indirect=True)
def test_one_session_at_its_own_bound_asks_nobody_else_for_anything(
    bound: str, sessions: tuple[hc.Session, hc.Session], heap: hc.Heap
) -> None:
    """Others' front ends keep what they cache of other heaps, however often it tries."""
    mine = sessions[1].create_heap()
    for block in [mine.alloc(64) for _ in range(100)]:
        block.free()
    cached = mine.statistics().cached_blocks
    assert cached > 0
    for _ in range(5):
        fill_up(heap, 300 * KIB)
    asked: list[object] = []
    call = sessions[1].call
    sessions[1].call = lambda request, *rest: asked.append(request) or call(request, *rest)  # type: ignore
    for _ in range(10):
        mine.alloc(64)
    assert not [request for request in asked if isinstance(request, HeapLease)]
    assert mine.statistics().cached_blocks == cached - 10


@pytest.mark.parametrize("bound", ["commit"], indirect=True)
def test_where_memory_itself_is_short_all_caches_are_asked_back(
    sessions: tuple[hc.Session, hc.Session], heap: hc.Heap
) -> None:
    """Another session's, at its next operation."""
    theirs = sessions[1].create_heap(serialize=False)
    for block in [theirs.alloc(8 * KIB) for _ in range(300)]:
        block.free()
    assert theirs.statistics().cached > 500 * KIB
    fill_up(heap, 8 * KIB)
    theirs.alloc(64)
    assert theirs.statistics().cached < 64 * KIB
    assert fill_up(heap, 8 * KIB)[0]


@pytest.mark.parametrize("bound", ["quota", "heap-quota"], indirect=True)
@pytest.mark.parametrize("size", [3000, 300 * KIB])
def test_a_producer_whose_blocks_a_consumer_frees_never_meets_its_quota(
    sessions: tuple[hc.Session, hc.Session], heap: hc.Heap, size: int
) -> None:
    """Ten times the quota goes through: what the consumer caches, or allocates from its cache, is the consumer's."""
    there = sessions[1].open_heap("x")
    store = []
    for number in range(10 * LIMIT // size):
        block = heap.alloc(size)
        sessions[1].open(block.handle).free()
        if number % 20 == 0 and len(store) * size < LIMIT // 2:
            store.append(there.alloc(size))
    assert len(store) * size > LIMIT // 3
    assert heap.validate() == []


def test_reclaim_of_one_heap_leaves_the_others_alone(session: hc.Session) -> None:
    """Only its live word moves on."""
    one, two = session.create_heap(), session.create_heap()
    before = [session.arena.words[heap.live_slot] for heap in (one, two)]
    session.call(ArenaReclaim(one.id))
    after = [session.arena.words[heap.live_slot] for heap in (one, two)]
    assert after[0] != before[0]
    assert after[1] == before[1]
