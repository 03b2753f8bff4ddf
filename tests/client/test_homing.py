"""Large blocks that come home: a consumer frees what a producer allocated, and the producer has it again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.layout import CACHED, RUN_WORD
from heapd.records import EntryKind
from heapd.units import KIB, MIB
from heapd_client.homing import Homes
from tests.client.tools import blocks_of, count_requests
from tests.harness import Daemon

FRAME = 1 * MIB
SIZES = [32 * KIB, 64 * KIB, 100_000, FRAME]


@pytest.fixture
def producer(shared: hc.Heap) -> hc.Heap:
    return shared


@pytest.fixture
def consumer(theirs: hc.Heap) -> hc.Heap:
    return theirs


def hand_over(block: hc.Block, consumer: hc.Heap) -> hc.Block:
    return consumer.session.open(block.handle.encode())


# -- what it is for ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
def test_a_stream_of_frames_lives_on_those_in_flight(producer: hc.Heap, consumer: hc.Heap, size: int) -> None:
    """A thousand frames, four in flight, and no more blocks than a few; each carries what was written to it."""
    in_flight: list[hc.Block] = []
    for number in range(1000):
        block = producer.alloc(size)
        block.view[:4] = block.view[-4:] = number.to_bytes(4, "little")
        in_flight.append(hand_over(block, consumer))
        del block
        if len(in_flight) == 4:
            oldest = in_flight.pop(0)
            assert oldest.view[:4] == oldest.view[-4:] == (number - 3).to_bytes(4, "little")
            oldest.free()
            del oldest
    statistics = producer.statistics()
    assert statistics.allocations <= 16
    assert statistics.busy_blocks == 3
    assert producer.validate() == []


def test_what_came_home_is_cached_by_its_owner(producer: hc.Heap, consumer: hc.Heap) -> None:
    """The walk names the producer as the one who has it, and no message was sent."""
    block = producer.alloc(FRAME)
    opened = hand_over(block, consumer)
    requests = count_requests(consumer.session)
    opened.free()
    assert not requests
    (run,) = blocks_of(producer, EntryKind.CACHED)
    assert (run.address, run.session) == (block.address, producer.session.number)
    with pytest.raises(hc.DoubleFreeError):
        block.free()


@pytest.mark.parametrize("what", ["heap", "session"])
def test_a_run_of_a_heap_that_was_closed_here_cannot_be_freed(producer: hc.Heap, consumer: hc.Heap, what: str) -> None:
    """Its object is of no use any more; opened again, it is one of the heap as it is opened again."""
    block = producer.alloc(FRAME)
    hand_over(block, consumer).free()
    block = producer.alloc(FRAME)
    opened = hand_over(block, consumer)
    (consumer if what == "heap" else consumer.session).close()
    with pytest.raises(hc.ClosedError):
        opened.free()
    del opened
    if what == "heap":
        again = consumer.session.open(block.handle)
        assert again.heap.is_live
        again.free()
        assert producer.statistics().busy_blocks == 0


def test_nothing_is_read_where_a_run_has_moved_to_and_gone(producer: hc.Heap, consumer: hc.Heap) -> None:
    """Its slab is decommitted, and to read its word would commit a page that the daemon knows nothing of."""
    blocks = [producer.alloc(8 * KIB) for _ in range(4)]  # one cannot grow into the next
    opened = hand_over(min(blocks, key=lambda block: block.address), consumer)
    opened.realloc(9 * KIB)
    assert not producer.session.arena.shape.is_run_slot(opened.slot)
    opened.free()
    segment = Path("/dev/shm") / producer.session.arena.name
    for heap in (consumer, producer):
        heap.trim()
        heap.compact()
    before = segment.stat().st_blocks * 512
    assert before == producer.session.statistics().committed
    consumer.session.close()
    assert segment.stat().st_blocks * 512 == producer.session.statistics().committed <= before


def test_an_object_of_the_owner_goes_stale_when_the_block_comes_home(producer: hc.Heap, consumer: hc.Heap) -> None:
    """It is not the one that the memory's next life gets."""
    block = producer.alloc(FRAME)
    hand_over(block, consumer).free()
    again = producer.alloc(FRAME)
    assert again.address == block.address
    assert again is not block
    with pytest.raises(hc.StaleHandleError):
        block.free()
    again.free()


def test_a_handle_goes_stale_when_the_block_comes_home(producer: hc.Heap, consumer: hc.Heap) -> None:
    """Also for the objects that the consumer keeps for blocks that come again."""
    first = producer.alloc(FRAME)
    old = first.handle
    consumer.session.open(old).free()
    del first
    second = producer.alloc(FRAME)
    assert second.handle.address == old.address
    with pytest.raises(hc.StaleHandleError):
        consumer.session.open(old)
    opened = consumer.session.open(second.handle)
    with pytest.raises(hc.StaleHandleError):
        consumer.session.open(old)
    opened.free()


