"""Sessions: connecting, lists, the end; and what the library costs to import and leaves at exit."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import heapd_client as hc
from heapd_client import errors
from heapd_client import session as session_module
from tests.client.programs import in_child, run
from tests.harness import Daemon, wait_until


def test_the_endpoint_comes_from_the_environment(shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """No argument: $HEAPD_ENDPOINT; a bare name is one in the runtime directory."""
    monkeypatch.setenv("HEAPD_ENDPOINT", shared_daemon.endpoint)
    with hc.connect(autostart=False) as session:
        assert session.endpoint == shared_daemon.endpoint
    monkeypatch.setenv("HEAPD_RUNTIME_DIR", str(shared_daemon.directory))
    with hc.connect(shared_daemon.name, autostart=False) as session:
        assert session.endpoint == shared_daemon.endpoint


def test_no_daemon_is_told_at_once(runtime_dir) -> None:  # type: ignore[no-untyped-def]
    """Nobody there, or sockets left by a dead one: DaemonNotFoundError names endpoint and command, in no time."""
    import socket
    import time

    endpoint = f"ipc://{runtime_dir}/nobody"
    for is_left in (False, True):
        if is_left:
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(f"{runtime_dir}/nobody.control")
        started = time.monotonic()
        with pytest.raises(errors.DaemonNotFoundError, match=r"nobody.*heapd serve"):
            hc.connect(endpoint, autostart=False)
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("endpoint", ["tcp://localhost:1", "a/b", "ipc://", "x" * 65, "ipc:///" + "x" * 120 + "/y"])
def test_an_endpoint_that_is_none_is_refused(endpoint: str) -> None:
    """InvalidArgumentError, a ValueError, before anything is tried."""
    with pytest.raises(errors.InvalidArgumentError):
        hc.connect(endpoint)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(shared_daemon: Daemon, timeout: float) -> None:
    """More than 0 seconds it must be."""
    with pytest.raises(errors.InvalidArgumentError):
        hc.connect(shared_daemon.endpoint, timeout=timeout)


def test_a_session_knows_itself(shared_daemon: Daemon, session: hc.Session) -> None:
    """Endpoint, numbers, processes; and it is in the daemon's list."""
    assert session.pid == os.getpid()
    assert session.daemon_pid == shared_daemon.pid
    assert len(session.instance) == 16
    assert session.incarnation == 1
    assert session.segment in os.listdir("/dev/shm")
    assert [info.number for info in session.sessions(os.getpid())] == [session.number]
    assert session.sessions(1) == []


def test_heaps_are_listed(session: hc.Session) -> None:
    """All of them, or a process's, its default heap first; more than one answer holds."""
    made = [session.create_heap().id for _ in range(3)]
    default = session.default_heap.id
    assert {info.heap_id for info in session.heaps()} == {*made, default}
    assert session.heaps(os.getpid())[0].heap_id == default
    assert session.heaps(1) == []


def test_more_heaps_than_one_answer_holds_are_listed(session: hc.Session) -> None:
    """Paging loses none and repeats none."""
    made = {session.create_heap().id for _ in range(1_100)}
    found = [info.heap_id for info in session.heaps()]
    assert set(found) == made
    assert len(found) == len(made)


def test_a_heap_can_be_walked_without_opening_it(shared_daemon: Daemon, session: hc.Session) -> None:
    """By its id, as its owner walks it; nothing is opened, and what never was is no heap."""
    with hc.connect(shared_daemon.endpoint, autostart=False) as other:
        heap = other.create_heap()
        for _ in range(1_500):  # more than one answer holds
            heap.alloc(100)
        heap.trim()
        assert list(session.walk(heap.id)) == list(heap.walk())
        assert session.open_heaps == []
        heap.destroy()
        with pytest.raises(hc.HeapDestroyedError):
            list(session.walk(heap.id))
    with pytest.raises(errors.NoSuchHeapError):
        list(session.walk(12_345 << 16))


