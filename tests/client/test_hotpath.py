"""The hot path alone, over words of its own: each point where CPython may run a signal handler or another thread.

Those points are after calls. So a call is replaced by one that raises, or does what another thread would do, once it
has done its work.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from heapd.layout import BUSY, CACHED, SLAB_WORD
from heapd_client import hotpath
from heapd_client.hotpath import is_quiet, make_alloc
from tests.client.rig import (
    CACHED_WORD,
    LARGER,
    LIVE,
    LIVE_SLOT,
    SESSION,
    SIZE,
    Odd,
    Rig,
    Stack,
    at_getrefcount,
    give_view,
    interrupt,
)
from tests.interrupts import Interrupt


@pytest.fixture(params=["locked", "unlocked"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(locked=request.param == "locked")


@pytest.fixture
def count_references(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Actions that run after the next calls of getrefcount in the hot path."""
    return at_getrefcount(hotpath, monkeypatch)


# -- what it does ------------------------------------------------------------------------------------------------------
def test_alloc_pops_and_stores_and_free_undoes_both(rig: Rig) -> None:
    """The word says BUSY with the size, then CACHED again with the same generation; the mutex is free after each."""
    block = rig.alloc(SIZE)
    word = rig.words[block.slot]
    assert (SLAB_WORD.state(word), SLAB_WORD.size(word), SLAB_WORD.session(word)) == (BUSY, SIZE, SESSION)
    assert block._word == word
    assert len(rig.stack) == 3
    block.free()
    assert rig.words[block.slot] == block._base == CACHED_WORD
    assert (block.is_free, len(rig.stack), rig.depth, rig.slow) == (True, 4, 0, [])


def test_a_block_that_somebody_refers_to_is_left_to_the_slow_path(rig: Rig) -> None:
    """The object is handed on, unchanged, so that another one is made for its memory."""
    kept = rig.stack[-2]
    rig.alloc(SIZE)
    assert rig.slow == [(SIZE, False, kept)]
    assert kept.is_free
    assert rig.state(kept) == CACHED


@pytest.mark.parametrize("size", [48, 65, 0, -1, 1 << 70, "64", None, [], 64.0])
def test_a_size_that_is_no_key_is_left_to_the_slow_path(rig: Rig, size: object) -> None:
    """Nothing has changed then."""
    rig.alloc(size)
    assert rig.slow == [(size, False, None)]
    assert (len(rig.stack), rig.depth) == (4, 0)


def test_a_key_that_is_no_size_changes_nothing(rig: Rig) -> None:
    """The block it got goes back."""
    size = Odd(SIZE)
    rig.alloc(size)
    assert rig.slow == [(size, False, None)]
    assert (len(rig.stack), rig.depth) == (4, 0)
    assert all(block.is_free and rig.state(block) == CACHED for block in rig.stack)


@pytest.mark.parametrize("case", ["epoch", "zero", "one", "none"])
def test_alloc_leaves_what_it_cannot_do_to_the_slow_path(rig: Rig, case: str) -> None:
    """Another epoch, zeroed bytes, a stack of one block or none."""
    if case == "epoch":
        rig.words[LIVE_SLOT] += 2
    elif case in ("one", "none"):
        del rig.stack[case == "one" :]
    rig.alloc(SIZE, case == "zero")
    assert [call[2] for call in rig.slow] == [None]
    assert rig.depth == 0


@pytest.mark.parametrize("case", ["epoch", "limit", "freed by another", "a handle made", "freed twice"])
def test_free_leaves_what_it_cannot_do_to_the_slow_path(rig: Rig, case: str) -> None:
    """The block is as it was."""
    block = rig.alloc(SIZE)
    if case == "epoch":
        rig.words[LIVE_SLOT] += 2
    elif case == "limit":
        rig.set_limit(3)
    elif case == "freed by another":
        rig.words[block.slot] = SLAB_WORD.cached(SESSION + 1, 10)
    elif case == "a handle made":
        block._word = -block._word
    else:
        block.free()
    word, length = rig.words[block.slot], len(rig.stack)
    block.free()
    assert rig.slow == [block]
    assert (rig.words[block.slot], len(rig.stack), rig.depth) == (word, length, 0)


