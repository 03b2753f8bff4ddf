"""Work in slices: between any two of them others go on, and heaps and sessions may end."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from heapd.errors import HeapdError, HeapDestroyedError, HeapFullError, NoSuchHeapError
from heapd.heap import statistics as statistics_module
from heapd.heap import validate as validate_module
from heapd.layout import F_SERIALIZE
from heapd.manager import HeapManager
from heapd.records import Grant, HeapInfo, HeapStatistics
from heapd.units import KIB, MIB
from heapd.wire import messages as m
from tests.invariants import check_manager, check_sums
from tests.manager.clients import Client, Task, names
from tests.manager.conftest import NewClient

LARGE = 60 * MIB  # four slices


def run_all(tasks: list[Task]) -> None:
    """Slice by slice in turn, as the loop does."""
    while not all(task.step() for task in tasks):
        pass


@pytest.fixture(params=[0, 150 * MIB], ids=["growable", "fixed"])
def maximum(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.fixture
def heap(client: Client, other: Client, maximum: int) -> HeapInfo:
    """A heap that both clients have open."""
    heap = client.create("shared", maximum=maximum)
    other.open("shared")
    return heap


# -- large allocs ------------------------------------------------------------------------------------------------------
def test_a_large_alloc_lets_others_in(client: Client, other: Client, heap: HeapInfo) -> None:
    """The other session's small blocks come and go between its slices."""
    task = client.begin(m.HeapAlloc(heap.heap_id, LARGE))
    assert not task.is_done
    while not task.step():
        other.free(heap, other.alloc(heap, 5000))
        assert other.validate(heap) == []
    assert Grant(*task.answer).extent == LARGE
    check_manager(client.manager)


def test_two_large_allocs_at_once_each_get_a_block(client: Client, other: Client, heap: HeapInfo) -> None:
    """In one heap, slice by slice in turn."""
    tasks = [who.begin(m.HeapAlloc(heap.heap_id, LARGE)) for who in (client, other)]
    run_all(tasks)
    one, two = sorted((Grant(*task.answer) for task in tasks), key=lambda grant: grant.address)
    assert one.address + one.extent <= two.address
    check_manager(client.manager)


def test_two_that_do_not_both_fit_leave_at_most_one_and_no_trace_of_the_other(client: Client, other: Client) -> None:
    """The commit limit is met when both are half way."""
    heap = client.create("full")
    other.open("full")
    client.manager.arena.budget.limit = client.manager.arena.budget.committed + LARGE + 8 * MIB
    tasks = [who.begin(m.HeapAlloc(heap.heap_id, LARGE)) for who in (client, other)]
    run_all(tasks)
    failed = [task for task in tasks if task.error]
    assert failed
    assert all(isinstance(task.error, HeapFullError) for task in failed)
    assert client.statistics(heap).busy_blocks == 2 - len(failed)
    check_manager(client.manager)


@pytest.mark.parametrize("slices", [0, 1, 3])
def test_a_heap_destroyed_during_a_large_alloc_ends_it(
    client: Client, other: Client, heap: HeapInfo, slices: int
) -> None:
    """HeapDestroyedError, whoever destroyed it, at whatever slice; every page is back."""
    task = client.begin(m.HeapAlloc(heap.heap_id, LARGE))
    for _ in range(slices):
        task.step()
    other.destroy(heap)
    with pytest.raises(HeapDestroyedError):
        task.result()
    check_manager(client.manager)


