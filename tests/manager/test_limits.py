"""Counts no client can pass, and control blocks: which are used again, and which never while somebody holds a lock."""

from __future__ import annotations

import ctypes
import os

import pytest

from heapd.arena import Arena
from heapd.errors import ExecuteError, HeapFullError, LimitError
from heapd.layout import (
    C_ACQUIRED,
    C_FLAGS,
    C_HEAP_ID,
    C_LIVE,
    C_RECOVERED,
    CONTROL_SIZE,
    F_EXECUTABLE,
    F_SERIALIZE,
    H_CONTROLS_READY,
)
from heapd.manager import HeapManager, Limits
from heapd.mutex import Mutex
from heapd.records import HeapInfo
from heapd.units import KIB, MIB, PAGE_SIZE
from heapd.wire import messages as m
from tests.arenas import Commits
from tests.invariants import check_manager
from tests.manager.clients import Client


@pytest.fixture
def limits() -> Limits:
    return Limits(sessions=5, heaps=20)


def control(manager: HeapManager, heap: HeapInfo) -> int:
    """Slot of the heap's control block."""
    return manager.arena.shape.control_slot(heap.heap_id & 0xFFFF)


def mutex_of(arena: Arena, index: int) -> Mutex:
    base = ctypes.addressof(ctypes.c_char.from_buffer(arena.segment.mapping))
    return Mutex(base + arena.shape.mutex_address(index))


# -- counts ------------------------------------------------------------------------------------------------------------
def test_heaps_are_limited_and_a_destroyed_one_makes_room(client: Client) -> None:
    """Of every kind: named, anonymous, default."""
    heaps = [client.create() for _ in range(20)]
    for call in (client.create, client.default):
        with pytest.raises(LimitError) as refused:
            call()
        assert refused.value.details["limit"] == 20
    client.destroy(heaps[7])
    client.default()


def test_sessions_are_limited_and_a_closed_one_makes_room(manager: HeapManager) -> None:
    """The others are served all the while."""
    clients = [Client(manager) for _ in range(5)]
    with pytest.raises(LimitError):
        Client(manager)
    clients[0].create()
    clients[1].end()
    Client(manager)


def test_more_heaps_than_control_blocks_is_a_limit(manager: HeapManager, client: Client) -> None:
    """Whatever the configured count says."""
    manager._directory.controls._limit = 3
    for _ in range(3):
        client.create()
    with pytest.raises(LimitError):
        client.create()
    check_manager(manager)


# -- control blocks ----------------------------------------------------------------------------------------------------
def test_a_control_block_tells_of_its_heap(manager: HeapManager, client: Client) -> None:
    """Id, flags, live; and no longer live once the heap is gone, by another epoch."""
    heap = client.create(flags=F_SERIALIZE)
    words, slot = manager.arena.words, control(manager, heap)
    assert (words[slot + C_HEAP_ID], words[slot + C_FLAGS], words[slot + C_LIVE] & 1) == (heap.heap_id, F_SERIALIZE, 1)
    assert words[slot + C_LIVE] >> 1 == heap.epoch
    live = words[slot + C_LIVE]
    client.destroy(heap)
    assert words[slot + C_LIVE] & 1 == 0
    assert words[slot + C_LIVE] >> 1 != live >> 1
    assert words[slot + C_HEAP_ID] == 0


def test_the_live_word_changes_with_everything_that_front_ends_must_see(client: Client, manager: HeapManager) -> None:
    """Compact, reclaim, destroy, and a new heap in the same control block: no value comes twice."""
    heap = client.create()
    words, slot = manager.arena.words, control(manager, heap)
    seen = [words[slot + C_LIVE]]
    client.ask(m.HeapCompact(heap.heap_id))
    seen.append(words[slot + C_LIVE])
    client.ask(m.ArenaReclaim())
    seen.append(words[slot + C_LIVE])
    client.destroy(heap)
    seen.append(words[slot + C_LIVE])
    again = client.create()
    assert control(manager, again) == slot
    seen.append(words[slot + C_LIVE])
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)


def test_lock_counters_begin_anew_with_each_heap(client: Client, manager: HeapManager) -> None:
    """They are the heap's, not the control block's."""
    heap = client.create()
    words, slot = manager.arena.words, control(manager, heap)
    for counter in range(C_ACQUIRED, C_RECOVERED + 1):
        words[slot + counter] = 77
    client.destroy(heap)
    again = client.create()
    assert control(manager, again) == slot
    found = client.statistics(again)
    assert (found.acquisitions, found.contended, found.waited_ns, found.recoveries) == (0, 0, 0, 0)


def test_a_control_block_whose_lock_somebody_holds_is_not_used_again(client: Client, manager: HeapManager) -> None:
    """The holder has not heard yet that the heap is gone: a new heap must not begin its life locked."""
    heap = client.create()
    index = heap.heap_id & 0xFFFF
    mutex = mutex_of(manager.arena, index)
    mutex.acquire(1.0)
    client.destroy(heap)
    assert client.create().heap_id & 0xFFFF != index
    mutex.release()
    assert client.create().heap_id & 0xFFFF == index


