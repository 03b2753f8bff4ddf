"""Many clients: five hundred at once, and more than there are descriptors for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.wire.messages import SessionList
from tests.conftest import StartDaemon
from tests.harness import Daemon, wait_until
from tests.server.raw import status


@pytest.mark.parametrize(
    ("clients", "seconds"), [(40, 1.0), pytest.param(500, 20.0, marks=pytest.mark.nightly)], ids=["40", "500"]
)
@pytest.mark.usefixtures("runtime_dir")
def test_so_many_client_processes_at_once(clients: int, seconds: float) -> None:
    """Each allocates, writes, checks, hands over and frees on shared heaps: no error, no byte lost, no page left."""
    command = ["-m", "heapd", "stress", "--clients", str(clients), "--seconds", str(seconds), "--json"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["faults"] == []
    assert outcome["is_clean"] is True
    assert outcome["operations"] > clients * 10


# -- descriptors -------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_daemon(start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """A daemon with 256 descriptors at most."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -n 256\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return start_daemon()


def cpu_s(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_more_clients_than_descriptors(small_daemon: Daemon) -> None:
    """Newcomers are told that no daemon can be reached, in their own time; the daemon idles meanwhile and forgets
    nothing; who has a session works on; and when some leave, others come in."""
    endpoint = small_daemon.endpoint
    server = small_daemon.pid
    with ExitStack() as crowd:
        sessions: list[hc.Session] = []
        while True:
            try:
                session = crowd.enter_context(hc.connect(endpoint, autostart=False, timeout=1))
                session.call(SessionList())  # its own connection to the work socket
            except hc.DaemonError:
                break
            sessions.append(session)
            assert len(sessions) < 200, "the daemon has more sessions than descriptors"
        assert len(sessions) > 20
        heap = sessions[0].create_heap("x")
        heap.publish("first", heap.alloc(100))
        with late_arrivals(endpoint):
            used = cpu_s(server)
            time.sleep(1)  # a stretch of time in which nothing happens, but for those who knock
            assert cpu_s(server) - used < 0.3, "the daemon is busy with nothing"
        for session in sessions:
            block = session.open_heap("x").lookup("first")
            assert block.size == 100
        assert heap.validate() == []
        for session in sessions[len(sessions) // 2 :]:
            session.close()
        with wait_until(lambda: try_to_connect(endpoint), 10, "somebody new is let in") as newcomer:
            assert newcomer.open_heap("x").lookup("first").size == 100
        assert status(endpoint)["gates_shut"] >= 1
        assert status(endpoint)["pid"] == server


def try_to_connect(endpoint: str) -> hc.Session | None:
    try:
        return hc.connect(endpoint, autostart=False, timeout=1)
    except hc.DaemonError:
        return None


@contextmanager
def late_arrivals(endpoint: str) -> Iterator[None]:
    """Four that try to connect again and again."""
    is_over = threading.Event()

    def knock() -> None:
        while not is_over.wait(0.05):
            if session := try_to_connect(endpoint):
                session.close()

    threads = [threading.Thread(target=knock) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
