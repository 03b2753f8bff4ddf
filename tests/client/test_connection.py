"""Calls: one socket a thread, deadlines, late answers, and a daemon that stops, hangs or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

import heapd_client as hc
from heapd_client import errors
from tests.harness import Daemon

StartDaemon = Callable[..., Daemon]


def test_eight_threads_share_a_session(session: hc.Session) -> None:
    """Answers go to the thread that asked: every block has the size its thread wanted."""
    heap = session.create_heap(serialize=False)
    faults: list[object] = []

    def work(number: int) -> None:
        try:
            for turn in range(100):
                size = number * 1_000 + turn
                block = heap.alloc(size)
                if block.size != size or block.extent < size:
                    faults.append((number, turn))
                block.view[:2] = bytes([number, turn])
                if bytes(block.view[:2]) != bytes([number, turn]):
                    faults.append((number, turn))
                block.free()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert heap.statistics().busy_blocks == 0
    assert heap.validate() == []
    assert len(session.sessions(os.getpid())) == 1


def test_a_thread_that_ended_leaves_no_socket(session: hc.Session) -> None:
    """Sockets go with their threads."""
    for _ in range(5):
        thread = threading.Thread(target=session.statistics)
        thread.start()
        thread.join(10)
    session.statistics()
    assert session._connection is not None
    assert len(session._connection._channels) == 1


def test_closing_interrupts_a_waiting_call(daemon: Daemon) -> None:
    """A thread in a call gets ClosedError when another one closes the session."""
    session = hc.connect(daemon.endpoint, autostart=False)
    heap = session.create_heap()
    seen: list[BaseException] = []
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        try:
            heap.lookup("never", timeout=60)
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert begun.wait(10)
    session.close()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(seen[0], errors.ClosedError), seen


def test_a_hanging_daemon_is_lost_at_the_deadline(daemon: Daemon) -> None:
    """DaemonLostError names the operation, in time; blocks stay usable; afterwards all is as before."""
    with hc.connect(daemon.endpoint, autostart=False, timeout=0.6) as session:
        heap = session.create_heap(serialize=False)
        block = heap.alloc(8)
        pid = daemon.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(errors.DaemonLostError, match=r"heap\.(alloc|lease)"):
                heap.alloc(64)
            assert 0.5 < time.monotonic() - started < 5
            block.view[:] = b"still ok"
        finally:
            os.kill(pid, signal.SIGCONT)
        assert bytes(block.view) == b"still ok"


def test_an_answer_that_comes_too_late_frees_what_it_granted(daemon: Daemon) -> None:
    """An alloc that was given up leaves no block behind, and the next call gets its own answer."""
    with hc.connect(daemon.endpoint, autostart=False, timeout=0.4) as session:
        heap = session.create_heap(serialize=False)
        heap.alloc(8)
        pid = daemon.pid
        os.kill(pid, signal.SIGSTOP)
        for give_up in (lambda: heap.alloc(100), lambda: heap.alloc_many(100, 5)):
            with pytest.raises(errors.DaemonLostError):
                give_up()
        os.kill(pid, signal.SIGCONT)
        session.timeout = session._connection.timeout_s = 10.0  # type: ignore[union-attr]
        assert heap.alloc(77).size == 77
        heap.alloc(78)
        assert heap.statistics().busy_blocks == 3
        assert heap.validate() == []


def test_a_request_sent_again_is_done_once(daemon: Daemon) -> None:
    """A daemon that pauses for longer than the client repeats after allocates one block, not two."""
    with hc.connect(daemon.endpoint, autostart=False, timeout=20) as session:
        heap = session.create_heap(serialize=False)
        heap.alloc(8)
        pid = daemon.pid
        os.kill(pid, signal.SIGSTOP)
        blocks: list[hc.Block] = []
        thread = threading.Thread(target=lambda: blocks.append(heap.alloc(500)))
        thread.start()
        thread.join(2.5)
        assert thread.is_alive()
        os.kill(pid, signal.SIGCONT)
        thread.join(10)
        assert [block.size for block in blocks] == [500]
        assert heap.alloc(9).size == 9
        assert heap.statistics().busy_blocks == 3


def test_ctrl_c_gets_through_and_leaves_the_connection_usable(daemon: Daemon) -> None:
    """KeyboardInterrupt ends a wait at once; the late answer disturbs nobody."""
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=False)
        pid = daemon.pid
        os.kill(pid, signal.SIGSTOP)
        main = threading.get_ident()
        timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            heap.alloc(100)
        assert time.monotonic() - started < 5
        os.kill(pid, signal.SIGCONT)
        timer.join()
        assert [heap.alloc(size).size for size in (5, 6, 7)] == [5, 6, 7]
        assert heap.statistics().busy_blocks == 3


def test_a_stopped_daemon_is_told_at_once(start_daemon: StartDaemon) -> None:
    """DaemonStoppedError within moments, not at the deadline; blocks stay readable and writable."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False, timeout=30) as session:
        heap = session.create_heap(serialize=False)
        block = heap.alloc(8)
        view = block.view
        daemon.stop()
        started = time.monotonic()
        for use in (lambda: heap.alloc(8), session.statistics, lambda: session.create_heap("x")):
            with pytest.raises((errors.DaemonStoppedError, errors.HeapDestroyedError)):
                use()
        assert time.monotonic() - started < 5
        view[:] = b"readable"
        assert bytes(view) == b"readable"