def test_a_thousand_heaps_in_turn_use_one_control_block_and_as_many_ids(client: Client, manager: HeapManager) -> None:
    """Ids are never used again; the tables do not grow."""
    heap = client.create()
    client.destroy(heap)
    before = manager.arena.segment.allocated_bytes
    ids = set()
    for _ in range(1000):
        heap = client.create()
        ids.add(heap.heap_id)
        client.destroy(heap)
    assert len(ids) == 1000
    assert {heap_id & 0xFFFF for heap_id in ids} == {heap.heap_id & 0xFFFF}
    assert manager.arena.segment.allocated_bytes == before


def test_control_blocks_are_committed_before_they_are_used(client: Client, manager: HeapManager) -> None:
    """The header says how far others may read, and all of that is committed."""
    for _ in range(20):
        client.create()
    ready = manager.arena.words[H_CONTROLS_READY]
    assert ready >= 20
    pages = ready * CONTROL_SIZE // PAGE_SIZE
    assert manager.arena.committed_in(manager.arena.shape.controls // PAGE_SIZE, pages) == pages


# -- memory that runs out ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("made", [0, 15, 16])
def test_a_heap_that_no_memory_is_left_for_leaves_no_trace(
    client: Client, manager: HeapManager, commits: Commits, made: int, persistent: bool
) -> None:
    """Fail the 1st, 2nd, ... commit of its making, also where it is the first of a new page of control blocks."""
    for _ in range(made):
        client.create()
    for nth in range(1, 20):
        commits.fail(nth, persistent=persistent)
        try:
            heap = client.create("x", initial=100_000, maximum=3 * MIB)
        except HeapFullError:
            commits.work()
            assert len(manager.heaps) == made
            check_manager(manager)
            continue
        break
    commits.work()
    assert nth > 1
    check_manager(manager)
    client.alloc(heap, 2 * MIB)


@pytest.mark.parametrize(
    "sizes",
    [[300], [64, 5000, 8192, 70_000], [64] * 500, [2 * MIB, 64], [20 * MIB, 64, 20 * MIB], [9 * MIB, 9 * MIB]],
    ids=str,
)
@pytest.mark.parametrize("maximum", [0, 100 * MIB])
def test_a_batch_that_memory_runs_out_for_is_undone(
    client: Client, manager: HeapManager, commits: Commits, maximum: int, sizes: list[int]
) -> None:
    """Whichever commit fails, for good: no block of the batch is left, others' bytes are intact, and it works later."""
    heap = client.create("x", maximum=maximum)
    kept = client.alloc(heap, 100)
    manager.arena.segment.buffer[kept.address] = 99
    failures = 0
    for nth in range(1, 60):
        commits.fail(nth, persistent=True)
        try:
            grants = client.alloc_many(heap, sizes)
        except HeapFullError:
            failures += 1
            commits.work()
            assert client.statistics(heap).busy_blocks == 1
            check_manager(manager)
            continue
        break
    commits.work()
    assert failures > 0
    assert manager.arena.segment.buffer[kept.address] == 99
    client.free_many(heap, [*grants, kept])


def test_everything_can_be_given_back_without_any_memory(client: Client, other: Client, commits: Commits) -> None:
    """Free, free_many, give back, compact, close, destroy, ends of sessions: none of them commits anything."""
    heap, mine, more = client.create("x"), client.create(), client.create("y")
    other.open("x")
    blocks = client.alloc_many(heap, [64, 5000, 8192, 70_000, 2 * MIB] * 3)
    large = client.alloc(heap, 40 * MIB)
    client.lease(heap, 64, 20)
    client.alloc(mine, 20 * MIB)
    client.manager.arena.budget.limit = client.manager.arena.budget.committed
    commits.fail(1, persistent=True)
    client.free(heap, large)
    client.free_many(heap, blocks[::2])
    client.ask(m.HeapGiveBack(heap.heap_id, [], 1))
    client.ask(m.HeapCompact(heap.heap_id))
    client.destroy(mine)
    client.close(more)
    client.end()
    other.destroy(heap)
    assert commits.calls == 0
    check_manager(client.manager)


def test_reclaiming_frees_the_spare_pages_of_every_heap(client: Client, other: Client, manager: HeapManager) -> None:
    """What a heap keeps committed for itself is not lost to others who are short of memory: free pages, empty slabs."""
    heap = client.create(maximum=180 * MIB)
    client.alloc(heap, 150 * MIB)
    spare, _ = client.alloc(heap, 128 * KIB), client.alloc(heap, 4096)
    client.free(heap, spare)
    client.free(heap, client.alloc(heap, 500))
    mine = other.create()
    wanted = manager.arena.budget.limit - manager.arena.budget.committed + 64 * KIB
    with pytest.raises(HeapFullError):
        other.alloc(mine, wanted)
    assert other.ask(m.ArenaReclaim()) == 1, "one other session may have something cached"
    other.alloc(mine, wanted)


# -- executable --------------------------------------------------------------------------------------------------------
def test_an_executable_heap_is_refused_where_shared_memory_is_not(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A noexec /dev/shm: the error says how to change it, and no heap is made."""

    class NoExec:
        f_flag = 8  # ST_NOEXEC

    monkeypatch.setattr(os, "statvfs", lambda path: NoExec)
    with pytest.raises(ExecuteError, match="remount"):
        client.create(flags=F_EXECUTABLE)
    monkeypatch.undo()
    assert client.heaps() == []