def test_two_objects_of_one_block_are_two(producer: hc.Heap, consumer: hc.Heap) -> None:
    """One that is in use is not given out again; its views and its free are its own."""
    for _ in range(3):
        block = producer.alloc(FRAME)
        one, other = hand_over(block, consumer), hand_over(block, consumer)
        assert one is not other
        view = one.view
        other.free()
        with pytest.raises((hc.DoubleFreeError, hc.BlockInUseError)):
            one.free()
        view.release()
        del block, one, other, view


# -- bounds ------------------------------------------------------------------------------------------------------------
def test_an_owner_that_does_not_come_for_its_blocks_gets_no_more(producer: hc.Heap, consumer: hc.Heap) -> None:
    """64 MiB at most lie there for it, beside a frame that it leased ahead, and as much in the consumer's own cache;
    the rest is given back."""
    blocks = [producer.alloc(FRAME) for _ in range(200)]
    handles = [block.handle for block in blocks]
    del blocks
    for handle in handles:
        consumer.session.open(handle).free()
    consumer.statistics()  # what it gave back without waiting is given back by now
    held = dict.fromkeys((producer.session.number, consumer.session.number), 0)
    for entry in producer.walk():
        if entry.kind == EntryKind.CACHED:
            held[entry.session] += FRAME
    assert held[producer.session.number] <= 64 * MIB + FRAME
    assert held[consumer.session.number] <= 64 * MIB
    assert producer.statistics().committed <= 130 * MIB


def test_an_owner_with_too_much_gives_back(producer: hc.Heap, consumer: hc.Heap) -> None:
    """What comes home counts in its cache."""
    for _ in range(4):
        handles = [producer.alloc(FRAME).handle for _ in range(60)]
        for handle in handles:
            consumer.session.open(handle).free()
        producer.alloc(FRAME).free()
        assert len(blocks_of(producer, EntryKind.CACHED)) <= 66


# -- who is no owner ---------------------------------------------------------------------------------------------------
def test_a_block_of_a_dead_session_stays_here(shared_daemon: Daemon, consumer: hc.Heap) -> None:
    """Nobody would come for it."""
    with hc.connect(shared_daemon.endpoint, autostart=False) as owner:
        handle = owner.open_heap("shared").alloc(FRAME).handle
    opened = consumer.session.open(handle)
    opened.free()
    assert consumer.alloc(FRAME).address == handle.address


