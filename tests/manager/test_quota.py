"""What one session may have: of all heaps together, of one heap; allocated or cached; and where blocks wander to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from heapd.errors import HeapDestroyedError, HeapFullError, QuotaError, SessionLostError
from heapd.heap import NOBODY
from heapd.layout import F_PERSISTENT, F_SERIALIZE, SLAB_WORD
from heapd.manager import HeapManager, Limits
from heapd.manager.sessions import Session
from heapd.records import Grant, HeapInfo
from heapd.sizeclass import extent_of
from heapd.units import KIB, MIB
from heapd.wire import messages as m
from tests.arenas import Commits
from tests.invariants import check_manager, picture
from tests.manager.clients import Client
from tests.manager.conftest import NewClient

QUOTA = MIB


@pytest.fixture
def limits() -> Limits:
    return Limits(session_quota=QUOTA)


def held(client: Client) -> int:
    """What the daemon says that the client has."""
    return client.sessions(client.session.pid)[0].held


def move(client: Client, grants: list[Grant], to: Session, *, size: int = 0) -> None:
    """What front ends do when blocks wander: another session's frees store its number; with `size` it allocates."""
    words, shape = client.manager.arena.words, client.manager.arena.shape
    for grant in grants:
        form = shape.word_format(grant.slot)
        base = form.cached(to.number, form.generation(words[grant.slot]))
        words[grant.slot] = base + size