def test_the_default_heap_is_as_large_as_its_first_user_says(shared_daemon: Daemon) -> None:
    """Reserve and commit count once; a commit beyond the reserve is refused, and then it can be had otherwise."""
    with hc.connect(shared_daemon.endpoint, autostart=False) as session:
        with pytest.raises(hc.InvalidArgumentError):
            session.open_default_heap(1 << 20, 2 << 20)
        heap = session.open_default_heap(4 << 20, 1 << 16)
        assert (heap.statistics().reserved, heap.statistics().committed) == (4 << 20, 1 << 16)
        assert session.open_default_heap(8 << 20) is heap is session.default_heap
        assert session.open_heaps == [heap]


def test_the_arena_adds_up(session: hc.Session) -> None:
    """size and committed are the sums of their parts."""
    session.create_heap().alloc(100_000)
    found = session.statistics()
    assert found.size == found.tables_reserved + found.reserved + found.unreserved
    assert found.committed == found.tables + found.heaps


def test_the_page_map_shows_the_arena(session: hc.Session) -> None:
    """Spans tile the arena; each page of a block is a committed one of its heap."""
    heap = session.create_heap()
    block = heap.alloc(100_000)
    end = 0
    for first, count, _ in session.arena.spans():
        assert first == end
        end += count
    assert end == session.arena.shape.page_count
    for address in (block.address, block.address + block.size - 1):
        info = session.arena.find_page(address)
        assert info is not None
        assert (info.state, info.kind, info.start) == (2, 4, block.address >> 12)
    assert session.arena.find_page(-1) is None
    assert session.arena.find_page(session.arena.size) is None
    first = block.address >> 12
    assert sum(count for _, count, _ in session.arena.spans(first, 5)) == 5


def test_closing_ends_everything(shared_daemon: Daemon) -> None:
    """Heaps and blocks of a closed session refuse; views stay readable; closing again is harmless."""
    session = hc.connect(shared_daemon.endpoint, autostart=False)
    heap = session.create_heap()
    block = heap.alloc(8)
    view = block.view
    session.close()
    session.close()
    assert session.is_closed
    for use in (
        lambda: heap.alloc(8),
        block.free,
        lambda: block.realloc(9),
        session.statistics,
        lambda: session.create_heap(),
        lambda: session.open(block.handle),
        lambda: session.number,
        heap.lock,
    ):
        with pytest.raises(errors.ClosedError):
            use()
    assert not heap.is_live
    bytes(view)


def test_sessions_to_one_daemon_are_apart(shared_daemon: Daemon) -> None:
    """Two sessions of one process have two numbers, and end one by one."""
    with hc.connect(shared_daemon.endpoint, autostart=False) as one:
        with hc.connect(shared_daemon.endpoint, autostart=False) as two:
            assert one.number != two.number
            heap = two.create_heap()
        with pytest.raises(errors.HeapdError):
            one.open_heap_id(heap.id)
        assert one.create_heap().alloc(8).size == 8


def test_a_session_nobody_refers_to_warns(shared_daemon: Daemon) -> None:
    """As files do; its sockets are closed, the daemon is not asked."""
    gc.disable()  # or it might be collected before the warning is looked for
    try:
        session = hc.connect(shared_daemon.endpoint, autostart=False)
        session.create_heap()  # refers to it, and it to the heap
        del session
        with pytest.warns(ResourceWarning, match="unclosed session"):
            gc.collect()
    finally:
        gc.enable()


def test_status_and_stop_need_no_session(start_daemon) -> None:  # type: ignore[no-untyped-def]
    """They go over the control socket; stop returns when the daemon has gone."""
    daemon: Daemon = start_daemon()
    status = hc.daemon_status(daemon.endpoint)
    assert (status["name"], status["sessions"]) == (daemon.name, 0)
    hc.stop_daemon(daemon.endpoint)
    assert daemon.process.wait(5) == 0
    for ask in (hc.daemon_status, hc.stop_daemon):
        with pytest.raises(errors.DaemonNotFoundError):
            ask(daemon.endpoint)