def test_a_block_sent_to_a_session_that_dies_meanwhile_is_not_lost(
    shared_daemon: Daemon, consumer: hc.Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sent it looks again, and has the daemon take it back."""
    owner = hc.connect(shared_daemon.endpoint, autostart=False)
    handle = owner.open_heap("shared").alloc(FRAME).handle
    opened = consumer.session.open(handle)
    homes, words = consumer.homes, consumer.mapping.words
    number = RUN_WORD.session(words[handle.slot])
    home = homes._home(number)
    assert home is not None
    monkeypatch.setattr(Homes, "_home", lambda self, number: home)
    owner.close()  # the block is an orphan now; we still believe that its owner lives
    word = words[handle.slot]
    assert homes.send(opened, word, opened.extent)
    assert RUN_WORD.state(words[handle.slot]) != CACHED
    assert blocks_of(consumer, EntryKind.BUSY) == []
    assert consumer.validate() == []


def test_a_session_that_dies_leaves_nothing_cached_by_another_that_died(
    shared_daemon: Daemon, producer: hc.Heap
) -> None:
    """A sender that is killed between its store and its second look."""
    owner = hc.connect(shared_daemon.endpoint, autostart=False)
    handle = owner.open_heap("shared").alloc(FRAME).handle
    number = owner.number
    owner.close()
    words = producer.mapping.words
    words[handle.slot] = RUN_WORD.cached(number, RUN_WORD.next_generation(handle.generation))
    with hc.connect(shared_daemon.endpoint, autostart=False) as sender:
        sender.open_heap("shared")
    assert RUN_WORD.state(words[handle.slot]) != CACHED


# -- ways past it ------------------------------------------------------------------------------------------------------
def test_a_block_freed_by_its_owner_after_all_is_given_out_once(producer: hc.Heap, consumer: hc.Heap) -> None:
    """The handle was made for nothing."""
    for _ in range(3):
        block = producer.alloc(FRAME)
        opened = hand_over(block, consumer)
        block.free()
        one, other = producer.alloc(FRAME), producer.alloc(FRAME)
        assert one.address != other.address
        with pytest.raises((hc.DoubleFreeError, hc.StaleHandleError)):
            opened.free()
        one.free()
        other.free()


def test_blocks_of_a_batch_come_home_too(producer: hc.Heap, consumer: hc.Heap) -> None:
    """However they were allocated, and whatever made the handle."""
    addresses = set()
    for _ in range(5):
        blocks = producer.alloc_many([FRAME] * 4)
        addresses |= {block.address for block in blocks}
        for block in blocks:
            assert block.generation
            hand_over(block, consumer).free()
        del block, blocks
    assert len(addresses) <= 8


def test_a_block_found_by_its_address_alone_goes_to_the_cache_of_who_frees_it(
    producer: hc.Heap, consumer: hc.Heap
) -> None:
    """Its owner does not know that it is out, and would not look for it."""
    address = producer.alloc(FRAME).address
    consumer.session.block_at(address).free()
    assert consumer.alloc(FRAME).address == address


@pytest.mark.parametrize("size", [FRAME // 2, 2 * FRAME])
def test_a_block_resized_elsewhere_is_not_taken_for_what_it_was(
    producer: hc.Heap, consumer: hc.Heap, size: int
) -> None:
    """What its owner then allocates overlaps nothing, and the heap is whole."""
    block = producer.alloc(FRAME)
    opened = hand_over(block, consumer)
    del block
    opened.realloc(size)
    opened.free()
    taken = [producer.alloc(FRAME) for _ in range(4)] + [consumer.alloc(FRAME // 2) for _ in range(4)]
    spans = sorted((each.address, each.address + each.size) for each in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert producer.validate() == []


def test_what_is_out_when_the_caches_are_given_back_comes_home_later(producer: hc.Heap, consumer: hc.Heap) -> None:
    """A trim does not forget it."""
    block = producer.alloc(FRAME)
    opened = hand_over(block, consumer)
    del block
    producer.trim()
    producer.alloc(64).free()
    opened.free()
    assert producer.alloc(FRAME).address == opened.address


def test_a_heap_whose_orphans_are_freed_sends_nothing_home(shared_daemon: Daemon, session: hc.Session) -> None:
    """The daemon may be about to free the block."""
    heap = session.create_heap("orphans", serialize=False, orphans="free")
    with hc.connect(shared_daemon.endpoint, autostart=False) as other:
        handle = heap.alloc(FRAME).handle
        other.open(handle).free()
    assert blocks_of(heap, EntryKind.CACHED) == blocks_of(heap, EntryKind.BUSY) == []


@pytest.mark.parametrize("size", [100, 5000, 40_000, 200_000])
def test_a_frame_that_was_resized_has_a_handle_all_the_same(producer: hc.Heap, consumer: hc.Heap, size: int) -> None:
    """Also where it is no run of pages any more."""
    block = producer.alloc(FRAME).realloc(size)
    block.view[:4] = b"kept"
    other = hand_over(block, consumer)
    assert (other.address, other.size, bytes(other.view[:4])) == (block.address, size, b"kept")
    other.free()
    assert producer.validate() == []


@pytest.mark.parametrize("size", [100, 5000, 40_000, 200_000, 3 * MIB])
def test_a_frame_that_its_reader_resized_is_freed_as_what_it_is_now(
    producer: hc.Heap, consumer: hc.Heap, size: int
) -> None:
    """Whether it was moved, cut off or grown: what is sent home is never the word of what it was."""
    for _ in range(3):
        visitor = hand_over(producer.alloc(FRAME), consumer)
        visitor.view[:4] = b"kept"
        block = visitor.realloc(size)
        assert bytes(block.view[:4]) == b"kept"
        block.free()
        assert producer.statistics().busy_blocks == 0
        assert producer.validate() == []


def test_a_frame_that_its_reader_resized_comes_again_as_it_is_then(producer: hc.Heap, consumer: hc.Heap) -> None:
    """An object that is used again shows all of the block, not what it showed last."""
    for _ in range(3):
        visitor = hand_over(producer.alloc(4096), consumer)
        assert visitor.view.nbytes == 4096
        assert visitor.realloc(1000).view.nbytes == 1000
        visitor.free()
        del visitor


@pytest.mark.parametrize("size", [100, 40_000, 2 * FRAME])
def test_a_visitor_that_was_moved_is_this_session_s_own(producer: hc.Heap, consumer: hc.Heap, size: int) -> None:
    """What it is freed as has nothing to do with the block it was."""
    for _ in range(3):
        opened = hand_over(producer.alloc(FRAME), consumer)
        opened.realloc(size)
        assert opened.size == size
        opened.free()
        del opened
        consumer.alloc(size).free()
    assert producer.validate() == []
    assert blocks_of(producer, EntryKind.BUSY) == []


@pytest.mark.parametrize("size", [40_960, 2 * FRAME])
def test_a_block_that_was_moved_comes_home_as_what_it_is(producer: hc.Heap, consumer: hc.Heap, size: int) -> None:
    """It is in the bin of its size now, and the memory of no other block."""
    for _ in range(6):
        block = producer.alloc(FRAME).realloc(size)
        opened = hand_over(block, consumer)
        del block
        opened.free()
        del opened
        taken = [producer.alloc(each) for each in (FRAME, size, FRAME, size)]
        spans = sorted((each.address, each.address + each.size) for each in taken)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        producer.free_many(taken)
        del taken
    assert producer.validate() == []
    assert blocks_of(producer, EntryKind.BUSY) == []


def test_a_frame_that_its_reader_resized_is_counted_as_what_it_was(producer: hc.Heap, consumer: hc.Heap) -> None:
    """What was kept of it is let go whole, so that frames go home after many of them as after none."""
    for _ in range(3):
        opened = hand_over(producer.alloc(MIB), consumer)
        opened.realloc(100_000)
        opened.free()
    consumer.session._guests.clear()
    assert [home.kept for home in consumer.homes._homes.values()] == [0]
