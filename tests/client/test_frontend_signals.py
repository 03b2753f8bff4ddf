"""Exceptions from signal handlers, at any instant of any call; finalisers that free or call inside one.

What must hold after any number of interrupts: no block is lost for good (what fell out of the lists comes back with
trim), every allocated block has an owner who knows of it, the lock is free, the connection works.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

import heapd_client as hc
from heapd.units import MIB
from heapd.wire import KEPT_REPLIES
from heapd_client import errors
from tests.client.tools import check_empty, count_requests
from tests.harness import Daemon, wait_until
from tests.interrupts import interrupts

Setting = Callable[[], hc.Heap]


@pytest.fixture(params=["serialized", "unserialized", "no front end", "serialized, no front end"])
def storm_heap(request: pytest.FixtureRequest, shared_daemon: Daemon):  # type: ignore[no-untyped-def]
    """A heap of a session of its own, with or without lock and front end."""
    has_front_end = "no front end" not in request.param
    with hc.connect(shared_daemon.endpoint, autostart=False, front_end=has_front_end) as session:
        yield session.create_heap(serialize="unserialized" not in request.param and request.param != "no front end")


def check_whole(heap: hc.Heap, live: list[hc.Block]) -> None:
    """Exactly the blocks in `live` are allocated; they can be freed, and nothing is left."""
    assert heap._mutex.depth() == 0
    wait_until(lambda: heap.statistics().busy_blocks == len(live))  # answers to calls given up may be on their way
    heap.trim()
    assert heap.statistics().cached_blocks == 0
    for block in live:
        block.free()
    check_empty(heap)
    heap.alloc(64).free()


def alloc_into(live: list[hc.Block], heap: hc.Heap, size: int, zero: bool) -> None:
    """Nothing is called between the end of alloc and that of append: no signal is looked for there."""
    live.append(heap.alloc(size, zero=zero))


def test_interrupted_allocs_lose_no_block(storm_heap: hc.Heap) -> None:
    """Small and large, zeroed or not, from the cache or leased: allocated for whoever got the object, or not at all."""
    generator = random.Random(1)
    live: list[hc.Block] = []
    struck = 0
    with interrupts() as attempt:
        for turn in range(600):
            if turn % 8 == 0:
                storm_heap.statistics()  # gets through: the daemon remembers so many answers only
            size = generator.choice((0, 16, 64, 64, 64, 1000, 4096, 70_000, 300_000, 17 * MIB))
            zero = generator.random() < 0.2 and size < MIB
            struck += attempt(generator.uniform(2e-6, 2e-4), alloc_into, live, storm_heap, size, zero)
            if size == 17 * MIB or len(live) > 50:
                while live:
                    live.pop().free()
    assert struck > 50
    check_whole(storm_heap, live)


@pytest.mark.parametrize("serialize", [True, False])
def test_interrupts_of_the_hot_path_lose_no_block(session: hc.Session, serialize: bool) -> None:
    """Thousands of alloc + free of 64 bytes between two interrupts: every point of the hot path is struck."""
    heap = session.create_heap(serialize=serialize)
    live: list[hc.Block] = []
    generator = random.Random(2)

    def churn() -> None:
        while True:
            live.append(heap.alloc(64))
            if len(live) > 20:
                block = live[-1]
                block.free()
                live.pop()

    with interrupts() as attempt:
        for _ in range(800):
            assert attempt(generator.uniform(5e-6, 4e-4), churn)
            if live and live[-1].is_free:
                live.pop()
    check_whole(heap, live)


def test_interrupted_frees_free_or_leave_the_block(storm_heap: hc.Heap) -> None:
    """The object says which; a second attempt does the rest. A view that is alive is never overlooked."""
    generator = random.Random(3)
    struck = refused = 0
    with interrupts() as attempt:
        for turn in range(500):
            block = storm_heap.alloc(generator.choice((16, 64, 64, 4096, 70_000)))
            view = None
            if turn % 2:
                view = block.view[4:8] if turn % 4 == 1 else block.view
            while view is not None and generator.random() < 0.6:
                try:
                    struck += attempt(generator.uniform(1e-6, 4e-5), block.free)
                except errors.BlockInUseError:
                    refused += 1
                assert not block.is_free
                view[0] = 1
            view = None
            while not block.is_free:
                try:
                    struck += attempt(generator.uniform(1e-6, 4e-4), block.free)
                except (errors.DoubleFreeError, errors.StaleHandleError):
                    break  # the daemon had freed it when its answer was interrupted
    assert struck > 50
    assert refused > 20
    check_whole(storm_heap, [])


def test_interrupted_reallocs_keep_block_and_bytes(storm_heap: hc.Heap) -> None:
    """Old size or new, here or moved: the block is one of them whole, and its first bytes are what they were."""
    generator = random.Random(4)
    live = [storm_heap.alloc(64) for _ in range(10)]
    for number, block in enumerate(live):
        block.view[:8] = number.to_bytes(8, "little")
    struck = 0
    with interrupts() as attempt:
        for turn in range(400):
            number = turn % len(live)
            block = live[number]
            size = generator.choice((8, 60, 64, 100, 4096, 5000, 70_000, 100_000, 1 * MIB))
            struck += attempt(generator.uniform(2e-6, 5e-4), block.realloc, size)
            assert int.from_bytes(block.view[:8], "little") == number
            assert block.size >= 8
    assert struck > 50
    check_whole(storm_heap, live)


def alloc_many_into(live: list[hc.Block], heap: hc.Heap) -> None:
    live.extend(heap.alloc_many(64, 40))


def test_interrupted_batches_are_all_or_none(storm_heap: hc.Heap) -> None:
    """alloc_many: the list, or nothing; free_many: each block says whether it is free."""
    generator = random.Random(5)
    live: list[hc.Block] = []
    struck = 0
    with interrupts() as attempt:
        for _ in range(250):
            struck += attempt(generator.uniform(5e-6, 6e-4), alloc_many_into, live, storm_heap)
            if live:
                struck += attempt(generator.uniform(5e-6, 6e-4), storm_heap.free_many, live[:40])
                storm_heap.statistics()  # answered after what was asked before: an interrupted free_many is done now
                live = [block for block in live if not block.is_free and _is_busy(block)]
    assert struck > 50
    check_whole(storm_heap, live)


def _is_busy(block: hc.Block) -> bool:
    """An interrupted free_many of a session without front ends may have been carried out by the daemon."""
    heap = block.heap
    try:
        heap.word_of(block)
    except (errors.DoubleFreeError, errors.StaleHandleError):
        return False
    return True


def test_more_interrupts_in_a_row_than_the_daemon_remembers_answers_lose_no_block(daemon: Daemon) -> None:
    """However long it takes to answer: what it has forgotten it would carry out again, so that is not asked again."""
    server = daemon.pid
    with hc.connect(daemon.endpoint, autostart=False, front_end=False) as session:
        heap = session.create_heap()
        os.kill(server, signal.SIGSTOP)
        try:
            with interrupts() as attempt:
                for _ in range(2 * KEPT_REPLIES):
                    assert attempt(5e-4, heap.alloc, 64)
        finally:
            os.kill(server, signal.SIGCONT)
        check_whole(heap, [])


def test_interrupted_locks_are_held_or_not(session: hc.Session) -> None:
    """Never left behind, whatever the calls inside do."""
    heap = session.create_heap()
    generator = random.Random(6)

    def work() -> None:
        while True:
            with heap.lock():
                block = heap.alloc(64)
                block.free()

    with interrupts() as attempt:
        for _ in range(400):
            assert attempt(generator.uniform(1e-5, 5e-4), work)
            assert heap._mutex.depth() == 0
    heap.trim()
    assert heap.statistics().busy_blocks <= 400  # `block` above is lost to the test, not to the heap
    assert heap.validate() == []


def test_interrupted_trims_lose_no_block(storm_heap: hc.Heap) -> None:
    """Trim, compact, statistics, validate: the next ones find everything."""
    generator = random.Random(7)
    live: list[hc.Block] = []
    calls: list[Callable[[], object]] = [
        storm_heap.trim,
        storm_heap.compact,
        storm_heap.statistics,
        storm_heap.validate,
        lambda: list(storm_heap.walk()),
    ]
    with interrupts() as attempt:
        for _ in range(250):
            live += [storm_heap.alloc(64) for _ in range(5)]
            while len(live) > 30:
                live.pop(generator.randrange(len(live))).free()
            attempt(generator.uniform(5e-6, 5e-4), generator.choice(calls))
    check_whole(storm_heap, live)


# -- finalisers --------------------------------------------------------------------------------------------------------
class Owner:
    """Frees its block when it is collected. In a cycle, so that the collector does it, at any allocation."""

    freed = 0

    def __init__(self, block: hc.Block) -> None:
        self.block = block
        self.me = self

    def __del__(self) -> None:
        self.block.free()
        Owner.freed += 1


@pytest.fixture
def eager_collector():  # type: ignore[no-untyped-def]
    """The collector runs at every other allocation of a container."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.set_threshold(3, 2, 2)
    yield
    gc.set_threshold(*threshold)
    gc.collect()


