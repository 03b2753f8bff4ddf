"""What a dead session had allocated in a heap that lives on: kept and listed, or freed, by the heap's policy."""

from __future__ import annotations

import pytest

from heapd.manager import HeapManager
from heapd.records import EntryKind
from heapd.units import MIB
from tests.arenas import finish
from tests.invariants import check_manager, fill, pattern, read
from tests.manager.clients import Client
from tests.manager.conftest import NewClient
from tests.manager.ledgers import mortal

SIZES = [10, 64, 5000, 8192, 70_000, 2 * MIB]


def test_orphans_are_kept_with_their_bytes_and_listed_as_such(client: Client, other: Client) -> None:
    """The default: somebody else may still read them, and frees them like any block."""
    arena = client.manager.arena
    heap = client.create("x")
    other.open("x")
    blocks = client.alloc_many(heap, SIZES)
    for number, (block, size) in enumerate(zip(blocks, SIZES, strict=True)):
        fill(arena, block.address, size, number)
    alive = other.alloc(heap, 100)
    client.end()
    busy = [entry for entry in other.walk(heap) if entry.kind is EntryKind.BUSY]
    assert {(entry.address, entry.session) for entry in busy if entry.orphaned} == {
        (block.address, client.number) for block in blocks
    }
    assert [entry.address for entry in busy if not entry.orphaned] == [alive.address]
    found = other.statistics(heap)
    assert (found.orphaned_blocks, found.orphaned) == (len(SIZES), sum(SIZES))
    assert other.validate(heap) == []
    for number, (block, size) in enumerate(zip(blocks, SIZES, strict=True)):
        assert read(arena, block.address, size) == pattern(size, number)
    other.free_many(heap, blocks)
    assert other.statistics(heap).orphaned_blocks == 0


def test_orphans_of_a_heap_that_frees_them_are_gone(client: Client, other: Client) -> None:
    """Every block of the dead session, of whatever kind; others' blocks are untouched."""
    heap = client.create_freeing_orphans("x")
    other.open("x")
    client.alloc_many(heap, SIZES)
    alive = other.alloc_many(heap, SIZES)
    client.end()
    found = other.statistics(heap)
    assert (found.busy_blocks, found.orphaned_blocks, found.busy) == (len(SIZES), 0, sum(SIZES))
    assert other.validate(heap) == []
    other.free_many(heap, alive)


def test_a_session_that_closed_the_heap_before_it_died_leaves_orphans_too(client: Client, other: Client) -> None:
    """By the policy: listed as orphans where they are kept ..."""
    heap = client.create("x")
    other.open("x")
    block = client.alloc(heap, 100)
    client.close(heap)
    client.end()
    assert other.statistics(heap).orphaned_blocks == 1
    assert other.validate(heap) == []
    other.free(heap, block)


def test_a_session_that_closed_the_heap_before_it_died_has_its_blocks_freed_too(client: Client, other: Client) -> None:
    """... and freed where they are freed."""
    heap = client.create_freeing_orphans("x")
    other.open("x")
    client.alloc_many(heap, SIZES)
    client.close(heap)
    client.end()
    assert other.statistics(heap).busy_blocks == 0


def test_what_a_session_cached_in_a_heap_that_it_closed_is_taken_back(client: Client, other: Client) -> None:
    """With the close, or at its end at the latest."""
    heap = client.create("x")
    other.open("x")
    client.lease(heap, 64, 5)
    client.close(heap)
    client.end()
    assert other.statistics(heap).cached_blocks == 0


def test_a_persistent_heap_that_nobody_has_open_keeps_or_frees_by_its_policy(
    client: Client, new_client: NewClient
) -> None:
    """The last session's end is no different."""
    keeping, freeing = client.create_persistent("keeps"), client.create_freeing_orphans("frees", persistent=True)
    client.alloc(keeping, 100), client.alloc(freeing, 100)
    client.end()
    later = new_client()
    later.open("keeps"), later.open("frees")
    assert (later.statistics(keeping).orphaned_blocks, later.statistics(freeing).busy_blocks) == (1, 0)
    later.destroy(keeping)
    later.destroy(freeing)


@pytest.mark.parametrize("policy", ["keep", "free"])
def test_thousands_of_blocks_are_gone_through_in_slices(
    client: Client, other: Client, manager: HeapManager, policy: str
) -> None:
    """Others alloc and free meanwhile: nothing of theirs is taken, nothing of the dead one's is forgotten."""
    heap = client.create("x") if policy == "keep" else client.create_freeing_orphans("x")
    other.open("x")
    blocks = (
        client.alloc_many(heap, [32] * 4096)
        + client.alloc_many(heap, [200] * 4096)
        + client.alloc_many(heap, [8192] * 500)
    )
    mine = other.alloc_many(heap, [32, 200, 8192] * 50)
    pauses = 0
    job = manager.end_session(client.session)
    for _ in job:
        pauses += 1
        other.free_many(heap, mine[: len(mine) // 2])
        mine = mine[len(mine) // 2 :] + other.alloc_many(heap, [32, 200, 8192] * 25)
    assert pauses >= 1
    found = other.statistics(heap)
    assert found.orphaned_blocks == (len(blocks) if policy == "keep" else 0)
    assert found.busy_blocks == found.orphaned_blocks + len(mine)
    check_manager(manager)
    assert [info.number for info in other.sessions()] == (
        [other.number, client.number] if policy == "keep" else [other.number]
    )


def test_two_sessions_that_end_at_once_are_each_reaped(client: Client, other: Client, new_client: NewClient) -> None:
    """Slice by slice in turn: the blocks of both are freed, and both numbers with them."""
    watcher = new_client()
    heap = client.create_freeing_orphans("x")
    other.open("x"), watcher.open("x")
    for who in (client, other):
        for _ in range(3):
            who.alloc_many(heap, [48] * 4096)
    jobs = [client.manager.end_session(who.session) for who in (client, other)]
    while jobs:
        jobs = [job for job in jobs if next(job, "done") != "done"]
    assert watcher.statistics(heap).busy_blocks == 0
    assert [info.number for info in watcher.sessions()] == [watcher.number]


def test_a_handle_to_a_freed_orphan_is_stale(client: Client, other: Client) -> None:
    """The block's generation has moved on when another is given out there."""
    heap = client.create_freeing_orphans("x")
    other.open("x")
    anchor = other.alloc(heap, 64)
    block = client.alloc(heap, 64)
    client.publish(heap, "mine", block)
    client.end()
    again = other.alloc(heap, 64)
    assert again.address == block.address
    assert again.generation != block.generation
    assert other.names(heap) == []
    other.free_many(heap, [anchor, again])


def test_a_heap_that_goes_while_a_session_with_it_ends_is_gone_for_the_ledger_too() -> None:
    """The end works through other heaps yet: when it comes to this one nothing is to be done, or recorded."""
    with mortal() as it:
        ending, staying = Client(it.manager), Client(it.manager)
        large, doomed = ending.create("large"), ending.create("doomed")
        for name in ("large", "doomed"):
            staying.open(name)
        for _ in range(3):
            ending.alloc_many(large, [16] * 4000)
        end = it.manager.end_session(ending.session)
        next(end)
        staying.destroy(doomed)
        finish(end)
        manager = it.restart()
        assert manager.heaps.keys() == {large.heap_id}
        check_manager(manager)