REQUESTS: dict[str, Callable[[HeapInfo, int], m.Request]] = {
    "alloc": lambda heap, size: m.HeapAlloc(heap.heap_id, size),
    "alloc_many": lambda heap, size: m.HeapAllocMany(heap.heap_id, [size // 2] * 2),
    "lease": lambda heap, size: m.HeapLease(heap.heap_id, size, 1),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("bound", ["quota", "heap-quota"])
def test_what_does_not_fit_is_refused_with_its_figures(
    client: Client, other: Client, bound: str, request_: str
) -> None:
    """Requested, used, limit, and what to do; nothing has changed, and others are served."""
    quota = QUOTA if bound == "quota" else 512 * KIB
    heap = client.create("x", session_quota=0 if bound == "quota" else quota)
    other.open("x")
    client.alloc_many(heap, [quota // 4] * 3)
    before = picture(client.manager)
    with pytest.raises(QuotaError) as refused:
        client.ask(REQUESTS[request_](heap, quota // 2))
    error = refused.value
    assert (error.bound, error.requested, error.used, error.limit) == (bound, quota // 2, quota * 3 // 4, quota)
    assert "session_quota" in str(error) or "--session-quota" in str(error)
    assert isinstance(error, HeapFullError)
    assert isinstance(error, MemoryError)
    assert picture(client.manager) == before
    other.ask(REQUESTS[request_](heap, quota // 2))
    client.ask(REQUESTS[request_](heap, quota // 4))


def test_the_quota_is_of_all_heaps_together(client: Client) -> None:
    """Named, anonymous and default; whatever the heap's own bounds are."""
    for heap in (client.create("x"), client.create(maximum=MIB), client.default()):
        client.alloc(heap, QUOTA // 4)
    with pytest.raises(QuotaError):
        client.alloc(heap, QUOTA // 2)
    client.alloc(heap, QUOTA // 4)
    assert held(client) == QUOTA
    with pytest.raises(QuotaError):
        client.alloc(heap, 1)


def test_what_is_freed_may_be_had_again(client: Client) -> None:
    """By free, free_many, give back, or with the heap."""
    heap = client.create()
    for _ in range(3):
        blocks = client.alloc_many(heap, [QUOTA // 8] * 8)
        client.free(heap, blocks[0])
        client.free_many(heap, blocks[1:])
        client.lease(heap, QUOTA // 8, 8)
        client.ask(m.HeapGiveBack(heap.heap_id, [], 1))
        doomed = client.create()
        client.alloc(doomed, QUOTA)
        client.destroy(doomed)
    assert held(client) == 0


def test_a_lease_is_as_long_as_fits(client: Client) -> None:
    """What is cached counts; a shorter batch is no error, and an empty one is."""
    heap = client.create()
    assert len(client.lease(heap, 64 * KIB, 100)) == QUOTA // (64 * KIB)
    with pytest.raises(QuotaError):
        client.lease(heap, 64, 1)


def test_a_block_grows_within_the_quota(client: Client) -> None:
    """In place: only what it grows by counts; shrinking gives it back."""
    heap = client.create(maximum=4 * MIB)
    block = client.alloc(heap, QUOTA // 2)
    with pytest.raises(QuotaError) as refused:
        client.resize(heap, block, QUOTA + 1)
    assert refused.value.requested == QUOTA // 2 + 4 * KIB
    client.resize(heap, block, QUOTA)
    assert held(client) == QUOTA
    client.resize(heap, block, QUOTA // 4)
    assert held(client) == QUOTA // 4
    client.alloc(heap, QUOTA * 3 // 4)


def test_what_a_heap_commits_at_once_counts_for_its_maker(client: Client, other: Client) -> None:
    """Until its blocks there take more: both are the same memory."""
    heap = client.create("x", initial=QUOTA * 3 // 4)
    other.open("x")
    with pytest.raises(QuotaError):
        client.create(initial=QUOTA // 2)
    with pytest.raises(QuotaError):
        client.alloc(client.create(), QUOTA // 2)
    client.alloc(heap, QUOTA // 2)
    client.alloc(heap, QUOTA // 2)
    other.alloc(heap, QUOTA)
    client.destroy(heap)
    client.create(initial=QUOTA)


def test_a_refused_heap_leaves_no_trace(client: Client) -> None:
    """No control block, no name."""
    before = picture(client.manager)
    with pytest.raises(QuotaError):
        client.create("x", initial=2 * QUOTA)
    assert picture(client.manager) == before
    client.create("x")


# -- blocks that wander ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [60, 4 * KIB, 100 * KIB])
@pytest.mark.parametrize("allocated", [False, True])
def test_blocks_that_wandered_count_for_whom_they_are_with(
    client: Client, other: Client, size: int, allocated: bool
) -> None:
    """Freed by another session, which caches them or has allocated them again: they are its, once it matters."""
    heap = client.create("x")
    other.open("x")
    blocks = client.alloc_many(heap, [size] * (QUOTA // extent_of(size)))
    move(client, blocks, other.session, size=size if allocated else 0)
    assert (held(client) > QUOTA * 0.8, held(other)) == (True, 0)
    client.alloc(heap, QUOTA // 2)
    assert (held(client), held(other)) == (QUOTA // 2, len(blocks) * extent_of(size))
    with pytest.raises(QuotaError):
        other.alloc(heap, QUOTA // 2)
    if allocated:
        other.free_many(heap, [block for block in blocks if size])
    else:
        other.ask(m.HeapGiveBack(heap.heap_id, [], 1))
    assert held(other) == 0
    other.alloc(heap, QUOTA)


def test_blocks_of_sessions_that_ended_count_for_nobody(
    client: Client, other: Client, new_client: NewClient, manager: HeapManager
) -> None:
    """Neither for a later session of the same number, nor for those who read them; those that wandered count on."""
    heap = client.create("x", flags=F_SERIALIZE | F_PERSISTENT)
    other.open("x")
    mine, moved = client.alloc_many(heap, [100 * KIB] * 2), client.alloc_many(heap, [100 * KIB] * 3)
    move(client, moved, other.session, size=100 * KIB)
    client.end()
    shared = manager.heaps[heap.heap_id]
    assert held(other) == 3 * 100 * KIB
    assert shared.heap.held.of(NOBODY) == 2 * 100 * KIB
    other.free_many(heap, mine)
    check_manager(manager)
    assert dict(shared.heap.held) == {other.number: 3 * 100 * KIB}
    assert held(new_client()) == 0


def test_a_session_that_does_not_have_the_heap_open_is_not_charged(client: Client, other: Client) -> None:
    """A word that names it is a forgery, or a block that it took along: it stays with whom it was lent to."""
    heap = client.create("x")
    blocks = client.alloc_many(heap, [1000] * 900)
    for block in blocks:
        client.manager.arena.words[block.slot] = SLAB_WORD.busy(other.number, block.generation, 1000)
    with pytest.raises(QuotaError):
        client.alloc(heap, QUOTA // 2)
    assert held(other) == 0


# -- while jobs are under way ------------------------------------------------------------------------------------------
def test_counting_lets_others_in(client: Client, other: Client) -> None:
    """Thousands of words are looked at in slices; what happens meanwhile is right, too."""
    heap = client.create("x")
    other.open("x")
    blocks = client.alloc_many(heap, [16] * 4000) + client.alloc_many(heap, [16] * 4000)
    move(client, blocks[::2], other.session, size=16)
    pauses = 0

    def between() -> None:
        nonlocal pauses
        pauses += 1
        other.free(heap, blocks.pop())

    client.ask(m.HeapAlloc(heap.heap_id, QUOTA - 5000 * 16), between)
    assert pauses >= 1
    check_manager(client.manager)


@pytest.mark.parametrize("end", ["session", "heap"])
def test_an_end_while_blocks_are_counted_leaves_nothing(client: Client, other: Client, end: str) -> None:
    """Nothing is lent to a session that has ended, or from a heap that has gone."""
    heap = client.create("x")
    other.open("x")
    client.alloc_many(heap, [16] * 4096)
    client.alloc_many(heap, [16] * 4000)
    task = client.begin(m.HeapAlloc(heap.heap_id, QUOTA))
    assert not task.is_done
    client.end() if end == "session" else other.destroy(heap)
    with pytest.raises(SessionLostError if end == "session" else HeapDestroyedError):
        task.result()
    if end == "session":
        assert other.statistics(heap).busy_blocks == 8096


def test_requests_in_parallel_do_not_pass_the_quota_together(client: Client) -> None:
    """Two threads of one session, two batches in slices: the sum counts."""
    client.manager._quotas.limit = 40 * MIB
    heap = client.create()
    tasks: list[Any] = [client.begin(m.HeapAllocMany(heap.heap_id, [5 * MIB] * 5)) for _ in range(2)]
    refused = 0
    while not all(task.is_done for task in tasks):
        for task in tasks:
            task.step()
        assert held(client) <= 40 * MIB
    for task in tasks:
        try:
            task.result()
        except QuotaError:
            refused += 1
    assert refused >= 1
    assert held(client) in (0, 25 * MIB)


def test_memory_that_runs_out_costs_no_quota(client: Client, commits: Commits) -> None:
    """What was set aside for a request that failed is there for the next one."""
    heap = client.create()
    for request in (m.HeapAlloc(heap.heap_id, QUOTA), m.HeapLease(heap.heap_id, QUOTA // 16, 16)):
        for _ in range(3):
            commits.fail(1, persistent=True)
            with pytest.raises(HeapFullError) as refused:
                client.ask(request)
            assert refused.value.bound == "memory"
        commits.work()
    client.alloc(heap, QUOTA)
