"""What the hot path takes runs from that come home, or go round one by one; over words of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from heapd.errors import ClosedError
from heapd.layout import BUSY, CACHED, SLAB_WORD
from heapd_client import stream as module
from heapd_client.hotpath import is_quiet
from heapd_client.stream import Stream
from tests.client.rig import CACHED_WORD, SESSION, SIZE, Odd, Rig, at_getrefcount, give_view, interrupt
from tests.interrupts import Interrupt


class Streaming(Rig):
    """A rig whose bin is a stream. Fields: away (blocks that were handed out, by slot)."""

    def __init__(self, *, locked: bool, blocks: int) -> None:
        super().__init__(locked=locked, blocks=blocks)
        self.away: dict[int, Any] = {}
        self.stack_of[SIZE + 15 >> 4] = Stream(self.words, self.stack, self.away)

    def hand_out(self, number: int) -> None:
        """Have a block away: BUSY, with what its word is to be once it is home."""
        block = self.make_block(self.kind, number, SIZE)
        self.words[block.slot] = SLAB_WORD.busy(SESSION, 8, SIZE)
        block._word = -self.words[block.slot]
        block._tail = (40 + number, 7)
        self.words[40 + number] = 7
        self.away[block.slot] = block

    def come_home(self, slot: int) -> None:
        self.words[slot] = CACHED_WORD


@pytest.fixture(params=["locked", "unlocked"])
def single(request: pytest.FixtureRequest) -> Streaming:
    """One cached block, none handed out."""
    return Streaming(locked=request.param == "locked", blocks=1)


@pytest.fixture(params=["locked", "unlocked"])
def handed_out(request: pytest.FixtureRequest) -> Streaming:
    """Nothing cached; the blocks of the slots 8 and 9 were handed out, in this order."""
    rig = Streaming(locked=request.param == "locked", blocks=0)
    rig.hand_out(0)
    rig.hand_out(1)
    return rig


@pytest.fixture
def count_references(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Actions that run after the next calls of getrefcount in a stream."""
    return at_getrefcount(module, monkeypatch)


# -- runs that come home -----------------------------------------------------------------------------------------------
def test_alloc_takes_a_block_that_came_home(handed_out: Streaming) -> None:
    """The one that was out longest, without a list in between; it is no longer away."""
    handed_out.come_home(8)
    block = handed_out.alloc(SIZE)
    assert (block.slot, handed_out.state(block)) == (8, BUSY)
    assert block._word == handed_out.words[8] == CACHED_WORD + SIZE
    assert (list(handed_out.away), handed_out.slow, handed_out.depth) == ([9], [], 0)


@pytest.mark.parametrize(("home", "taken"), [((8, 9, 10), 10), ((8, 9), 9), ((8,), 8), ((9,), 9)])
def test_of_large_blocks_the_last_one_that_is_home_is_taken(home: tuple[int, ...], taken: int) -> None:
    """So that few go round, whose bytes are in the processor's caches."""
    rig = Streaming(locked=False, blocks=0)
    rig.stack_of[SIZE + 15 >> 4] = Stream(rig.words, rig.stack, rig.away, is_large=True)
    for number in range(3):
        rig.hand_out(number)
    for slot in home:
        rig.come_home(slot)
    assert rig.alloc(SIZE).slot == taken
    assert taken not in rig.away


def test_a_block_that_is_still_out_stays_so(handed_out: Streaming) -> None:
    """It is looked at last the next time; the slow path decides now."""
    before = handed_out.words[8]
    handed_out.alloc(SIZE)
    assert handed_out.slow == [(SIZE, False, None)]
    assert handed_out.words[8] == before
    assert list(handed_out.away) == [9, 8]


@pytest.mark.parametrize("what", ["shortened", "referred to", "its view referred to"])
def test_a_block_that_is_not_as_it_was_is_left_to_the_slow_path(handed_out: Streaming, what: str) -> None:
    """Another process shortened the run; or somebody here still has the object, or a view of it."""
    handed_out.come_home(8)
    kept: Any = None
    if what == "shortened":
        handed_out.words[40] = 6
    elif what == "referred to":
        kept = handed_out.away[8]
    else:
        kept = give_view(handed_out.away[8])
    handed_out.alloc(SIZE)
    assert handed_out.slow == [(SIZE, False, None)]
    assert handed_out.words[8] == CACHED_WORD
    assert sorted(handed_out.away) == [8, 9]
    del kept


