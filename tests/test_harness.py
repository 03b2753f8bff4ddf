"""The net under the other tests: what a test leaves behind is seen, and what others do is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import RUN_VARIABLE, SEGMENTS, Daemon, Traces, is_alive, unique_name, wait_until

if TYPE_CHECKING:
    import heapd_client


def test_a_segment_left_behind_is_seen() -> None:
    """A file heapd-* that is new in /dev/shm is a trace, one that was there before is not."""
    before = Traces.now()
    path = SEGMENTS / f"heapd-{unique_name()}"
    path.touch()
    try:
        assert (Traces.now() - before).segments == {path.name}
        assert not Traces.now() - Traces.now()
    finally:
        path.unlink()


def test_a_segment_of_another_run_is_not_ours() -> None:
    """Two test runs on one machine do not fail each other."""
    before = Traces.now()
    path = SEGMENTS / f"heapd-t{os.getpid() + 1}-abc"
    path.touch()
    try:
        assert not Traces.now() - before
    finally:
        path.unlink()


def test_a_process_left_behind_is_seen_and_removed() -> None:
    """A child is a trace while it lives."""
    before = Traces.now()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = Traces.now() - before
    assert [pid for pid, _ in left.processes] == [child.pid]
    left.remove()
    assert child.wait() < 0
    child.communicate()
    assert not Traces.now() - before


ORPHAN = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL).pid)
"""


def test_an_orphan_is_seen() -> None:
    """A grandchild whose parent has ended is known by its environment."""
    before = Traces.now()
    orphan = int(subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, check=True).stdout)
    left = wait_until(lambda: Traces.now() - before)
    assert [pid for pid, _ in left.processes] == [orphan]
    left.remove()
    wait_until(lambda: not Traces.now() - before)


def test_a_context_left_behind_is_seen() -> None:
    """A ZeroMQ context is a trace until it is terminated."""
    zmq = pytest.importorskip("zmq")
    before = Traces.now()
    context = zmq.Context()
    with context.socket(zmq.DEALER):
        wait_until(lambda: (Traces.now() - before).contexts)  # its threads name themselves as they begin
    context.term()
    wait_until(lambda: not Traces.now() - before)


def test_wait_until_gives_up_at_its_deadline() -> None:
    """A condition that stays false fails the test, and the failure says which it was."""
    with pytest.raises(AssertionError, match=r"not within 0\.01 s: the moon is blue"):
        wait_until(lambda: False, 0.01, "the moon is blue")
    assert os.environ[RUN_VARIABLE].startswith(f"t{os.getpid()}-")


def test_the_daemon_fixture_serves_and_ends_cleanly(daemon: Daemon) -> None:
    """A test's daemon answers status under its own name, and its segments are gone after stop."""
    status = daemon.status()
    assert (status["name"], status["endpoint"]) == (daemon.name, daemon.endpoint)
    assert sorted(daemon.segments()) == [status["segment"], f"{status['segment']}-ledger"]
    assert daemon.pid > 0
    assert daemon.stop() == 0
    assert daemon.segments() == []


def test_a_killed_daemons_segment_is_removed_with_the_test(daemon: Daemon) -> None:
    """A test may kill its daemon; what that leaves is cleared away."""
    daemon.kill()
    assert not daemon.is_running
    assert daemon.segments()


def test_a_daemon_that_cannot_start_shows_its_log(runtime_dir: Path) -> None:
    """Waiting for a daemon that ended fails at once, with what it said."""
    daemon = Daemon(runtime_dir, unique_name(), ["--no-such-option"])
    with pytest.raises(AssertionError, match="--no-such-option"):
        daemon.status()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_ends_with_a_test_run_that_has_no_time_to_stop_it(runtime_dir: Path, number: signal.Signals) -> None:
    """Killed, or ended before any fixture could do something: neither processes nor segments are left."""
    program = (
        "import pathlib, sys, time; from tests.harness import Daemon, unique_name\n"
        "daemon = Daemon(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "print(daemon.process.pid, daemon.pid, flush=True)\n"
        "time.sleep(60)"
    )
    name = unique_name()
    command = [sys.executable, "-c", program, str(runtime_dir), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as run:
        assert run.stdout is not None
        processes = [int(pid) for pid in run.stdout.readline().split()]
        assert len(processes) == 2
        run.send_signal(number)
        assert run.wait(10) == -number
    wait_until(lambda: not any(map(is_alive, processes)))
    assert list(SEGMENTS.glob(f"heapd-{name}*")) == []


def test_the_session_fixture_is_a_session_of_the_daemon(daemon: Daemon, session: heapd_client.Session) -> None:
    """`session` and `daemon` belong together."""
    assert session.endpoint == daemon.endpoint
