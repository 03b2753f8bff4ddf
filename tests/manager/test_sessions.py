"""Sessions: tokens, numbers, what their end leaves behind, and when a number may be another's."""

from __future__ import annotations

import pytest

from heapd.errors import LimitError
from heapd.journal import Journal
from heapd.layout import SESSION_MASK
from heapd.manager import HeapManager
from heapd.manager.sessions import Sessions
from heapd.units import MIB
from tests.invariants import check_manager
from tests.manager.clients import Client
from tests.manager.conftest import Clock, NewClient


# -- tokens and numbers ------------------------------------------------------------------------------------------------
def test_tokens_and_numbers_of_live_sessions_differ(new_client: NewClient) -> None:
    """Numbers from 1 on."""
    sessions = [new_client().session for _ in range(100)]
    assert len({session.token for session in sessions}) == 100
    assert sorted(session.number for session in sessions) == list(range(1, 101))


def test_a_process_may_have_several_sessions(manager: HeapManager) -> None:
    """Each ends on its own; what it made goes with it alone."""
    one, other = Client(manager, pid=77), Client(manager, pid=77)
    mine, others = one.create(), other.create()
    one.end()
    assert other.statistics(others).regions == 1
    assert mine.heap_id not in manager.heaps
    assert [info.number for info in other.sessions(pid=77)] == [other.number]


def test_ending_twice_does_nothing_the_second_time(client: Client, manager: HeapManager) -> None:
    """A close, and then the death of the process is noticed."""
    client.create()
    client.end()
    client.end()
    assert manager.live_session_count == 0


def test_numbers_of_ended_sessions_are_used_again_oldest_last() -> None:
    """So that a number is as rarely as possible seen twice in a short time."""
    sessions = Sessions(4, Journal(memoryview(b"")))
    first = sessions.open(1, 1, 0, 0)
    sessions.end(first)
    sessions.retire(set())
    assert sessions.open(1, 1, 0, 0).number == 2
    for _ in range(SESSION_MASK - 2):
        session = sessions.open(1, 1, 0, 0)
        sessions.end(session)
        sessions.retire(set())
    assert session.number == SESSION_MASK
    assert sessions.open(1, 1, 0, 0).number == first.number


# -- numbers and orphans -----------------------------------------------------------------------------------------------
def reuse_all_numbers(manager: HeapManager) -> set[int]:
    """Open and end as many sessions as there are numbers; those that were given."""
    given = set()
    for _ in range(SESSION_MASK + 5):
        session = manager.open_session(1, 1000)
        given.add(session.number)
        for _ in manager.end_session(session):
            pass
    return given


def test_a_number_that_orphans_bear_is_not_used_again(
    client: Client, other: Client, new_client: NewClient, manager: HeapManager
) -> None:
    """Else the block would seem to be the new session's. Once it is freed, the next reap of its heap finds out."""
    watcher, heap = new_client(), client.create("x")
    other.open("x"), watcher.open("x")
    block = client.alloc(heap, 100)
    client.end()
    assert client.number not in reuse_all_numbers(manager)
    watcher.free(heap, block)
    other.end()
    assert client.number in reuse_all_numbers(manager)


def test_a_number_whose_blocks_lie_in_a_heap_it_had_closed_is_not_used_again(
    client: Client, other: Client, manager: HeapManager
) -> None:
    """Closing a heap is not freeing what one has in it: the words still bear the number."""
    heap = client.create("x")
    other.open("x")
    client.alloc(heap, 100)
    client.close(heap)
    client.end()
    assert client.number not in reuse_all_numbers(manager)
    [entry] = [entry for entry in other.walk(heap) if entry.session]
    assert (entry.session, entry.orphaned) == (client.number, True)


def test_a_number_is_free_again_when_the_heap_of_its_orphans_is_gone(
    client: Client, other: Client, manager: HeapManager
) -> None:
    """By destroy, as by a free of the orphan."""
    heap = client.create("x")
    other.open("x")
    client.alloc(heap, 100)
    client.end()
    other.destroy(heap)
    assert client.number in reuse_all_numbers(manager)


def test_orphans_of_as_many_sessions_as_there_are_numbers_keep_nobody_out(
    manager: HeapManager, client: Client, other: Client
) -> None:
    """The number that was given up longest ago is used again: its block counts as the new session's."""
    heap = client.create("x")
    other.open("x")
    sessions = manager.sessions
    sessions._unused = type(sessions._unused)(list(sessions._unused)[:3])  # all the others are taken
    left = []
    for _ in range(3):
        leaver = Client(manager)
        leaver.open("x")
        left.append((leaver.number, leaver.alloc(heap, 100)))
        leaver.end()
    late = Client(manager)
    assert late.number == left[0][0]
    orphans = {entry.address for entry in other.walk(heap) if entry.orphaned}
    assert orphans == {grant.address for _, grant in left[1:]}
    late.open("x")
    late.free(heap, left[0][1])
    check_manager(manager)


