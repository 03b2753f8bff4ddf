"""Everything is killed at once, again and again, and started again by hand: nothing piles up."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import heapd_client as hc
from tests.client.tools import fork
from tests.harness import SEGMENTS, Daemon, unique_name, wait_until

_CLIENTS = 8
_TIMEOUT_S = 60.0  # of a call, and of whatever is waited for: nothing here is to fail because the machine is slow


def _allocate(endpoint: str, ready: int) -> None:
    """A client's life: blocks in a heap of its own and in one that all share, until it is killed."""
    with hc.connect(endpoint, autostart=False, timeout=_TIMEOUT_S) as session:
        own, shared = session.create_heap(), session.open_heap("shared")
        held = [heap.alloc(size) for heap in (own, shared) for size in (16, 1000, 100_000)]
        os.write(ready, b"x")
        while True:
            for heap in (own, shared):
                held.append(heap.alloc(len(held) * 8))
                held.pop(0).free()


def _cycle(directory: Path, name: str) -> Daemon:
    """Start a daemon and clients, and kill all of them while they work. Returns: the daemon, dead."""
    daemon = Daemon(directory, name)
    reader, writer = os.pipe()
    clients = []
    try:
        daemon.status(_TIMEOUT_S)
        with hc.connect(daemon.endpoint, autostart=False, timeout=_TIMEOUT_S) as session:
            # Sessions of processes that died before the start were ended before anybody was answered.
            assert [info.pid for info in session.sessions() if info.is_live] == [os.getpid()]
            wait_until(lambda: session.heaps() == [], _TIMEOUT_S, what="the heaps of the cycle before are gone")
            session.create_heap("shared")
            clients = [fork(lambda: _allocate(daemon.endpoint, writer)) for _ in range(_CLIENTS)]
            os.close(writer)
            heard = 0
            while heard < _CLIENTS:
                said = os.read(reader, _CLIENTS)
                assert said, "a client ended before it was killed"
                heard += len(said)
    finally:
        for pid in clients:
            os.kill(pid, signal.SIGKILL)
        daemon.kill()
        for pid in clients:
            os.waitpid(pid, 0)
        os.close(reader)
    return daemon


def _cycles(directory: Path, count: int) -> None:
    name = unique_name()
    segments = [len(_cycle(directory, name).segments()) for _ in range(count)]
    assert len(set(segments)) == 1
    last = Daemon(directory, name)
    last.status(_TIMEOUT_S)
    with hc.connect(last.endpoint, autostart=False, timeout=_TIMEOUT_S) as session:
        wait_until(lambda: len(session.sessions()) == 1, _TIMEOUT_S, what="the killed clients' sessions are gone")
        wait_until(lambda: session.heaps() == [], _TIMEOUT_S, what="their heaps are gone")
        session.create_heap().alloc(100)
    assert last.stop(_TIMEOUT_S) == 0
    assert [path.name for path in SEGMENTS.iterdir() if name in path.name] == []
    assert [path.name for path in directory.iterdir()] == [f"{name}.log"]


def test_cycles_of_start_and_kill_leave_nothing(runtime_dir: Path) -> None:
    """Three cycles of start, clients that allocate, kill -9 of everything: /dev/shm is as before."""
    _cycles(runtime_dir, 3)


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # 75 s on an idle machine of two cores, 230 s at a load of 9
def test_two_hundred_cycles_of_start_and_kill_leave_nothing(runtime_dir: Path) -> None:
    """The same, two hundred times."""
    _cycles(runtime_dir, 200)
