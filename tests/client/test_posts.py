"""What a front end has too much of is given back without waiting for the daemon: late, perhaps, but not never."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from time import monotonic

import pytest

import heapd_client as hc
from heapd.records import EntryKind
from heapd.wire.messages import HeapGiveBack
from heapd_client.connection import Connection
from heapd_client.frontend import FrontEnd
from tests.client.tools import blocks_of, check_empty
from tests.conftest import StartDaemon
from tests.harness import Daemon, is_alive, wait_until


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> Daemon:
    """One of the test's own, which it stops and kills."""
    return start_daemon()


@pytest.fixture
def heap(daemon: Daemon) -> Iterator[hc.Heap]:
    """A heap that the test's session caches blocks of."""
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=False)
        for block in [heap.alloc(4000) for _ in range(200)]:
            block.free()
        yield heap


def give_back_some(heap: hc.Heap) -> set[int]:
    """Have the front end give back half of what it caches. Returns: the blocks' addresses."""
    front = heap._front
    assert isinstance(front, FrontEnd)
    surplus = front._take_surplus(2**40)
    assert surplus
    front._give_back(surplus)
    return {block.address for block in surplus}


def cached(heap: hc.Heap) -> set[int]:
    """Addresses of the blocks that are cached, as a walk shows them."""
    return {entry.address for entry in blocks_of(heap, EntryKind.CACHED)}


def test_it_is_done_before_what_is_asked_next(heap: hc.Heap) -> None:
    """Nobody who asks the daemon sees that it was not waited for."""
    before = cached(heap)
    given = give_back_some(heap)
    assert cached(heap) == before - given


def test_nobody_waits_for_it(daemon: Daemon, heap: hc.Heap) -> None:
    """While the server does not run, blocks are given back, allocated and freed; when it runs again, it hears of it."""
    server = daemon.pid
    os.kill(server, signal.SIGSTOP)
    try:
        began = monotonic()
        given = give_back_some(heap)
        heap.alloc(4000).free()
        assert monotonic() - began < heap.session.timeout / 2
    finally:
        os.kill(server, signal.SIGCONT)
    assert not given & cached(heap)


@pytest.mark.parametrize("is_slow", [False, True], ids=["call while there is no server", "call when there is one"])
def test_a_server_that_dies_before_it_hears_is_followed_by_one_that_does(
    daemon: Daemon, heap: hc.Heap, is_slow: bool
) -> None:
    """The next call repeats what was posted: nothing stays leased for ever."""
    server = daemon.pid
    os.kill(server, signal.SIGSTOP)
    given = give_back_some(heap)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not is_alive(server))
    if is_slow:
        assert daemon.pid != server  # it answers
    assert not given & cached(heap)
    assert heap.validate() == []
    heap.trim()
    check_empty(heap)


def test_a_serialized_heap_changes_only_with_its_mutex_held(daemon: Daemon) -> None:
    """Who has its lock next sees nothing change: there the answer is waited for."""
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap()
        for block in [heap.alloc(4000) for _ in range(200)]:
            block.free()
        give_back_some(heap)
        connection = session._connection
        assert isinstance(connection, Connection)
        assert not any(channel.posted for channel in connection._channels)


def test_who_posts_faster_than_the_daemon_answers_waits(daemon: Daemon, heap: hc.Heap) -> None:
    """What is under way is bounded; and what was refused may be asked."""
    connection, request = heap.session._connection, HeapGiveBack(heap.id, [])
    assert isinstance(connection, Connection)
    server = daemon.pid
    os.kill(server, signal.SIGSTOP)
    try:
        posted = 0
        while connection.post(request):
            posted += 1
            assert posted <= 8
    finally:
        os.kill(server, signal.SIGCONT)
    assert posted == 8
    assert heap.session.call(request) == 0
    assert connection.post(request)