def test_ended_sessions_are_listed_while_blocks_of_theirs_are_left(
    client: Client, other: Client, new_client: NewClient
) -> None:
    """Not live, with pid and age; gone from the list when the next session's end finds none of their blocks."""
    watcher, heap = new_client(), client.create("x")
    other.open("x"), watcher.open("x")
    block = client.alloc(heap, 100)
    client.end()
    [ended] = [info for info in watcher.sessions() if not info.is_live]
    assert (ended.number, ended.pid) == (client.number, client.session.pid)
    watcher.free(heap, block)
    other.end()
    assert [info.number for info in watcher.sessions()] == [watcher.number]


def test_who_is_given_the_number_of_a_heap_s_maker_is_not_taken_for_it(client: Client, manager: HeapManager) -> None:
    """The maker of a heap is 0 once it has ended, whoever bears its number then."""
    client.create_persistent("x")
    client.end()
    reuse_all_numbers(manager)
    while (again := Client(manager)).number != client.number:
        again.end()
    assert again.open("x").creator == 0


# -- what is told ------------------------------------------------------------------------------------------------------
def test_a_session_s_info_counts_heaps_and_requests_and_tells_its_age(client: Client, clock: Clock) -> None:
    """By the manager's clock."""
    client.create()
    client.default()
    clock.pass_ms(250)
    [info] = client.sessions()
    assert (info.number, info.pid, info.uid, info.is_live) == (client.number, client.session.pid, 1000, True)
    assert (info.age_ns, info.heaps, info.requests) == (250_000_000, 2, 3)


def test_sessions_are_limited_and_the_error_says_how_many(manager: HeapManager) -> None:
    """A closed one makes room."""
    sessions = Sessions(2, Journal(memoryview(b"")))
    one = sessions.open(1, 1, 0, 0)
    sessions.open(2, 1, 0, 0)
    with pytest.raises(LimitError) as refused:
        sessions.open(3, 1, 0, 0)
    assert refused.value.details["limit"] == 2
    sessions.end(one)
    sessions.retire(set())
    sessions.open(3, 1, 0, 0)


def test_more_sessions_than_numbers_is_a_limit_too() -> None:
    """However large the configured limit."""
    sessions = Sessions(10**6, Journal(memoryview(b"")))
    for _ in range(SESSION_MASK):
        sessions.open(1, 1, 0, 0)
    with pytest.raises(LimitError):
        sessions.open(1, 1, 0, 0)


# -- what an end takes back --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [64, 8192, 2 * MIB])
def test_blocks_that_a_dead_session_cached_are_free_again(client: Client, other: Client, size: int) -> None:
    """Whatever the heap's policy on orphans: nobody had allocated them."""
    heap = client.create_persistent("x")
    other.open("x")
    client.lease(heap, size, 3)
    kept = client.alloc(heap, size)
    client.end()
    found = other.statistics(heap)
    assert (found.cached_blocks, found.busy_blocks, found.orphaned_blocks) == (0, 1, 1)
    other.free(heap, kept)
    other.destroy(heap)


def test_what_others_have_and_cache_is_not_touched(client: Client, other: Client) -> None:
    """Only words that bear the dead session's number are its."""
    heap = client.create_freeing_orphans("x")
    other.open("x")
    mine = client.alloc(heap, 64)
    other.lease(heap, 64, 2)
    theirs = other.alloc(heap, 64)
    assert mine.address < theirs.address
    client.end()
    found = other.statistics(heap)
    assert (found.cached_blocks, found.busy_blocks) == (2, 1)
    other.free(heap, theirs)


def test_blocks_freed_locally_into_another_s_cache_are_the_other_s(client: Client, other: Client) -> None:
    """A block that a session freed is cached by it, whoever had allocated it: it goes with that session."""
    heap = client.create("x")
    other.open("x")
    block = client.alloc(heap, 64)
    words, form = client.manager.arena.words, client.manager.arena.shape.word_format(block.slot)
    words[block.slot] = form.cached(other.number, block.generation)
    client.end()
    assert other.statistics(heap).cached_blocks == 1
    watcher = Client(client.manager)
    watcher.open("x")
    other.end()
    assert watcher.statistics(heap).cached_blocks == 0
    check_manager(client.manager)
