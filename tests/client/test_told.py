"""What users are told when something went another way than they think."""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import pytest

import heapd_client as hc
from heapd_client import errors
from tests.harness import Daemon, wait_until


def _die_holding(heap: hc.Heap) -> None:
    """Fork a child that is killed while it holds the heap's lock."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        heap.lock()
        os.write(writer, b"x")
        signal.pause()
    assert os.read(reader, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def test_whoever_locks_next_is_told_that_the_holder_died_whatever_ran_between(session: hc.Session) -> None:
    """An alloc or a compact may be the first to take the lock over; that is not where the user looks. Told once."""
    heap = session.create_heap()
    _die_holding(heap)
    heap.compact()
    with heap.lock(5) as held:
        assert held.recovered
    with heap.lock(5) as held:
        assert not held.recovered


def test_a_new_heap_says_nothing_of_an_old_one_s_dead_holder(session: hc.Session) -> None:
    """Control blocks are used again, with their mutex."""
    old = session.create_heap()
    _die_holding(old)
    old.destroy()
    with session.create_heap().lock(5) as held:
        assert not held.recovered


def test_a_stale_block_gives_no_view_of_the_next_one_s_bytes(session: hc.Session) -> None:
    """Another process freed it, and its memory is in use again."""
    heap = session.create_heap()
    block = heap.alloc(100)
    session.open(block.handle).free()
    following = heap.alloc(100)
    assert following.address == block.address
    with pytest.raises(errors.StaleHandleError):
        _ = block.view
    assert [violation.what for violation in heap.validate(block)] == ["stale-block"]
    assert heap.validate(following) == []


def test_a_full_heap_tells_of_the_whole_request(start_daemon: Any) -> None:
    """Not of the slice that failed, and not of the slices before it, which were undone."""
    daemon: Daemon = start_daemon("--commit-limit", "100MiB")
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap()
        kept = heap.alloc(40 << 20)
        with pytest.raises(hc.HeapFullError) as caught:
            heap.alloc(200 << 20)
        assert caught.value.requested == 200 << 20
        assert caught.value.limit == 100 << 20
        assert 40 << 20 <= caught.value.used < 44 << 20
        assert "200 MiB requested" in str(caught.value)
        assert kept.view[-1] == 0
        wait_until(lambda: session.statistics().committed < 44 << 20)


@pytest.mark.parametrize("timeout", [math.nan, -1, "1", b"1", True])
def test_a_timeout_that_is_none_is_refused(session: hc.Session, timeout: Any) -> None:
    """By each function that takes one."""
    heap = session.create_heap()
    for use in (
        lambda: heap.lock(timeout),
        lambda: heap.lookup("nothing", timeout),
        lambda: hc.connect(session.endpoint, timeout=timeout),
    ):
        with pytest.raises(hc.InvalidArgumentError):
            use()


def test_what_is_no_block_is_refused(session: hc.Session) -> None:
    """InvalidArgumentError, not an AttributeError from inside."""
    heap = session.create_heap()
    for use in (
        lambda: heap.publish("a", 3),  # type: ignore[arg-type]
        lambda: heap.free_many([1]),  # type: ignore[list-item]
        lambda: heap.validate(4),  # type: ignore[arg-type]
        lambda: heap.alloc_many(None),  # type: ignore[arg-type]
        lambda: heap.alloc_many(16, 2**64),
    ):
        with pytest.raises(hc.InvalidArgumentError):
            use()


def test_a_name_with_a_control_character_is_refused(session: hc.Session) -> None:
    """It would end up in somebody's terminal."""
    for name in ("a\nb", "\x1b[31m", "\x00", "\x7f"):
        with pytest.raises(hc.InvalidArgumentError):
            session.create_heap(name)
