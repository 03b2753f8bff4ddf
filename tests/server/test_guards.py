"""What libzmq does not limit: descriptors, connections that say nothing, messages without an end."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.server.guards import MIN_DESCRIPTORS, DescriptorGuard, MemoryGuard, count_descriptors, raise_descriptor_limit
from heapd.wire.messages import HeapAlloc, SessionList
from tests.conftest import StartDaemon
from tests.harness import Daemon, is_alive, unique_name, wait_until
from tests.server.raw import (
    ConfiguredDaemon,
    RawSession,
    connect_raw,
    hello,
    is_cut_off,
    status,
    zmtp3_connect,
    zmtp3_frame,
)


@pytest.fixture
def descriptor_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> int:
    """Daemons that this test starts may have so many descriptors, and cannot raise that."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n {request.param}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return int(request.param)


@pytest.mark.parametrize("descriptor_limit", [MIN_DESCRIPTORS], indirect=True)
def test_a_crowd_of_connections_does_not_bring_it_down(descriptor_limit: int, start_daemon: StartDaemon) -> None:
    """libzmq aborts the process at the limit. The gates are shut before that: who has a session is answered
    throughout, and newcomers are told why they are not let in, until the crowd has gone."""
    daemon = start_daemon()
    with RawSession(daemon.endpoint) as session, ExitStack() as crowd:
        heap = session.create_heap()
        for _ in range(300):
            try:
                peer = crowd.enter_context(socket.socket(socket.AF_UNIX))
                peer.connect(f"{daemon.directory}/{daemon.name}.work")
            except OSError:
                break  # the gate is shut
            session.alloc(heap)
        assert daemon.is_running, daemon.log
        session.alloc(heap)
        with pytest.raises(hc.DaemonLostError, match=r"lets no new client in: .* raise its limit \(LimitNOFILE="):
            hc.connect(daemon.endpoint, timeout=0.2)  # which would start another one, if that were of use
        crowd.close()
        assert status(daemon.endpoint)["gates_shut"] >= 1
        with RawSession(daemon.endpoint) as newcomer:
            newcomer.create_heap()
        assert status(daemon.endpoint)["sessions"] == 2


@pytest.mark.parametrize("descriptor_limit", [1024], indirect=True)
def test_bursts_of_connections_do_not_bring_it_down(descriptor_limit: int, start_daemon: StartDaemon) -> None:
    """As fast as they can be made, on both sockets, three times over."""
    daemon = start_daemon()
    server = daemon.pid
    with RawSession(daemon.endpoint) as session:
        heap = session.create_heap()
        for _ in range(3):
            with ExitStack() as crowd:
                for number in range(700):
                    peer = crowd.enter_context(socket.socket(socket.AF_UNIX))
                    which = ("control", "work")[number % 2]
                    if peer.connect_ex(f"{daemon.directory}/{daemon.name}.{which}"):
                        break
                session.alloc(heap)
                assert is_alive(server), daemon.log
            hello(daemon.endpoint)
        assert status(daemon.endpoint)["gates_shut"] >= 1


@pytest.mark.parametrize("descriptor_limit", [16, MIN_DESCRIPTORS - 1], indirect=True)
@pytest.mark.parametrize("restarts", ["0", "100"])
def test_too_few_descriptors_are_refused(descriptor_limit: int, restarts: str, runtime_dir: Path) -> None:
    """With what is needed, before anything is made: libzmq would abort, or the gates would never open again."""
    daemon = Daemon(runtime_dir, unique_name(), ["--restarts", restarts])
    assert daemon.process.wait(20) == 1
    assert daemon.log == (
        f"heapd: a daemon needs 256 file descriptors at least, three a client and some of its own, and this process "
        f"may have {descriptor_limit}: raise the hard limit (ulimit -n, LimitNOFILE= in systemd)\n"
    )
    assert daemon.segments() == []