def test_a_new_heap_in_the_place_of_a_destroyed_one_is_not_touched(
    client: Client, other: Client, heap: HeapInfo
) -> None:
    """Its pages are the old heap's, and the old heap's jobs are still there."""
    jobs = [
        client.begin(m.HeapAlloc(heap.heap_id, LARGE)),
        client.begin(m.HeapAllocMany(heap.heap_id, [20 * MIB, 10 * MIB, 20 * MIB])),
    ]
    other.destroy(heap)
    fresh = other.create("shared", maximum=heap.maximum)
    blocks = other.alloc_many(fresh, [10 * MIB, 64, 8192, 20 * MIB])
    run_all(jobs)
    assert all(isinstance(job.error, HeapDestroyedError) for job in jobs)
    found = other.statistics(fresh)
    assert (found.busy_blocks, found.busy) == (4, 30 * MIB + 64 + 8192)
    other.free_many(fresh, blocks)


@pytest.mark.parametrize("flags", [F_SERIALIZE, F_SERIALIZE | 16], ids=["keep orphans", "free orphans"])
@pytest.mark.parametrize("sizes", [[LARGE], [20 * MIB, 64, 9 * MIB, 9 * MIB, 20 * MIB]], ids=["one", "many"])
@pytest.mark.parametrize("slices", [0, 1, 2])
def test_a_session_that_ends_during_its_large_alloc_leaves_nothing_of_it(
    client: Client, other: Client, maximum: int, sizes: list[int], slices: int, flags: int
) -> None:
    """Nobody will ever hear of the block, whatever the heap does with orphans; what was told before stays or goes."""
    heap = client.create("shared", maximum=maximum, flags=flags)
    other.open("shared")
    client.alloc(heap, 100)
    request = m.HeapAlloc(heap.heap_id, LARGE) if len(sizes) == 1 else m.HeapAllocMany(heap.heap_id, sizes)
    task = client.begin(request)
    for _ in range(slices):
        task.step()
    end = Task(client.manager.end_session(client.session))
    run_all([end, task])
    assert end.error is None
    assert task.error is None or isinstance(task.error, HeapdError)
    found = other.statistics(heap)
    assert found.busy_blocks == found.orphaned_blocks == (0 if flags & 16 else 1)
    check_manager(client.manager)


def test_a_session_that_ends_during_its_large_alloc_in_its_own_heap_takes_both_along(client: Client) -> None:
    """The anonymous heap goes with the session."""
    heap = client.create()
    task = client.begin(m.HeapAlloc(heap.heap_id, LARGE))
    end = Task(client.manager.end_session(client.session))
    run_all([end, task])
    assert isinstance(task.error, HeapDestroyedError)
    assert client.manager.heaps == {}
    check_manager(client.manager)


def test_a_block_being_committed_cannot_be_freed_by_another_session(
    client: Client, other: Client, heap: HeapInfo
) -> None:
    """The walk tells of it; until its owner is answered it is not a block."""
    task = client.begin(m.HeapAlloc(heap.heap_id, LARGE))
    [entry] = [entry for entry in other.walk(heap) if entry.session]
    for request in (
        m.HeapFree(heap.heap_id, entry.address, entry.generation),
        m.HeapResize(heap.heap_id, entry.address, entry.generation, 5, True),
        m.HeapFreeMany(heap.heap_id, [entry.address, entry.generation]),
        m.NamePublish(heap.heap_id, "x", entry.address, entry.generation),
    ):
        with pytest.raises(ValueError, match="no block"):
            other.ask(request)
    grant = Grant(*task.result())
    assert (grant.address, grant.generation) == (entry.address, entry.generation)
    other.free(heap, grant)


def test_blocks_of_a_batch_freed_by_another_before_it_fails_do_not_disturb_its_undoing(
    client: Client, other: Client
) -> None:
    """Those of the batch that are whole already can be found by a walk, and freed; the rest is undone all the same."""
    heap = client.create("full")
    other.open("full")
    task = client.begin(
        m.HeapAllocMany(heap.heap_id, [5 * MIB, 20 * MIB, 5 * MIB, 40 * MIB, 40 * MIB, 40 * MIB, 90 * MIB])
    )
    for entry in other.walk(heap):
        if entry.session and entry.size == 5 * MIB:
            other.ask(m.HeapFree(heap.heap_id, entry.address, entry.generation))
    with pytest.raises(HeapFullError):
        task.result()
    assert client.statistics(heap).busy_blocks == 0
    check_manager(client.manager)


