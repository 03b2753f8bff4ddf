"""Heaps through the client: batches, walk, names, statistics, life and death."""

from __future__ import annotations

import threading

import pytest

import heapd_client as hc
from heapd_client import errors
from tests.harness import Daemon


def test_a_batch_keeps_the_order_of_sizes(heap: hc.Heap) -> None:
    """alloc_many gives blocks in the order asked for, of every size."""
    sizes = [10, 100_000, 0, 64, 5_000]
    assert [block.size for block in heap.alloc_many(sizes)] == sizes
    assert [block.size for block in heap.alloc_many(7, 3)] == [7, 7, 7]
    assert [block.size for block in heap.alloc_many(7, count=0)] == []
    assert [block.size for block in heap.alloc_many(size for size in (1, 2))] == [1, 2]


def test_a_batch_may_be_larger_than_one_message(heap: hc.Heap) -> None:
    """More blocks than one request may carry, both ways."""
    blocks = heap.alloc_many(16, 10_000)
    assert len({block.address for block in blocks}) == 10_000
    heap.free_many(blocks)
    assert heap.statistics().busy_blocks == 0


def test_a_batch_is_all_or_none(session: hc.Session) -> None:
    """A batch that does not fit leaves nothing allocated, also when its first messages were granted."""
    heap = session.create_heap(maximum=4 << 20)
    for count in (200, 5_000):
        with pytest.raises(errors.HeapFullError):
            heap.alloc_many([40] * count + [3 << 20] * 2)
        assert heap.statistics().busy_blocks == 0
    assert heap.validate() == []


def test_freeing_a_block_twice_in_a_batch_is_refused(session: hc.Session, heap: hc.Heap) -> None:
    """The same block, as one object or two: none of the batch is freed."""
    one, two = heap.alloc_many(8, 2)
    for twin in (one, session.open(one.handle)):
        with pytest.raises(errors.DoubleFreeError):
            heap.free_many([one, two, twin])
    assert heap.statistics().busy_blocks == 2


def test_a_block_of_another_heap_is_refused(session: hc.Session, heap: hc.Heap) -> None:
    """Every function that takes a block wants one of its own heap."""
    block = session.create_heap().alloc(8)
    for use in (
        lambda: heap.free(block),
        lambda: heap.free_many([block]),
        lambda: heap.realloc(block, 9),
        lambda: heap.validate(block),
        lambda: heap.publish("name", block),
    ):
        with pytest.raises(errors.WrongHeapError):
            use()


@pytest.mark.parametrize("size", [-1, 2**64, 2**200, 1.5, "8", None])
def test_a_size_that_is_none_is_refused(heap: hc.Heap, size: object) -> None:
    """Negative, absurd or not a number: InvalidArgumentError, a ValueError, from each function."""
    for use in (
        lambda: heap.alloc(size),  # type: ignore[arg-type]
        lambda: heap.alloc_many([8, size]),  # type: ignore[list-item]
        lambda: heap.alloc(8).realloc(size),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"size|item|integer|count"):
            use()


def test_a_size_no_heap_can_hold_is_a_memory_error(heap: hc.Heap) -> None:
    """2**64 - 1 bytes, or all of memory: MemoryError, nothing changed."""
    for size in (2**64 - 1, 2**40, heap.mapping.size):
        with pytest.raises(MemoryError):
            heap.alloc(size)
    assert heap.statistics().busy_blocks == 0


def test_numbers_that_count_as_ints_are_sizes(heap: hc.Heap) -> None:
    """Whatever has __index__, such as numpy's integers."""

    class Nine:
        def __index__(self) -> int:
            return 9

    assert heap.alloc(Nine()).size == 9  # type: ignore[arg-type]
    assert [block.size for block in heap.alloc_many([Nine()])] == [9]  # type: ignore[list-item]


def test_the_walk_tiles_the_heap(heap: hc.Heap) -> None:
    """Entries follow one another without gap or overlap, and show each block."""
    blocks = heap.alloc_many([16] * 3_000 + [5_000, 100_000])
    entries = list(heap.walk())
    regions = [entry for entry in entries if entry.kind is hc.EntryKind.REGION]
    end = 0
    for entry in entries:
        if entry.kind is hc.EntryKind.REGION:
            assert end in (0, regions[entry.region - 1].address + regions[entry.region - 1].extent)
            end = entry.address
        else:
            assert entry.address == end
            end += entry.extent
    busy = {(entry.address, entry.size) for entry in entries if entry.kind is hc.EntryKind.BUSY}
    assert busy == {(block.address, block.size) for block in blocks}