def test_acquisitions_are_counted_once() -> None:
    """What take_count tells it forgets."""
    rig = Rig(locked=True)
    for _ in range(3):
        rig.alloc(SIZE).free()
    assert [take() for take in rig.take_counts] == [3, 3, 0]
    assert [take() for take in rig.take_counts] == [0, 0, 0]


# -- the next larger bin -----------------------------------------------------------------------------------------------
def test_an_empty_bin_is_helped_out_by_the_next_larger_one(rig: Rig) -> None:
    """The block is BUSY with the size asked for; freed, it is in the larger bin again, with what it had before."""
    rig.fill_larger(3)
    block = rig.alloc(SIZE)
    word = rig.words[block.slot]
    assert type(block) is rig.larger_kind
    assert (block.extent, SLAB_WORD.state(word), SLAB_WORD.size(word)) == (LARGER, BUSY, SIZE)
    assert len(rig.larger) == 2
    block.free()
    assert rig.words[block.slot] == block._base == CACHED_WORD
    assert (len(rig.stack), len(rig.larger), rig.depth, rig.slow) == (0, 3, 0, [])
    assert sum(take() for take in rig.take_counts) == (2 if rig.lock else 0)


def test_a_bin_that_has_blocks_leaves_the_larger_one_alone(rig: Rig) -> None:
    """What is wasted is wasted only where a round trip would be."""
    rig.larger.append(rig.make_block(rig.larger_kind, 16, LARGER))
    rig.larger.append(rig.make_block(rig.larger_kind, 17, LARGER))
    assert type(rig.alloc(SIZE)) is rig.kind
    assert len(rig.larger) == 2


@pytest.mark.parametrize("case", ["no larger bin", "none there", "one there", "still referred to"])
def test_what_the_larger_bin_cannot_do_is_left_to_the_slow_path(rig: Rig, case: str) -> None:
    """It is asked once; the object that somebody still refers to is handed on."""
    rig.fill_larger({"one there": 1, "still referred to": 3}.get(case, 0))
    if case == "no larger bin":
        rig.larger_of.clear()
    kept = rig.larger[-2] if case == "still referred to" else None
    rig.alloc(SIZE)
    assert rig.slow == [(SIZE, False, kept)]
    assert (len(rig.larger), rig.depth) == ({"one there": 1, "still referred to": 2}.get(case, 0), 0)


def test_a_key_that_is_no_size_returns_a_block_to_the_larger_bin(rig: Rig) -> None:
    """It does not end up in the bin that was asked, where its bytes would be counted wrongly."""
    rig.fill_larger(3)
    size = Odd(SIZE)
    rig.alloc(size)
    assert rig.slow == [(size, False, None)]
    assert (len(rig.stack), len(rig.larger), rig.depth) == (0, 3, 0)


def check_larger_is_whole(rig: Rig, *, lost: int = 0) -> None:
    """Each of three blocks is CACHED; all but `lost` are in the larger bin, once, none in the smaller."""
    assert (len(rig.stack), len(rig.larger), rig.depth) == (0, 3 - lost, 0)
    assert len(set(map(id, rig.larger))) == len(rig.larger)
    assert all(type(block) is rig.larger_kind and block.is_free for block in rig.larger)
    assert [rig.words[slot] for slot in (24, 25, 26)] == [CACHED_WORD] * 3


@pytest.mark.parametrize("at", ["pop of none", "pop", "getrefcount"])
def test_an_interrupt_there_loses_no_more_than_a_cached_block(
    rig: Rig, at: str, count_references: list[Callable[[], None]]
) -> None:
    """Only the result of the pop itself is lost to us, and giving everything back finds it by its word."""
    rig.fill_larger(3)
    if at == "pop of none":
        rig.stack.before = interrupt
    elif at == "pop":
        rig.larger.after = interrupt
    else:
        count_references.append(interrupt)
    with pytest.raises(Interrupt):
        rig.alloc(SIZE)
    count_references.clear()
    check_larger_is_whole(rig, lost=at == "pop")