# -- ends --------------------------------------------------------------------------------------------------------------
def test_a_session_that_ends_while_its_heap_is_being_destroyed(client: Client, other: Client, heap: HeapInfo) -> None:
    """Both finish, in whatever order they are stepped."""
    client.alloc(heap, LARGE), client.alloc(heap, LARGE)
    destroy = other.begin(m.HeapDestroy(heap.heap_id))
    assert not destroy.is_done
    ends = [Task(client.manager.end_session(who.session)) for who in (client, other)]
    run_all([*ends, destroy])
    assert [task.error for task in (*ends, destroy)] == [None] * 3
    assert client.manager.heaps == {}
    check_manager(client.manager)


def test_a_heap_destroyed_while_its_dead_session_is_reaped(client: Client, other: Client) -> None:
    """The reaping stops; nothing of the heap is left, and the dead session's number is free."""
    heap = client.create("shared")
    other.open("shared")
    for _ in range(5):
        client.alloc_many(heap, [40] * 4096)
    end = Task(client.manager.end_session(client.session))
    assert not end.is_done
    other.destroy(heap)
    assert end.result() is None
    assert [info.number for info in other.sessions()] == [other.number]
    check_manager(client.manager)


def test_a_heap_that_loses_its_last_session_during_a_reap_goes(client: Client, other: Client) -> None:
    """Both sessions end at once; each sees the other's openness vanish."""
    heap = client.create("shared")
    other.open("shared")
    for _ in range(5):
        client.alloc_many(heap, [40] * 4096)
    ends = [Task(client.manager.end_session(who.session)) for who in (client, other)]
    run_all(ends)
    assert client.manager.heaps == {}
    check_manager(client.manager)


def test_a_heap_opened_during_a_reap_stays(client: Client, other: Client, new_client: NewClient) -> None:
    """Its only session is dying, slice by slice, when another opens it: too late only once it is gone."""
    heap = client.create("shared")
    other.open("shared")
    for _ in range(5):
        client.alloc_many(heap, [40] * 4096)
    end = Task(client.manager.end_session(client.session))
    other.close(heap)
    late = new_client()
    with pytest.raises(NoSuchHeapError):
        late.open("shared")
    end.result()
    check_manager(client.manager)


def test_closing_a_session_twice_at_once_does_no_harm(client: Client) -> None:
    """A close that is repeated, and the death of the process noticed meanwhile."""
    heap = client.create()
    client.alloc(heap, LARGE)
    tasks = [client.begin(m.SessionClose()), Task(client.manager.end_session(client.session))]
    run_all(tasks)
    assert [task.error for task in tasks] == [None, None]
    check_manager(client.manager)


def test_memory_given_back_in_slices_is_there_for_others_at_once(client: Client, other: Client, heap: HeapInfo) -> None:
    """A free of 120 MiB has begun: 90 MiB of the 150 that may be committed can be had before it is done."""
    client.manager.arena.budget.limit = 150 * MIB
    block = client.alloc(heap, 120 * MIB)
    task = client.begin(m.HeapFree(heap.heap_id, block.address, block.generation))
    mine = other.create()
    other.alloc(mine, 90 * MIB)
    task.result()
    check_manager(client.manager)