def test_the_statistics_add_up(heap: hc.Heap) -> None:
    """reserved = committed + uncommitted; committed is the sum of its parts."""
    heap.alloc_many([16, 600, 5_000, 70_000])
    found = heap.statistics()
    assert found.reserved == found.committed + found.uncommitted
    assert found.committed == found.busy + found.padding + found.cached + found.free + found.overhead
    assert (found.busy, found.busy_blocks) == (16 + 600 + 5_000 + 70_000, 4)


def test_a_scribbled_state_word_is_found_by_validate(heap: hc.Heap) -> None:
    """A client can spoil a state word of its own block; validate says where, of the heap and of the block."""
    block, other = heap.alloc_many(64, 2)
    word = heap.mapping.words[block.slot]
    heap.mapping.words[block.slot] = word ^ 0xFF
    assert block.address in {violation.address for violation in heap.validate()}
    assert heap.validate(block)
    assert heap.validate(other) == []
    heap.mapping.words[block.slot] = word
    assert heap.validate() == []


def test_compact_gives_memory_back(session: hc.Session, heap: hc.Heap) -> None:
    """What was freed is no longer committed afterwards."""
    blocks = heap.alloc_many(1 << 20, 20)
    heap.free_many(blocks)
    heap.compact()
    assert heap.statistics().committed < 1 << 20
    assert heap.validate() == []


def test_a_published_block_is_looked_up_by_name(heap: hc.Heap) -> None:
    """publish, lookup, names, replacement and unpublish."""
    one, two = heap.alloc_many(8, 2)
    one.view[:] = b"block 01"
    heap.publish("a", one)
    heap.publish("b", two)
    assert bytes(heap.lookup("a").view) == b"block 01"
    assert [(found.name, found.address) for found in heap.names()] == [("a", one.address), ("b", two.address)]
    heap.publish("a", two)
    assert heap.lookup("a").address == two.address
    heap.unpublish("a")
    with pytest.raises(errors.NoSuchNameError):
        heap.lookup("a")
    with pytest.raises(errors.NoSuchNameError):
        heap.unpublish("a")


def test_many_names_are_listed_in_pages(heap: hc.Heap) -> None:
    """More names than one answer holds, in order."""
    block = heap.alloc(8)
    for number in range(1_100):
        heap.publish(f"{number:05}", block)
    assert [found.name for found in heap.names()] == [f"{number:05}" for number in range(1_100)]


def test_lookup_waits_for_the_name(session: hc.Session, heap: hc.Heap) -> None:
    """A lookup with a timeout returns as soon as somebody publishes."""
    found: list[hc.Block] = []
    waiter = threading.Thread(target=lambda: found.append(heap.lookup("later", timeout=20)))
    waiter.start()
    block = heap.alloc(8)
    heap.publish("later", block)
    waiter.join(10)
    assert [each.address for each in found] == [block.address]


def test_lookup_past_its_timeout_is_an_error(heap: hc.Heap) -> None:
    """WaitTimeoutError, a TimeoutError, in time; NoSuchNameError where no wait was asked for."""
    with pytest.raises(TimeoutError):
        heap.lookup("never", timeout=0.05)
    for timeout in (None, 0, 0.0):
        with pytest.raises(errors.NoSuchNameError):
            heap.lookup("never", timeout=timeout)


def test_a_name_replaced_all_the_time_is_always_found(session: hc.Session) -> None:
    """A block replaced and freed between the answer and the look is no error."""
    heap = session.create_heap(serialize=False)
    heap.publish("current", heap.alloc(8))
    done = threading.Event()

    def replace() -> None:
        while not done.is_set():
            old = heap.lookup("current")
            heap.publish("current", heap.alloc(8))
            old.free()

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(300):
            assert heap.lookup("current", timeout=1).size == 8
    finally:
        done.set()
        thread.join(10)