def test_finalisers_that_free_inside_alloc_do_not_hang(storm_heap: hc.Heap, eager_collector: None) -> None:
    """They run in the middle of alloc, of its slow path and of its round trips; every block comes back."""
    before = Owner.freed
    for number in range(1_500):
        Owner(storm_heap.alloc((64, 200, 70_000)[number % 3]))
        storm_heap.alloc(64).free()
    gc.collect()
    assert Owner.freed - before == 1_500
    check_whole(storm_heap, [])


def test_finalisers_that_free_in_another_heap_do_not_hang(
    session: hc.Session, shared_daemon: Daemon, eager_collector: None
) -> None:
    """Two threads, each with finalisers that free in the other one's heap."""
    heaps = [session.create_heap(serialize=False), session.create_heap()]
    failed: list[BaseException] = []

    def work(mine: hc.Heap, theirs: hc.Heap) -> None:
        try:
            for number in range(600):
                Owner(theirs.alloc(64 + number % 5 * 64))
                mine.alloc(64 + number % 7 * 64).free()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(heaps[at], heaps[1 - at])) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failed == []
    gc.collect()
    for heap in heaps:
        check_empty(heap)


def test_a_finaliser_in_a_call_has_a_socket_of_its_own(session: hc.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """It frees, allocates and asks in the middle of another call of its thread; neither gets the other's answer."""
    heap = session.create_heap()
    block = heap.alloc_many(64, 1)[0]
    from heapd_client import connection

    decode, seen = connection.decode_reply, []

    def decode_later(frame: bytes) -> object:
        monkeypatch.setattr(connection, "decode_reply", decode)
        seen.append(heap.statistics().busy_blocks)
        block.free()
        heap.alloc(100).free()
        return decode(frame)

    monkeypatch.setattr(connection, "decode_reply", decode_later)
    assert heap.validate() == []
    assert seen == [1]
    check_empty(heap)


def test_a_free_inside_the_slow_path_waits_for_its_end(session: hc.Session) -> None:
    """It is only queued: no list changes under the call that is at work, and it is done when that ends."""
    heap = session.create_heap(serialize=False)
    block, other = heap.alloc(64), session.create_heap().alloc(64)
    call, states = session.call, []

    def call_and_free(request: object, wait_s: float = 0.0) -> object:
        session.call = call  # type: ignore[method-assign]
        heap.free(block)
        other.heap.free(other)
        states.extend([block.is_free, other.is_free])
        return call(request, wait_s)  # type: ignore[arg-type]

    session.call = call_and_free  # type: ignore[method-assign]
    heap.alloc(1000).free()
    assert states == [False, False]
    assert (block.is_free, other.is_free) == (True, True)
    check_empty(heap)
    check_empty(other.heap)


def test_a_trim_inside_the_slow_path_takes_nothing_from_under_it(session: hc.Session) -> None:
    """A finaliser or signal handler that trims in the middle of an alloc."""
    heap = session.create_heap(serialize=False)
    for block in [heap.alloc(64) for _ in range(100)]:
        block.free()
    call = session.call

    def call_and_trim(request: object, wait_s: float = 0.0) -> object:
        session.call = call  # type: ignore[method-assign]
        result = call(request, wait_s)  # type: ignore[arg-type]
        heap.trim()
        return result

    live = []
    for size in (1000, 64, 2000, 70_000):
        session.call = call_and_trim  # type: ignore[method-assign]
        live += [heap.alloc(size) for _ in range(3)]
    session.call = call  # type: ignore[method-assign]
    live += [heap.alloc(64) for _ in range(100)]
    assert len({block.address for block in live}) == len(live)
    check_whole(heap, live)


def test_what_an_interrupted_call_was_granted_is_asked_for_again(session: hc.Session) -> None:
    """The answer was read and lost: the daemon is asked once more, and the block it gave is freed."""
    with hc.connect(session.endpoint, autostart=False, front_end=False) as plain:
        heap = plain.create_heap()
        counts, connection = count_requests(plain), plain._connection
        assert connection is not None
        call = connection.call

        def call_and_lose(*arguments: Any) -> object:
            connection.call = call  # type: ignore[method-assign]
            call(*arguments)
            raise KeyboardInterrupt

        for use in (lambda: heap.alloc(64), lambda: heap.alloc_many(64, 10)):
            connection.call = call_and_lose  # type: ignore[assignment, method-assign]
            with pytest.raises(KeyboardInterrupt):
                use()
        assert counts["heap.alloc"] == 1
        wait_until(lambda: heap.statistics().busy_blocks == 0)
        check_empty(heap)
