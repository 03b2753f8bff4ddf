"""Names: blocks published, replaced, looked up, waited for; and what becomes of a name when its block or heap goes."""

from __future__ import annotations

import pytest

from heapd.errors import (
    HeapDestroyedError,
    LimitError,
    NoSuchNameError,
    NotABlockError,
    StaleHandleError,
    WaitTimeoutError,
)
from heapd.manager import HeapManager, Limits
from heapd.records import HeapInfo, Publication
from heapd.units import MIB
from heapd.wire import messages as m
from tests.manager.clients import Client
from tests.manager.conftest import Clock


@pytest.fixture
def limits() -> Limits:
    return Limits(names=5, waiters=3)


@pytest.fixture
def heap(client: Client, other: Client) -> HeapInfo:
    """A heap that both clients have open."""
    heap = client.create("board")
    other.open("board")
    return heap


# -- publish and look up -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 64, 8192, 2 * MIB])
def test_what_one_publishes_the_other_finds(client: Client, other: Client, heap: HeapInfo, size: int) -> None:
    """Slot, address, generation and requested size: all that a handle needs."""
    block = client.alloc(heap, size)
    client.publish(heap, "frame", block)
    assert other.lookup(heap, "frame") == Publication("frame", block.slot, block.address, block.generation, size)


def test_publishing_again_replaces_what_the_name_stands_for(client: Client, other: Client, heap: HeapInfo) -> None:
    """At once, and by anybody; the block before is untouched."""
    one, two = client.alloc_many(heap, [64, 64])
    client.publish(heap, "frame", one)
    other.publish(heap, "frame", two)
    assert client.lookup(heap, "frame").address == two.address
    assert len(client.names(heap)) == 1
    client.free(heap, one)


def test_a_name_that_is_not_there_is_told_at_once(client: Client, heap: HeapInfo) -> None:
    """Without a timeout."""
    with pytest.raises(NoSuchNameError, match="frame"):
        client.lookup(heap, "frame")


def test_an_unpublished_name_is_gone_and_its_block_is_not(client: Client, other: Client, heap: HeapInfo) -> None:
    """Unpublishing it once more is an error."""
    block = client.alloc(heap, 64)
    client.publish(heap, "frame", block)
    other.unpublish(heap, "frame")
    for call in (client.lookup, client.unpublish):
        with pytest.raises(NoSuchNameError):
            call(heap, "frame")
    client.free(heap, block)


def test_the_same_name_in_two_heaps_is_two_names(client: Client, heap: HeapInfo) -> None:
    """A name belongs to its heap."""
    second = client.create("another")
    one, two = client.alloc(heap, 64), client.alloc(second, 64)
    client.publish(heap, "frame", one)
    client.publish(second, "frame", two)
    assert client.lookup(heap, "frame").address == one.address
    client.unpublish(second, "frame")
    assert client.lookup(heap, "frame").address == one.address


def test_only_a_block_that_is_allocated_can_be_published(client: Client, heap: HeapInfo) -> None:
    """Not a stale handle, an interior address, or a cached block."""
    block, _ = client.alloc_many(heap, [64, 64])
    with pytest.raises(StaleHandleError):
        client.publish(heap, "x", block._replace(generation=block.generation + 1))
    with pytest.raises(NotABlockError):
        client.publish(heap, "x", block._replace(address=block.address + 8))
    [leased] = client.lease(heap, 64, 1)
    with pytest.raises(ValueError, match="free"):
        client.publish(heap, "x", leased)
    assert client.names(heap) == []


def test_a_name_outlives_the_session_that_published_it(client: Client, other: Client, heap: HeapInfo) -> None:
    """As its block does."""
    block = client.alloc(heap, 64)
    client.publish(heap, "frame", block)
    client.end()
    assert other.lookup(heap, "frame").address == block.address


@pytest.mark.parametrize("size", [64, 8192, 2 * MIB])
def test_a_name_goes_with_its_block(client: Client, other: Client, heap: HeapInfo, size: int) -> None:
    """Freed, and even where another block lies there by now."""
    block = client.alloc(heap, size)
    client.publish(heap, "frame", block)
    other.free(heap, block)
    client.alloc(heap, size)
    with pytest.raises(NoSuchNameError):
        client.lookup(heap, "frame")
    assert client.names(heap) == []


def test_a_resized_block_s_name_tells_the_new_size(client: Client, heap: HeapInfo) -> None:
    """The size is read from the block's word."""
    block = client.alloc(heap, 64)
    client.publish(heap, "frame", block)
    client.resize(heap, block, 10)
    assert client.lookup(heap, "frame").size == 10


# -- list --------------------------------------------------------------------------------------------------------------
def test_names_are_listed_in_order_and_can_be_paged(client: Client, heap: HeapInfo) -> None:
    """Those of freed blocks are left out."""
    names = ["b", "a", "ä", "B", "c"]
    blocks = {name: client.alloc(heap, 64) for name in names}
    for name in names:
        client.publish(heap, name, blocks[name])
    client.free(heap, blocks["b"])
    expected = sorted(set(names) - {"b"})
    assert [found.name for found in client.names(heap)] == expected
    paged: list[str] = []
    while page := client.names(heap, paged[-1] if paged else None, 2):
        paged += [found.name for found in page]
    assert paged == expected