def test_a_destroyed_heap_refuses_everything(session: hc.Session) -> None:
    """HeapDestroyedError from each function, also through another session's object."""
    heap = session.create_heap("doomed")
    with hc.connect(session.endpoint, autostart=False) as other:
        twin = other.open_heap("doomed")
        block = twin.alloc(8)
        assert twin.is_live
        heap.destroy()
        assert not twin.is_live
        for use in (
            lambda: twin.alloc(8),
            lambda: twin.alloc_many(8, 2),
            block.free,
            lambda: block.view,
            lambda: block.realloc(9),
            lambda: list(twin.walk()),
            twin.validate,
            twin.compact,
            twin.statistics,
            twin.lock,
            lambda: twin.lookup("x"),
            twin.destroy,
        ):
            with pytest.raises(errors.HeapDestroyedError):
                use()
        with pytest.raises(errors.NoSuchHeapError):
            other.open_heap("doomed")


def test_a_control_block_used_again_is_another_heap(session: hc.Session) -> None:
    """A heap that gets a destroyed one's control block does not bring it back to life."""
    with hc.connect(session.endpoint, autostart=False) as other:
        old = session.create_heap("first")
        twin = other.open_heap("first")
        old.destroy()
        news = [session.create_heap() for _ in range(5)]
        assert old.id not in {heap.id for heap in news}
        with pytest.raises(errors.HeapDestroyedError):
            twin.alloc(8)


def test_a_named_heap_goes_with_its_last_session(shared_daemon: Daemon, session: hc.Session) -> None:
    """Closed by one it is still there; closed by all it is gone."""
    other = hc.connect(shared_daemon.endpoint, autostart=False)
    session.create_heap("shared").alloc(8)
    other.open_heap("shared")
    session.open_heap("shared").close()
    assert [info.name for info in other.heaps() if info.name == "shared"] == ["shared"]
    other.close()
    with pytest.raises(errors.NoSuchHeapError):
        session.open_heap("shared")


def test_a_persistent_heap_stays_until_destroyed(shared_daemon: Daemon, session: hc.Session) -> None:
    """No session has it open, and it is there, block and bytes."""
    with hc.connect(shared_daemon.endpoint, autostart=False) as other:
        block = other.create_heap("lasting", persistent=True).alloc(5)
        block.view[:] = b"stays"
        handle = block.handle
    heap = session.open_heap("lasting")
    assert bytes(session.open(handle).view) == b"stays"
    heap.destroy()


def test_closing_a_heap_twice_is_harmless(session: hc.Session) -> None:
    """And a closed heap says that it is."""
    heap = session.create_heap("closed")
    heap.close()
    heap.close()
    assert not heap.is_live
    with pytest.raises(errors.ClosedError):
        heap.alloc(8)


def test_the_default_heap_is_made_once(session: hc.Session) -> None:
    """A session has one, which cannot be destroyed."""
    assert session.default_heap is session.default_heap
    assert session.default_heap.info.is_default
    with pytest.raises(PermissionError):
        session.default_heap.destroy()
    with session.default_heap.alloc(100) as block:
        block.view[:] = b"x" * 100


def test_heaps_are_opened_by_name_once(session: hc.Session) -> None:
    """One object a heap and session; a second of the name is refused."""
    heap = session.create_heap("mine")
    assert session.open_heap("mine") is heap
    with pytest.raises(errors.HeapExistsError):
        session.create_heap("mine")
    with pytest.raises(errors.NoSuchHeapError):
        session.open_heap("yours")
    assert heap.name == "mine"


@pytest.mark.parametrize("name", ["", "x" * 10_000, "nul\0", 7, "\ud800"])
def test_a_name_that_is_none_is_refused(session: hc.Session, heap: hc.Heap, name: str) -> None:
    """Too long, empty, with a NUL, not text: told before anything is sent."""
    block = heap.alloc(8)
    for use in (lambda: session.create_heap(name), lambda: heap.publish(name, block), lambda: session.open_heap(name)):
        with pytest.raises(errors.InvalidArgumentError):
            use()


def test_a_policy_for_orphans_that_is_none_is_refused(session: hc.Session) -> None:
    """It is "keep" or "free"."""
    with pytest.raises(errors.InvalidArgumentError):
        session.create_heap(orphans="burn")


def test_a_heap_with_a_largest_block_refuses_larger_ones(session: hc.Session) -> None:
    """max_block bounds a request."""
    heap = session.create_heap(max_block=1000)
    heap.alloc(1000)
    with pytest.raises(errors.BlockTooLargeError):
        heap.alloc(1001)