def test_an_interrupt_as_the_mutex_is_given_up_returns_the_larger_block() -> None:
    """After the store: the word says CACHED again, and the block is where it came from."""
    rig = Rig(locked=True)
    rig.fill_larger(3)
    rig.at["unlock"] = interrupt
    with pytest.raises(Interrupt):
        rig.alloc(SIZE)
    check_larger_is_whole(rig)


def test_an_interrupt_after_the_front_end_stopped_fills_no_larger_bin(
    rig: Rig, count_references: list[Callable[[], None]]
) -> None:
    """Its lists stay empty: whoever gives everything back has taken them."""

    def stop() -> None:
        rig.stack_of.clear()
        rig.larger_of.clear()
        rig.larger.clear()
        raise Interrupt

    rig.fill_larger(3)
    count_references.append(stop)
    with pytest.raises(Interrupt):
        rig.alloc(SIZE)
    count_references.clear()
    check_larger_is_whole(rig, lost=3)


# -- a signal handler raises -------------------------------------------------------------------------------------------
def check_nothing_is_held(rig: Rig, *, lost: int = 0) -> None:
    """No block is BUSY, the mutex is free, and at most so many blocks are missing from the stack."""
    assert rig.depth == 0
    assert len(rig.stack) >= 4 - lost
    assert len(set(map(id, rig.stack))) == len(rig.stack)
    assert all(rig.words[slot] == CACHED_WORD for slot in range(8, 12))
    assert all(block.is_free for block in rig.stack)
    rig.alloc(SIZE).free()
    assert rig.slow == []


def test_alloc_interrupted_after_the_pop_loses_no_more_than_a_cached_block(rig: Rig) -> None:
    """The pop's result is lost to us; its word says CACHED, so giving everything back finds it."""
    rig.stack.after = interrupt
    with pytest.raises(Interrupt):
        rig.alloc(SIZE)
    check_nothing_is_held(rig, lost=1)


def test_alloc_interrupted_before_the_store_puts_the_block_back(
    rig: Rig, count_references: list[Callable[[], None]]
) -> None:
    """After getrefcount."""
    count_references.append(interrupt)
    with pytest.raises(Interrupt):
        rig.alloc(SIZE)
    count_references.clear()
    check_nothing_is_held(rig)


@pytest.mark.parametrize("at", ["trylock", "settle", "unlock"])
def test_locked_alloc_interrupted_is_undone(at: str) -> None:
    """After each call of the mutex: it is free, and no block is BUSY that nobody got."""
    rig = Rig(locked=True)
    rig.busy_for_now = at == "settle"
    rig.at[at] = interrupt
    with pytest.raises(Interrupt):
        rig.alloc(SIZE)
    check_nothing_is_held(rig)


@pytest.mark.parametrize("at", ["trylock", "settle", "append", "unlock"])
def test_locked_free_interrupted_is_done_or_not(at: str) -> None:
    """The block says which; the mutex is free."""
    rig = Rig(locked=True)
    block = rig.alloc(SIZE)
    rig.busy_for_now = at == "settle"
    if at == "append":
        rig.stack.after = interrupt
    else:
        rig.at[at] = interrupt
    with pytest.raises(Interrupt):
        block.free()
    assert rig.depth == 0
    assert block.is_free == (at in ("append", "unlock"))
    assert rig.state(block) == (CACHED if block.is_free else BUSY)
    if not block.is_free:
        block.free()
    del block
    check_nothing_is_held(rig)


def test_an_interrupt_after_the_front_end_stopped_is_passed_on(rig: Rig) -> None:
    """Another thread emptied the lists meanwhile: the interrupt arrives, not a KeyError, and the mutex is free."""

    def stop() -> None:
        rig.stack_of.clear()
        raise Interrupt

    if rig.take_counts:
        rig.at["unlock"] = stop
    else:
        rig.stack.after = stop
    with pytest.raises(Interrupt):
        rig.alloc(SIZE)
    assert rig.depth == 0
    assert all(rig.words[slot] == CACHED_WORD for slot in range(8, 12))