def test_a_daemon_that_is_not_started_again_is_lost_at_the_deadline(start_daemon: StartDaemon) -> None:
    """kill -9 of server and supervisor: DaemonLostError, a ConnectionError, says so in time; blocks stay usable; to
    close the session takes no such time."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False, timeout=1) as session:
        heap = session.create_heap(serialize=False)
        block = heap.alloc(8)
        server = daemon.pid
        daemon.kill()
        started = time.monotonic()
        with pytest.raises(
            errors.DaemonLostError, match=f"process {server}, has died, and was not started again within 1 s"
        ) as caught:
            session.statistics()
        assert 0.9 < time.monotonic() - started < 5
        assert isinstance(caught.value, ConnectionError)
        block.view[:] = b"readable"
        assert bytes(block.view) == b"readable"
        session.timeout = 60
        started = time.monotonic()
    assert time.monotonic() - started < 10


def test_a_wait_for_a_name_ends_at_its_deadline_if_the_daemon_is_lost(start_daemon: StartDaemon) -> None:
    """Whatever the session's own timeout is: nobody is left who could answer."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False, timeout=30) as session:
        heap = session.create_heap()
        daemon.kill()
        started = time.monotonic()
        with pytest.raises(errors.DaemonLostError, match="has died, and was not started again"):
            heap.lookup("never", timeout=0.5)
        assert 0.5 <= time.monotonic() - started < 5


def test_a_wait_for_a_name_outlives_the_server_if_it_is_started_again(start_daemon: StartDaemon) -> None:
    """Its deadline, too, if it falls between two servers: the answer is the next one's."""
    daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False, timeout=30) as session:
        heap = session.create_heap("x")
        daemon.process.send_signal(signal.SIGSTOP)  # the supervisor: there is no other server before it goes on
        daemon.kill_server()
        goes_on = threading.Timer(1.0, daemon.process.send_signal, [signal.SIGCONT])
        goes_on.start()
        try:
            with pytest.raises(errors.WaitTimeoutError):
                heap.lookup("never", timeout=0.3)
            assert session.incarnation == 2
        finally:
            goes_on.join()


def test_several_daemons_in_one_process(start_daemon: StartDaemon) -> None:
    """Each session is its own: blocks, handles and closing."""
    daemons = [start_daemon() for _ in range(2)]
    with (
        hc.connect(daemons[0].endpoint, autostart=False) as one,
        hc.connect(daemons[1].endpoint, autostart=False) as two,
    ):
        first, second = one.create_heap("same").alloc(8), two.create_heap("same").alloc(8)
        first.view[:], second.view[:] = b"daemon 1", b"daemon 2"
        assert bytes(one.open(first.handle).view) == b"daemon 1"
        assert bytes(two.open(second.handle).view) == b"daemon 2"
        with pytest.raises(errors.StaleHandleError):
            two.open(first.handle)
        one.close()
        assert second.realloc(10).size == 10


def test_a_request_too_large_for_a_message_is_refused_here(heap: hc.Heap) -> None:
    """What would make the daemon cut the connection is never sent."""
    from heapd.wire import messages

    with pytest.raises((errors.MessageTooLargeError, errors.InvalidArgumentError)):
        heap.session.call(messages.HeapFreeMany(heap.id, [2**62] * 8_192))
    with suppress(errors.HeapdError):
        heap.session.call(messages.HeapAllocMany(heap.id, [8] * 4_097))
    assert heap.alloc(8).size == 8


_SCARCE = """
import gc, os, resource, sys, threading
import heapd_client as hc

def open_files():
    return len(os.listdir("/proc/self/fd"))

def attempt(call):
    try:
        call()
        return "done"
    except hc.HeapdError as error:
        assert "Too many open files" in str(error), error
        return "refused"

def use():
    with hc.connect(sys.argv[1], autostart=False) as session:
        session.create_heap().alloc(100).view[0] = 1

use()
gc.collect()
before = open_files()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
told = []
for limit in range(3, 60):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    told.append(attempt(use))
    gc.collect()  # a mapping has a descriptor of its own, until it goes
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
assert open_files() == before, open_files()
print(told[0], told[-1])
with hc.connect(sys.argv[1], autostart=False) as session:
    heap = session.create_heap()
    heap.alloc(64)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    told = []
    thread = threading.Thread(target=lambda: told.append(attempt(heap.statistics)))
    thread.start()
    thread.join()
    print(told, attempt(heap.statistics))
"""


def test_a_process_without_descriptors_is_told_so(shared_daemon: Daemon) -> None:
    """With however few are left a session opens or LimitError comes, nothing stays open, and the process lives; a
    session that is open goes on, but not in a thread that needs a socket of its own."""
    command = [sys.executable, "-c", _SCARCE, shared_daemon.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused done\n['refused'] done\n", "")