def test_the_soft_limit_is_raised_to_the_hard_one(daemon: Daemon) -> None:
    """The usual soft limit of 1,024 would do for 300 clients."""
    limits = Path(f"/proc/{daemon.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    soft, hard = line.split()[3:5]
    assert soft == hard


def test_a_message_without_end_is_dropped_with_its_connection(runtime_dir: Path) -> None:
    """It is buffered inside libzmq before anybody sees it. When the process has grown by it, connections are made
    anew: sessions go on, and what was sent meanwhile is repeated."""
    daemon = ConfiguredDaemon(runtime_dir, "memory_growth=32 << 20, tick_s=0.02")
    try:
        with RawSession(daemon.endpoint) as session:
            heap = session.create_heap()
            flood(daemon.endpoint)
            assert status(daemon.endpoint)["gates_renewed"] >= 1
            session.send(HeapAlloc(heap, 64), 500)
            wait_until(lambda: repeat(session, heap), 10, "the session goes on")
            assert session.busy_blocks(heap) == 1
            assert hello(daemon.endpoint)["session"] == 2
    finally:
        assert daemon.stop() == 0, daemon.log_path.read_text()


def flood(endpoint: str) -> None:
    """Send frames that each announce another, until the daemon cuts the connection."""
    frames = zmtp3_frame(bytes(60_000), more=True) * 16
    with zmtp3_connect(endpoint) as peer:
        for _ in range(1000):  # a GiB: the guard comes long before
            try:
                peer.sendall(frames)
            except (BrokenPipeError, ConnectionResetError):
                return
    pytest.fail("a GiB in one message was taken")


def repeat(session: RawSession, heap: int) -> bool:
    """Repeat a request as a client does whose answer did not come."""
    if not session.work.has_answer(200):
        session.send(HeapAlloc(heap, 64), 500)
        return False
    assert session.work.receive()[:2] == (500, 0)
    while session.work.has_answer(0):
        session.work.receive()
    return True


def test_a_message_of_too_many_small_frames_is_not_read_through(runtime_dir: Path) -> None:
    """To discard a million frames one by one would keep everybody waiting."""
    daemon = ConfiguredDaemon(runtime_dir, "tick_s=0.02")
    try:
        with RawSession(daemon.endpoint) as session:
            session.ask(SessionList())
            with zmtp3_connect(daemon.endpoint) as peer:
                peer.sendall(zmtp3_frame(b"x", more=True) * 20_000 + zmtp3_frame(b"x"))
                assert is_cut_off(peer)
            wait_until(lambda: status(daemon.endpoint)["gates_renewed"] == 1)
            session.reconnect()
            session.ask(SessionList())
    finally:
        assert daemon.stop() == 0, daemon.log_path.read_text()


def test_a_connection_that_says_nothing_is_cut(runtime_dir: Path) -> None:
    """After the time that is given to greet."""
    daemon = ConfiguredDaemon(runtime_dir, "handshake_ms=100")
    try:
        status(daemon.endpoint)
        with connect_raw(daemon.endpoint) as peer:
            greeting = b""
            while part := peer.recv(100):
                greeting += part
            assert greeting.startswith(b"\xff")
    finally:
        assert daemon.stop() == 0


# -- the guards by themselves --------------------------------------------------------------------------------------
def test_the_cap_leaves_a_margin() -> None:
    """Half of a small limit, 1,024 of a large one."""
    assert DescriptorGuard(256).cap == 128
    assert DescriptorGuard(4096).cap == 4096 - 1024
    assert DescriptorGuard(1 << 20).cap == (1 << 20) - 1024


def test_the_guard_counts_before_the_cap_is_passed() -> None:
    """However the accepted connections are told to it, one by one or many at once."""
    for step in (1, 7, 1000):
        with ExitStack() as opened:
            guard = DescriptorGuard(2 * (count_descriptors() + 40))
            for _ in range(200 // step + 1):
                for _ in range(step):
                    opened.callback(os.close, os.dup(0))
                if guard.is_full(step):
                    break
            assert count_descriptors() >= guard.cap
            assert count_descriptors() <= guard.cap + max(16, step)
            assert not guard.has_room()
        assert guard.has_room() == (count_descriptors() < guard.cap * 3 // 4)


def test_a_descriptor_that_was_closed_again_does_not_count() -> None:
    """Many connections that come and go are no crowd."""
    guard = DescriptorGuard(2 * (count_descriptors() + 40))
    assert not any(guard.is_full(10) for _ in range(100))


def test_growth_is_reported_once() -> None:
    """And counted from there."""
    guard = MemoryGuard(8 << 20)
    assert not guard.has_grown()
    # Not from malloc, which may have as much left from earlier tests.
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as ballast:
        for at in range(0, len(ballast), mmap.PAGESIZE):
            ballast[at] = 1
        assert guard.has_grown()
        assert not guard.has_grown()


def test_raising_the_limit_twice_is_harmless() -> None:
    """It is at the hard limit then."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert raise_descriptor_limit() == raise_descriptor_limit() == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