# -- views -------------------------------------------------------------------------------------------------------------
def test_free_sees_each_kind_of_view(rig: Rig) -> None:
    """Its own that somebody holds, a slice, a cast; after they are gone it goes through."""
    block = rig.alloc(SIZE)
    for derive in (lambda view: view, lambda view: view[3:], lambda view: view.cast("Q")):
        rig.slow.clear()
        held = derive(give_view(block))
        block.free()
        assert rig.slow == [block]
        assert not block.is_free
        held.release()
        del held
    block._view = memoryview(block._buffer)  # type: ignore[arg-type]
    rig.slow.clear()
    block.free()
    assert block.is_free
    assert rig.slow == []


@pytest.mark.parametrize("calls_before", [0, 1])
@pytest.mark.parametrize("is_derived", [False, True])
def test_an_interrupted_free_does_not_forget_a_view(
    rig: Rig, count_references: list[Callable[[], None]], calls_before: int, is_derived: bool
) -> None:
    """A view that is alive is seen by the next free, wherever a signal handler struck in this one."""
    block = rig.alloc(SIZE)
    held = give_view(block)[1:] if is_derived else give_view(block)
    count_references += [lambda: None] * calls_before + [interrupt]
    with contextlib.suppress(Interrupt):
        block.free()
    count_references.clear()
    rig.slow.clear()
    block.free()
    assert not block.is_free
    assert rig.slow == [block]
    assert held.nbytes


def test_a_view_is_cut_anew_for_another_life_or_size(rig: Rig) -> None:
    """The buffer is used again only while `_seen` is the very word; else the slow property looks."""
    block = rig.alloc(SIZE)
    give_view(block)
    block._view, block._seen = None, block._word
    assert block.view.nbytes == SIZE
    assert block.view is block._view


# -- other threads -----------------------------------------------------------------------------------------------------
def in_thread(work: Callable[[], object]) -> Callable[[], None]:
    """Do `work` in another thread, and wait for it: what a switch of threads at that point may amount to."""

    def run() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)

    return run


@pytest.mark.parametrize("calls_before", [0, 1])
def test_two_threads_that_free_a_block_with_a_view_do_not_both_succeed(
    count_references: list[Callable[[], None]], calls_before: int
) -> None:
    """Without a mutex: the second one comes while the first looks at the view."""
    rig = Rig(locked=False)
    block = rig.alloc(SIZE)
    give_view(block)
    count_references += [lambda: None] * calls_before + [in_thread(block.free)]
    block.free()
    assert len(rig.stack) == 4
    assert rig.slow == [block]


def test_a_front_end_that_stops_during_a_free_gets_no_block(count_references: list[Callable[[], None]]) -> None:
    """The limit is looked at after the last call before the store."""
    rig = Rig(locked=False)
    block = rig.alloc(SIZE)
    give_view(block)
    count_references += [lambda: None, lambda: rig.set_limit(0)]
    block.free()
    assert rig.slow == [block]
    assert rig.state(block) == BUSY


def test_a_thread_between_pop_and_store_is_seen(rig: Rig) -> None:
    """is_quiet waits for other threads to leave; this thread is told at once."""
    told: list[bool] = []
    rig.stack.after = lambda: told.append(is_quiet(set()))
    rig.alloc(SIZE)
    assert told == [False]
    entered, go = threading.Event(), threading.Event()

    def stay() -> None:
        entered.set()
        go.wait(10)

    rig.stack.after = stay
    thread = threading.Thread(target=rig.alloc, args=(SIZE,))
    thread.start()
    assert entered.wait(10)
    assert not is_quiet(set(), patience_s=0.01)
    assert is_quiet({stay.__code__, Stack.run.__code__, Stack.pop.__code__}, patience_s=0.01)
    go.set()
    assert is_quiet(set(), patience_s=10)
    thread.join(10)


def test_a_slow_path_below_alloc_is_harmless(rig: Rig) -> None:
    """Nothing popped is relied on there."""
    told: list[bool] = []

    def slow(size: int, zero: bool, popped: Any) -> None:
        told.append(is_quiet({slow.__code__}))

    alloc = make_alloc(rig.words, LIVE_SLOT, LIVE, rig.stack_of, rig.larger_of, slow)  # type: ignore[arg-type]
    alloc(1)
    assert told == [True]