# -- wait --------------------------------------------------------------------------------------------------------------
def test_who_waits_is_told_when_the_name_is_published(client: Client, other: Client, heap: HeapInfo) -> None:
    """Everybody who waits for it, and nobody else."""
    waiters = [other.wait(heap, "frame"), other.wait(heap, "frame"), client.wait(heap, "frame")]
    assert client.manager.drain_ready() == []
    block = client.alloc(heap, 64)
    client.publish(heap, "another", block)
    assert client.manager.drain_ready() == []
    client.publish(heap, "frame", block)
    assert client.manager.drain_ready() == waiters
    assert {waiter.result for waiter in waiters} == {("frame", block.slot, block.address, block.generation, 64)}
    assert client.manager.drain_ready() == []


def test_a_name_that_is_there_is_not_waited_for(client: Client, heap: HeapInfo) -> None:
    """The answer comes at once, whatever the timeout."""
    client.publish(heap, "frame", client.alloc(heap, 64))
    answer = client.ask(m.NameLookup(heap.heap_id, "frame", 5000))
    assert Publication(*answer).name == "frame"
    assert client.manager.next_deadline_ns() is None


def test_a_name_of_a_freed_block_is_waited_for_anew(client: Client, other: Client, heap: HeapInfo) -> None:
    """Until somebody publishes another block under it."""
    block = client.alloc(heap, 64)
    client.publish(heap, "frame", block)
    client.free(heap, block)
    waiter = other.wait(heap, "frame")
    client.publish(heap, "frame", client.alloc(heap, 10))
    assert client.manager.drain_ready() == [waiter]


def test_a_wait_ends_at_its_deadline_and_not_before(client: Client, heap: HeapInfo, clock: Clock) -> None:
    """By the manager's clock, to the nanosecond; the loop is told when to look again."""
    manager = client.manager
    late, later = client.wait(heap, "frame", 100), client.wait(heap, "frame", 200)
    assert manager.next_deadline_ns() == clock() + 100_000_000 == late.deadline_ns
    manager.expire_waiters(clock() + 99_999_999)
    assert manager.drain_ready() == []
    clock.pass_ms(100)
    manager.expire_waiters(clock())
    assert manager.drain_ready() == [late]
    assert isinstance(late.error, WaitTimeoutError)
    assert "frame" in str(late.error)
    assert manager.next_deadline_ns() == later.deadline_ns
    client.publish(heap, "frame", client.alloc(heap, 64))
    assert manager.drain_ready() == [later]
    assert manager.next_deadline_ns() is None


def test_who_waits_in_a_heap_that_is_destroyed_is_told_so(client: Client, other: Client, heap: HeapInfo) -> None:
    """By destroy, or because its last session has ended."""
    waiter = other.wait(heap, "frame")
    client.destroy(heap)
    assert client.manager.drain_ready() == [waiter]
    assert isinstance(waiter.error, HeapDestroyedError)


def test_nobody_is_told_for_a_session_that_has_ended(client: Client, other: Client, heap: HeapInfo) -> None:
    """Its waits are forgotten with it."""
    other.wait(heap, "frame")
    mine = client.wait(heap, "frame")
    other.end()
    client.publish(heap, "frame", client.alloc(heap, 64))
    assert client.manager.drain_ready() == [mine]
    assert client.manager.next_deadline_ns() is None


def test_a_closed_heap_s_waits_end_with_it(client: Client, other: Client, heap: HeapInfo) -> None:
    """The last close destroys the heap: who waited through another session is told."""
    waiter = other.wait(heap, "frame")
    other.close(heap)
    client.close(heap)
    assert client.manager.drain_ready() == [waiter]
    assert waiter.error is not None


# -- limits ------------------------------------------------------------------------------------------------------------
def test_names_in_a_heap_are_limited(client: Client, heap: HeapInfo) -> None:
    """Five here; replacing one is no new one, and an unpublished one makes room."""
    block = client.alloc(heap, 64)
    for number in range(5):
        client.publish(heap, str(number), block)
    with pytest.raises(LimitError) as refused:
        client.publish(heap, "one more", block)
    assert refused.value.details["limit"] == 5
    client.publish(heap, "3", block)
    client.unpublish(heap, "0")
    client.publish(heap, "one more", block)


def test_names_of_freed_blocks_do_not_count_against_the_limit(client: Client, heap: HeapInfo) -> None:
    """Nobody can look them up any more: a program that publishes frame after frame never runs full."""
    for number in range(20):
        block = client.alloc(heap, 64)
        client.publish(heap, f"frame {number}", block)
        client.free(heap, block)
    client.publish(heap, "last", client.alloc(heap, 64))


def test_waits_of_a_session_are_limited(client: Client, other: Client, heap: HeapInfo, clock: Clock) -> None:
    """Three here; each that ends, however it ends, makes room; other sessions have their own."""
    for number in range(3):
        client.wait(heap, str(number), 100)
    with pytest.raises(LimitError):
        client.wait(heap, "more")
    other.wait(heap, "more")
    clock.pass_ms(100)
    client.manager.expire_waiters(clock())
    for number in range(3):
        client.wait(heap, str(number), 100)
    block = client.alloc(heap, 64)
    for number in range(3):
        client.publish(heap, str(number), block)
    client.wait(heap, "more")


def test_status_counts_who_waits(client: Client, heap: HeapInfo, manager: HeapManager) -> None:
    """And sessions, heaps, and memory."""
    client.wait(heap, "frame")
    status = manager.status()
    assert (status["waiters"], status["sessions"], status["heaps"]) == (1, 2, 1)
    assert status["committed"] == manager.arena.segment.allocated_bytes
    assert status["segment"] == manager.arena.segment.name