def test_a_client_killed_while_it_attaches_leaves_the_arena(session: hc.Session) -> None:
    """kill -9 between opening and mapping the segment, and after: it is there as before."""
    import signal

    import heapd_client.mapping as mapping

    def die_before_mapping() -> None:
        def die(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        mapping.mmap.mmap = die  # type: ignore[assignment, misc]
        hc.connect(session.endpoint, autostart=False)

    def die_after_mapping() -> None:
        hc.connect(session.endpoint, autostart=False)
        os.kill(os.getpid(), signal.SIGKILL)

    heap = session.create_heap()
    block = heap.alloc(8)
    block.view[:] = b"survives"
    for die in (die_before_mapping, die_after_mapping):
        assert in_child(die) == -signal.SIGKILL
    with hc.connect(session.endpoint, autostart=False) as other:
        assert other.statistics().session_count >= 2
    assert bytes(block.view) == b"survives"
    assert session.segment in os.listdir("/dev/shm")


def test_a_thread_that_calls_only_when_the_interpreter_ends_says_nothing(session: hc.Session) -> None:
    """A daemon thread that had not come to its first call by then. The session ends with the process."""
    done = run(
        """
        import atexit, sys, threading, heapd_client as hc
        session = hc.connect(sys.argv[1], autostart=False)
        heap, go = session.create_heap(), threading.Event()
        def work():
            go.wait()
            heap.lookup("never", timeout=60)
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        atexit._run_exitfuncs()
        go.set()
        thread.join(0.3)
        print(thread.is_alive())
        """,
        session.endpoint,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_a_client_that_ends_untidily_says_nothing(session: hc.Session) -> None:
    """Views, blocks, locks and sessions left open at exit: nothing on stderr, and the arena stays."""
    done = run(
        """
        import sys, threading, heapd_client as hc
        session = hc.connect(sys.argv[1], autostart=False)
        other = hc.connect(sys.argv[1], autostart=False)
        heap = session.create_heap()
        block = heap.alloc(100)
        view = block.view
        part = view[3:].cast("B")
        large = other.create_heap().alloc(1 << 20).view
        lock = heap.lock()
        thread = threading.Thread(target=session.statistics)
        thread.start()
        thread.join()
        threading.Thread(target=lambda: heap.lookup("never", timeout=60), daemon=True).start()
        print("ok")
        """,
        session.endpoint,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
    wait_until(lambda: {info.pid for info in session.sessions()} == {os.getpid()})
    assert session.segment in os.listdir("/dev/shm")


def test_a_daemon_that_stops_while_one_connects_is_none(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arena has gone between its greeting and our look at it: that is no fault of the arena."""
    say_hello = session_module.say_hello

    def stop_then(*arguments: Any) -> object:
        greeting = say_hello(*arguments)
        daemon.stop()
        return greeting

    monkeypatch.setattr(session_module, "say_hello", stop_then)
    with pytest.raises(hc.DaemonNotFoundError):
        hc.connect(daemon.endpoint, autostart=False)


def test_no_resource_tracker_is_started(session: hc.Session) -> None:
    """The tracker would unlink the arena; a client never starts one."""
    done = run(
        """
        import sys, os, heapd_client as hc
        with hc.connect(sys.argv[1], autostart=False) as session:
            session.create_heap().alloc(8)
        print("multiprocessing" in sys.modules)
        """,
        session.endpoint,
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_import_is_light(tmp_path: Path) -> None:
    """No asyncio, multiprocessing, subprocess, numpy, rich or click; at most 120 ms over bare Python."""
    done = run(
        """
        import sys, heapd_client
        heavy = {"asyncio", "multiprocessing", "subprocess", "numpy", "rich", "click", "concurrent"}
        print(sorted(heavy & set(sys.modules)))
        """
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")

    # Compiled once, as where it is installed, and wherever it stands: the first round writes what the others load.
    environ = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def cpu_seconds(program: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program], check=True, env=environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # CPU time, and the best of some in turn, measured against a part of it: a busy machine must not decide it.
    programs = ("pass", "import zmq", "import heapd_client")
    rounds = [[cpu_seconds(program) for program in programs] for _ in range(8)]
    bare, zmq, client = (min(times) for times in zip(*rounds, strict=True))
    slowness = max(1.0, (zmq - bare) / 0.030)  # 27 ms on the machine of the bar
    assert client - bare < 0.120 * slowness


def test_the_face_is_small_and_complete() -> None:
    """At most 25 names, all there; every error can be reached."""
    assert len(hc.__all__) <= 25
    for name in (*hc.__all__, *errors.__all__):
        assert hasattr(hc, name), name
    with pytest.raises(AttributeError):
        hc.no_such_thing  # noqa: B018
