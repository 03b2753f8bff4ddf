"""The server dies and is started again: what a client notices of it, which is a pause at most."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import heapd_client as hc
from heapd_client import errors
from tests.client.tools import check_empty
from tests.conftest import StartDaemon
from tests.harness import Daemon, is_alive, wait_until


@contextmanager
def no_server(daemon: Daemon) -> Iterator[None]:
    """While inside the server is dead, and the supervisor, which is stopped, starts no other one."""
    server = daemon.pid
    daemon.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED | os.WNOWAIT)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not is_alive(server))
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


@contextmanager
def calling(call: Callable[[], object]) -> Iterator[list[object]]:
    """Begin a call in a thread. Gives the list that gets what it returns, or raises, before the end of `with`."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except errors.HeapdError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join(30)
        assert not thread.is_alive()


def test_a_call_made_while_there_is_no_server_waits_for_the_next(start_daemon: StartDaemon) -> None:
    """It succeeds, as if nothing had been; the session is the same one, and knows who serves it now."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap("work", serialize=False)
        number, before = session.number, (session.incarnation, session.daemon_pid)
        with no_server(daemon), calling(lambda: heap.alloc_many(100, 3)) as results:
            assert results == []
            daemon.process.send_signal(signal.SIGCONT)
        (blocks,) = results
        assert isinstance(blocks, list)
        assert len(blocks) == 3
        assert session.number == number
        assert (session.incarnation, session.daemon_pid) == (2, daemon.pid)
        assert (session.incarnation, session.daemon_pid) != before
        assert [info.number for info in session.sessions()] == [number]


def test_what_was_allocated_and_published_is_there_afterwards(start_daemon: StartDaemon) -> None:
    """Heaps, blocks with their bytes, handles, names; views that were taken before go on working throughout."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap("work")
        blocks = [heap.alloc(size) for size in (1, 100, 5000, 70_000, 2_000_000)]
        for number, block in enumerate(blocks):
            block.view[:1] = bytes([number])
        handles, views = [block.handle for block in blocks], [block.view for block in blocks]
        heap.publish("largest", blocks[-1])
        for _ in range(2):
            daemon.kill_server()
            for number, view in enumerate(views):
                assert view[0] == number
                view[-1:] = bytes([number])
            assert session.statistics().heap_count == 1
        for number, handle in enumerate(handles):
            assert session.open(handle).view[-1] == number
        assert heap.lookup("largest").address == blocks[-1].address
        assert heap.validate() == []
        del views, view
        for block in blocks:
            block.free()
        check_empty(heap)


def test_local_allocations_go_on_without_a_server(start_daemon: StartDaemon) -> None:
    """What a cache has needs nobody."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heaps = [session.create_heap(serialize=serialize) for serialize in (True, False)]
        for heap in heaps:
            for block in [heap.alloc(64) for _ in range(100)]:
                block.free()
        with no_server(daemon):
            started = time.monotonic()
            for _ in range(1000):
                for heap in heaps:
                    with heap.lock(1), heap.alloc(64) as block:
                        block.view[:] = b"x" * 64
            assert time.monotonic() - started < 10
            assert session.incarnation == 1
        for heap in heaps:
            check_empty(heap)


def test_each_request_is_done_once_however_often_the_server_dies(start_daemon: StartDaemon) -> None:
    """Kills while requests that would show are under way: no block too many, none too few, from four threads."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False, timeout=60) as session:
        heap = session.create_heap(serialize=False)
        is_over = threading.Event()
        kept: list[int] = []
        faults: list[BaseException] = []

        def work() -> None:
            count = 0
            try:
                while not is_over.is_set():
                    blocks = heap.alloc_many(200_000, 3)  # too large for a cache: each is a request
                    heap.free_many(blocks[1:])
                    count += 1
                kept.append(count)
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for incarnation in range(1, 7):
                os.kill(session.daemon_pid, signal.SIGKILL)
                wait_until(lambda: session.incarnation > incarnation, 30)  # noqa: B023
                session.statistics()
        finally:
            is_over.set()
            for thread in threads:
                thread.join(60)
        assert faults == []
        heap.trim()
        assert heap.statistics().busy_blocks == sum(kept) > 0
        assert heap.validate() == []


def test_a_wait_for_a_name_goes_on_with_the_next_server(start_daemon: StartDaemon) -> None:
    """And ends when somebody publishes it there."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session, hc.connect(daemon.endpoint, autostart=False) as other:
        heap = session.create_heap("work")
        with calling(lambda: other.open_heap("work").lookup("late", timeout=20).size) as results:
            wait_until(lambda: len(session.heaps(os.getpid())) >= 1)
            with no_server(daemon):
                assert results == []
            heap.publish("late", heap.alloc(77))
        assert results == [77]


def test_a_stop_ends_a_wait_for_the_next_server_at_once(start_daemon: StartDaemon) -> None:
    """Nobody waits for a daemon that was stopped while its server was dead."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False, timeout=60) as session:
        started = time.monotonic()
        with no_server(daemon), calling(session.statistics) as results:
            daemon.process.terminate()
            daemon.process.send_signal(signal.SIGCONT)
        assert time.monotonic() - started < 20
        assert isinstance(results[0], errors.DaemonStoppedError)
        assert daemon.process.wait(10) == 0


@pytest.mark.parametrize("is_serialized", [True, False], ids=["serialized", "unserialized"])
def test_sessions_whose_process_died_meanwhile_are_ended_first(start_daemon: StartDaemon, is_serialized: bool) -> None:
    """Before anybody is answered; what they had cached is free again, their locks are released."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap("work", serialize=is_serialized)
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:  # the session's heap is opened anew, in a session of the child's own
            heap.alloc(100).free()
            held = heap.lock()
            os.write(told, b"x")
            signal.pause()
            del held
        try:
            assert os.read(ready, 1) == b"x"
            with no_server(daemon):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert [info.pid for info in session.sessions() if info.is_live] == [os.getpid()]
            with heap.lock(10) as held:
                assert held.recovered
            wait_until(lambda: heap.statistics().cached_blocks == 0)
            check_empty(heap)
        finally:
            os.close(ready)
            os.close(told)


def test_a_new_client_that_comes_meanwhile_waits_too(start_daemon: StartDaemon) -> None:
    """connect returns once there is a server, and finds what was there."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session:
        session.create_heap("work")

        def come() -> list[str | None]:
            with hc.connect(daemon.endpoint, autostart=False) as late:
                return [info.name for info in late.heaps()]

        with no_server(daemon), calling(come) as results:
            assert results == []
            daemon.process.send_signal(signal.SIGCONT)
        assert results == [["work"]]


def test_the_gap_is_short(start_daemon: StartDaemon) -> None:
    """A call that is made when the server was just killed takes some tenths of a second; this machine may be busy."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session:
        gaps = []
        for _ in range(3):
            os.kill(session.daemon_pid, signal.SIGKILL)
            started = time.monotonic()
            session.statistics()
            gaps.append(time.monotonic() - started)
        assert min(gaps) < 1, gaps
        assert max(gaps) < 9, gaps