# -- looking while others work -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "request_of", [m.HeapValidate, m.HeapStatisticsGet, m.HeapCompact], ids=["validate", "statistics", "compact"]
)
def test_long_looks_go_on_while_others_alloc_free_and_lease(
    client: Client, other: Client, monkeypatch: pytest.MonkeyPatch, request_of: Callable[[int], m.Request]
) -> None:
    """No violation is invented, the sums add up, nobody's block is lost."""
    monkeypatch.setattr(statistics_module, "_BLOCKS_A_SLICE", 50)
    monkeypatch.setattr(validate_module, "_BLOCKS_A_SLICE", 50)
    random_ = random.Random(4)
    heap = client.create("shared")
    other.open("shared")
    live = client.alloc_many(heap, [16, 64, 700, 5000, 8192, 100_000, 2 * MIB] * 15)
    spare = client.alloc(heap, 30 * MIB)
    client.free(heap, spare)
    pauses = 0

    def work() -> None:
        nonlocal pauses
        pauses += 1
        for _ in range(4):
            client.free(heap, live.pop(random_.randrange(len(live))))
            live.append(other.alloc(heap, random_.choice([16, 700, 5000, 8192, 100_000, 2 * MIB])))
        [leased] = other.lease(heap, 64, 1)
        other.ask(m.HeapGiveBack(heap.heap_id, names([leased])))

    answer = client.ask(request_of(heap.heap_id), between=work)
    if request_of is m.HeapValidate:
        assert answer == []
    elif request_of is m.HeapStatisticsGet:
        check_sums(HeapStatistics(*answer))
    assert pauses > 0 or request_of is m.HeapCompact
    check_manager(client.manager)
    client.free_many(heap, live)


@pytest.mark.parametrize(
    "request_of", [m.HeapValidate, m.HeapStatisticsGet, m.HeapCompact], ids=["validate", "statistics", "compact"]
)
def test_long_looks_at_a_heap_that_is_destroyed_meanwhile_end(
    client: Client, other: Client, monkeypatch: pytest.MonkeyPatch, request_of: Callable[[int], m.Request]
) -> None:
    """With an answer, or with an error of heapd's own."""
    monkeypatch.setattr(statistics_module, "_BLOCKS_A_SLICE", 50)
    monkeypatch.setattr(validate_module, "_BLOCKS_A_SLICE", 50)
    heap = client.create("shared", maximum=100 * MIB, initial=80 * MIB)
    other.open("shared")
    client.alloc_many(heap, [16, 700, 5000, 8192, 100_000] * 40)
    task = client.begin(request_of(heap.heap_id))
    other.destroy(heap)
    fresh = other.create("shared")
    block = other.alloc(fresh, 70 * KIB)
    while not task.step():
        pass
    assert task.error is None or isinstance(task.error, HeapdError)
    check_manager(client.manager)
    other.free(fresh, block)


def test_giving_everything_back_goes_on_while_others_work(client: Client, other: Client) -> None:
    """Twelve thousand leases in slices; another session's leases and blocks are not among them."""
    heap = client.create("shared")
    other.open("shared")
    for _ in range(24):
        client.lease(heap, 40, 512)
    theirs = other.lease(heap, 40, 10)
    mine = client.alloc(heap, 40)
    pauses = 0

    def work() -> None:
        nonlocal pauses
        pauses += 1
        other.free(heap, other.alloc(heap, 40))

    assert client.ask(m.HeapGiveBack(heap.heap_id, [], 1), between=work) == 3 * 4096
    assert pauses >= 2
    found = client.statistics(heap)
    assert (found.cached_blocks, found.busy_blocks) == (len(theirs), 1)
    client.free(heap, mine)


def test_a_batch_of_small_blocks_in_a_heap_that_is_destroyed_meanwhile_ends(client: Client, other: Client) -> None:
    """Forty MiB in pieces of one: HeapDestroyedError at the next of them."""
    heap = client.create("shared")
    other.open("shared")
    task = client.begin(m.HeapAllocMany(heap.heap_id, [MIB] * 40))
    assert not task.is_done
    other.destroy(heap)
    with pytest.raises(HeapDestroyedError):
        task.result()
    check_manager(client.manager)