def test_its_views_are_cut_from_the_buffer_of_before(handed_out: Streaming) -> None:
    """If it has the size of before: no slice need be made."""
    give_view(handed_out.away[8])
    buffer = id(handed_out.away[8]._buffer)
    handed_out.come_home(8)
    block = handed_out.alloc(SIZE)
    assert (block._view, block._seen) == (None, block._word)
    assert block.view.nbytes == SIZE
    assert id(block._buffer) == buffer


def test_an_interrupt_there_leaves_the_block_away(
    handed_out: Streaming, count_references: list[Callable[[], None]]
) -> None:
    """It is found the next time."""
    handed_out.come_home(8)
    count_references.append(interrupt)
    with pytest.raises(Interrupt):
        handed_out.alloc(SIZE)
    assert handed_out.words[8] == CACHED_WORD
    assert sorted(handed_out.away) == [8, 9]
    assert (handed_out.stack, handed_out.depth) == ([], 0)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_size_that_is_none_leaves_the_block_cached(blocks: int) -> None:
    """As one that finds the bin, and then is not to be added to a word."""
    rig = Streaming(locked=False, blocks=blocks)
    rig.hand_out(4)
    rig.come_home(12)
    rig.alloc(Odd(SIZE))
    assert len(rig.slow) == 1
    assert rig.words[12] == CACHED_WORD
    assert len(rig.stack) == blocks + 1
    assert all(block.is_free for block in rig.stack)


def test_what_the_stack_has_to_spare_comes_first(single: Streaming) -> None:
    """As without a stream."""
    single.hand_out(4)
    single.come_home(12)
    list.append(single.stack, single.make_block(single.kind, 1, SIZE))
    assert single.alloc(SIZE).slot == 8
    assert single.alloc(SIZE).slot == 12
    assert single.alloc(SIZE).slot == 9
    assert single.alloc(SIZE) is None
    assert single.slow == [(SIZE, False, None)]


# -- one block, allocated and freed in turn ----------------------------------------------------------------------------
def test_a_single_block_goes_round(single: Streaming) -> None:
    """In a new object each time, while the caller still refers to the old one; the word says what it said before."""
    first = single.alloc(SIZE)
    first.free()
    second = single.alloc(SIZE)
    assert (second is first, second.slot, single.slow, single.depth) == (False, first.slot, [], 0)
    assert single.words[second.slot] == second._word == CACHED_WORD + SIZE
    second.free()
    assert (len(single.stack), single.state(second)) == (1, CACHED)


def test_a_stale_reference_does_not_come_back_to_life(single: Streaming) -> None:
    """The object of before is free, and can do nothing to the one of now."""
    first = single.alloc(SIZE)
    view = give_view(first)
    del view
    first.free()
    second = single.alloc(SIZE)
    assert first.is_free
    with pytest.raises(ClosedError):
        first.view  # noqa: B018
    first.free()
    assert single.slow == [first]
    first.release_views()
    assert (single.state(second), second.view.nbytes) == (BUSY, SIZE)


def test_an_object_that_nobody_refers_to_is_used_again(single: Streaming) -> None:
    """There is nothing that could come back to life."""
    number = id(single.stack[0])
    assert id(single.alloc(SIZE)) == number


def test_the_new_object_takes_over_the_buffer(single: Streaming) -> None:
    """So that its views need no slice of the mapping either."""
    first = single.alloc(SIZE)
    give_view(first)
    buffer = id(first._buffer)
    first.free()
    second = single.alloc(SIZE)
    assert (second._seen, id(second._buffer)) == (second._word, buffer)
    assert (first._exporter, first._buffer) == (None, None)


def test_an_interrupt_leaves_the_single_block_cached(
    single: Streaming, count_references: list[Callable[[], None]]
) -> None:
    """In the stack, as before."""
    count_references.append(interrupt)
    with pytest.raises(Interrupt):
        single.alloc(SIZE)
    assert (len(single.stack), single.words[8], single.depth) == (1, CACHED_WORD, 0)


def test_a_thread_in_a_stream_is_not_quiet(single: Streaming, count_references: list[Callable[[], None]]) -> None:
    """It may still make the block BUSY that it popped."""
    told: list[bool] = []
    count_references.append(lambda: told.append(is_quiet(set(), patience_s=0.0)))
    assert single.alloc(SIZE).slot == 8
    assert told == [False]