def test_giving_everything_back_of_a_heap_that_is_destroyed_meanwhile_ends(client: Client, other: Client) -> None:
    """The answer counts what was taken back until then."""
    heap = client.create("shared")
    other.open("shared")
    for _ in range(16):
        client.lease(heap, 40, 512)
    task = client.begin(m.HeapGiveBack(heap.heap_id, [], 1))
    assert not task.is_done
    other.destroy(heap)
    assert 0 < task.result() < 2 * 4096
    check_manager(client.manager)


def test_giving_everything_back_ends_with_the_session_and_its_heap(client: Client, other: Client) -> None:
    """The client died meanwhile, and with it the heap: what lies there now is somebody else's."""
    heap = client.create("shared")
    for _ in range(16):
        client.lease(heap, 40, 512)
    task = client.begin(m.HeapGiveBack(heap.heap_id, [], 1))
    assert not task.is_done
    client.end()
    taken = other.create("next")
    kept = other.lease(taken, 40, 512)
    assert 0 < task.result() < 2 * 4096
    assert other.statistics(taken).cached_blocks == len(kept)
    check_manager(other.manager)


def test_a_newer_sweep_ends_an_older_one(client: Client) -> None:
    """Who waits for the newer one alone may cache blocks as soon as that is done."""
    heap = client.create("shared")
    for _ in range(16):
        client.lease(heap, 40, 512)
    older, newer = client.begin(m.HeapGiveBack(heap.heap_id, [], 1)), client.begin(m.HeapGiveBack(heap.heap_id, [], 2))
    assert newer.result() > 0
    kept = client.lease(heap, 40, 512)
    assert older.result() < 16 * 512
    assert client.ask(m.HeapGiveBack(heap.heap_id, [], 1)) == 0
    assert client.statistics(heap).cached_blocks == len(kept)
    check_manager(client.manager)


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_jobs_in_any_order_leaves_a_sound_manager(
    manager: HeapManager, new_client: NewClient, seed: int
) -> None:
    """Large allocs and frees, destroys, compacts, looks and ends of sessions, stepped at random."""
    random_ = random.Random(seed)
    clients = [new_client() for _ in range(3)]
    keeper = new_client()
    tasks: list[Task] = []
    for _ in range(120):
        who = random_.choice(clients)
        try:
            shared = who.open("common") if "common" in {heap.name for heap in who.heaps()} else who.create("common")
            keeper.open("common")
            heap = shared.heap_id
            request: m.Request = random_.choice(
                [
                    m.HeapAlloc(heap, random_.choice([100, 5 * MIB, 20 * MIB, 40 * MIB])),
                    m.HeapAllocMany(heap, [random_.choice([64, MIB, 17 * MIB]) for _ in range(4)]),
                    m.HeapCompact(heap),
                    m.HeapValidate(heap),
                    m.HeapStatisticsGet(heap),
                    m.HeapGiveBack(heap, [], 1),
                    m.HeapLease(heap, 5000, 20),
                    m.HeapDestroy(heap) if random_.random() < 0.3 else m.HeapAlloc(heap, 18 * MIB),
                    m.SessionClose() if random_.random() < 0.3 else m.HeapWalk(heap),
                ]
            )
            busy = [entry for entry in keeper.walk(shared, 4096) if entry.session and entry.generation]
            if busy and random_.random() < 0.5:
                entry = random_.choice(busy)
                request = m.HeapFree(heap, entry.address, entry.generation)
            tasks.append(who.begin(request))
        except HeapdError:
            pass
        if not who.session.is_live:
            clients[clients.index(who)] = new_client()
        for task in random_.sample(tasks, min(len(tasks), 3)):
            task.step()
        tasks = [task for task in tasks if not task.is_done or check_error(task)]
    run_all(tasks)
    for task in tasks:
        check_error(task)
    check_manager(manager)


def check_error(task: Task) -> bool:
    """False; fails the test if a job ended with anything but an answer or an error of heapd's own."""
    assert task.error is None or isinstance(task.error, HeapdError), repr(task.error)
    return False
