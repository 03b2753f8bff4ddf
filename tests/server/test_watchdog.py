"""A server that hangs without dying is killed and replaced, from its start to its stop; one that is merely stopped with
its supervisor, held by a debugger, or long in starting is not."""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

import heapd_client as hc
from heapd.cli import main
from heapd.server.link import Pulse
from heapd.server.watchdog import Watchdog
from tests.conftest import StartDaemon
from tests.harness import LIFELINE, Daemon, is_alive, unique_name, wait_until

_SILENCE_S = 1.0  # the shortest that may be asked for
_OPTIONS = ("--watchdog", str(_SILENCE_S))
_PTRACE_DETACH, _PTRACE_SEIZE, _PTRACE_INTERRUPT = 17, 0x4206, 0x4207


@pytest.fixture
def hang_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """`hang_at("start")`: daemons that this test starts hang once there, at their "status", or at their "stop"."""
    monkeypatch.setenv("HEAPD_TEST_HANG", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'hanging'}:{os.environ.get('PYTHONPATH', '')}")
    return lambda where: (tmp_path / where).touch()


def wait_for_another(daemon: Daemon, pid: int) -> None:
    wait_until(lambda: daemon.pid != pid, what="another server")


# -- the whole daemon ------------------------------------------------------------------------------------------------
def test_a_server_that_was_stopped_by_mistake_is_killed_and_replaced(start_daemon: StartDaemon) -> None:
    """A client that waits goes on as after a crash; the log says why, and the restart counts as one."""
    daemon = start_daemon(*_OPTIONS)
    pid = daemon.pid
    with hc.connect(daemon.endpoint, autostart=False, timeout=60) as session:
        heap = session.create_heap("work")
        block = heap.alloc(1000)
        block.view[:4] = b"kept"
        os.kill(pid, signal.SIGSTOP)
        heap.publish("it", block)
        assert session.daemon_pid != pid
        assert bytes(heap.lookup("it").view[:4]) == b"kept"
    assert not is_alive(pid)
    assert daemon.status()["restarts"] == 1
    assert re.search(
        rf"ERROR heapd.supervisor: the server process {pid} hangs: its loop has not turned for 1 s, and the kernel "
        r"says T \(stopped\); killing it\n.*"
        rf"ERROR heapd.supervisor: the server process {pid} hung and was killed by SIGKILL after .* starting another",
        daemon.log,
        re.DOTALL,
    )


def test_a_server_in_an_endless_loop_says_where_before_it_is_killed(
    start_daemon: StartDaemon, hang_at: Callable[[str], None]
) -> None:
    """The stack of its threads is in the log: it was the request for its status."""
    daemon = start_daemon(*_OPTIONS)
    pid = daemon.pid
    hang_at("status")
    wait_for_another(daemon, pid)
    assert f"the server process {pid} hung and was killed by SIGABRT" in daemon.log
    assert re.search(r'File ".*sitecustomize.py", line \d+ in status_or_hang\n', daemon.log)


def test_a_server_that_hangs_at_its_start_is_replaced(
    start_daemon: StartDaemon, hang_at: Callable[[str], None]
) -> None:
    """It has no loop yet, but it spends no CPU time either."""
    hang_at("start")
    daemon = start_daemon(*_OPTIONS)
    assert "hangs: its start has not got on for 1 s, and the kernel says S (sleeping); killing it" in daemon.log
    assert "hung and was killed by SIGABRT" in daemon.log
    assert "in init_or_hang" in daemon.log


def test_a_server_that_hangs_at_its_stop_is_tidied_up_after(
    start_daemon: StartDaemon, hang_at: Callable[[str], None]
) -> None:
    """It has said goodbye, and nobody but its supervisor waits for its end."""
    daemon = start_daemon(*_OPTIONS)
    hang_at("stop")
    assert daemon.stop() == 0
    assert "hangs: its stop has not got on for 1 s, and the kernel says S (sleeping); killing it" in daemon.log
    assert daemon.segments() == []


def test_a_log_that_nobody_reads_keeps_neither_clients_nor_the_watchdog_waiting(runtime_dir: Path) -> None:
    """Its lines are lost, and how many is said when somebody reads again."""
    endpoint = f"ipc://{runtime_dir}/{unique_name()}"
    with full_pipe() as (reader, writer):
        command = [sys.executable, "-m", "heapd", "serve", "--endpoint", endpoint, "--reserve", "1GiB", *_OPTIONS]
        command += ["--until-eof", str(LIFELINE)]
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=writer, pass_fds=[LIFELINE])
        try:
            pid = wait_until(lambda: server_of(endpoint))
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: server_of(endpoint) not in (None, pid), what="another server")
            while select.select([reader], [], [], 0)[0]:
                os.read(reader, 65_536)
            with hc.connect(endpoint, autostart=False):
                text = os.read(reader, 65_536).decode()
            assert re.search(r"WARNING heapd: \d+ lines of this log are lost, because nobody read it\n", text)
        finally:
            daemon.terminate()
            assert daemon.wait(10) == 0


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe that takes no more."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while os.write(writer, bytes(4096)):
                pass
        os.set_blocking(writer, True)
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def server_of(endpoint: str) -> int | None:
    """The server's process id, None if it does not answer."""
    try:
        return int(hc.daemon_status(endpoint, timeout=0.3)["pid"])
    except hc.DaemonError:
        return None


def test_a_server_that_hangs_while_it_is_to_stop_is_tidied_up_after(start_daemon: StartDaemon) -> None:
    """SIGTERM reaches it no more; nothing of it is left all the same."""
    daemon = start_daemon(*_OPTIONS)
    os.kill(daemon.pid, signal.SIGSTOP)
    assert daemon.stop() == 0
    assert daemon.segments() == []


def test_a_tree_that_was_stopped_goes_on_with_its_server(start_daemon: StartDaemon) -> None:
    """Ctrl-Z, and fg later than the watchdog bears: the supervisor, which goes on first, does not count the time."""
    daemon = start_daemon(*_OPTIONS)
    pid = daemon.pid
    for process in (daemon.process.pid, pid):
        os.kill(process, signal.SIGSTOP)
    time.sleep(1.3 * _SILENCE_S)  # what passes is what is tested
    for process in (daemon.process.pid, pid):
        os.kill(process, signal.SIGCONT)
    time.sleep(_SILENCE_S / 2)
    assert (daemon.pid, daemon.status()["restarts"]) == (pid, 0)


def test_a_server_that_a_debugger_holds_is_left_to_it(start_daemon: StartDaemon) -> None:
    """However long it stands at a breakpoint; it goes on when it is let go."""
    daemon = start_daemon(*_OPTIONS)
    pid = daemon.pid
    with held_by_debugger(pid):
        time.sleep(1.3 * _SILENCE_S)  # what passes is what is tested
    assert (daemon.pid, daemon.status()["restarts"]) == (pid, 0)


@contextmanager
def held_by_debugger(pid: int) -> Iterator[None]:
    """While inside, the process's main thread is stopped, as a debugger stops it."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace.restype = ctypes.c_long
    if ptrace(_PTRACE_SEIZE, pid, None, None):
        pytest.skip(f"this machine lets nobody trace: {os.strerror(ctypes.get_errno())}")
    assert ptrace(_PTRACE_INTERRUPT, pid, None, None) == 0
    os.waitpid(pid, 0x40000000)  # __WALL: its stop
    try:
        yield
    finally:
        assert ptrace(_PTRACE_DETACH, pid, None, None) == 0


def test_a_silence_too_short_to_tell_is_refused() -> None:
    """A server that only waits for work turns its loop four times a second."""
    refused = CliRunner().invoke(main, ["serve", "--name", unique_name(), "--watchdog", "0.5"])
    assert refused.exit_code == 2
    assert "0.5 is too short" in refused.stderr


# -- the watchdog alone ----------------------------------------------------------------------------------------------
class Watch:
    """A watchdog with a clock of its own, over this process. Fields: now, pulse, dog."""

    def __init__(self, silence_s: float = 8.0) -> None:
        self.now = 100.0
        self.pulse = Pulse()
        self.dog = Watchdog(os.getpid(), self.pulse, silence_s, lambda: self.now)

    def looks(self, count: int, pause_s: float = 1.0) -> list[bool]:
        """What it says at each of so many looks, so far apart."""
        found = []
        for _ in range(count):
            self.now += pause_s
            found.append(self.dog.is_alarmed())
        return found


def test_the_alarm_comes_after_the_silence_and_stays() -> None:
    """Eight looks without a beat; and again at each look after, as whoever is to be killed may take its time."""
    watch = Watch()
    assert watch.looks(10) == [False] * 7 + [True] * 3


def test_a_beat_begins_the_silence_anew() -> None:
    """However little before the alarm it comes."""
    watch = Watch()
    assert not any(watch.looks(7))
    watch.pulse.beat()
    assert watch.looks(9) == [False] * 8 + [True]


def test_a_look_that_comes_late_counts_once() -> None:
    """The supervisor was stopped itself, or the machine was: what passed meanwhile is nobody's silence."""
    watch = Watch()
    assert watch.looks(1, pause_s=3600) == [False]
    assert watch.looks(7) == [False] * 6 + [True]


def test_whoever_asks_often_is_answered_at_the_looks_alone() -> None:
    """The supervisor is woken by other things, too."""
    watch = Watch()
    assert not any(watch.looks(60, pause_s=0.125))
    assert watch.dog.pause_s == 0.5
    assert watch.looks(8, pause_s=0.125) == [False] * 3 + [True] + [False] * 4


def test_no_silence_is_no_watchdog() -> None:
    """`--watchdog 0`: nothing to wait for, and no alarm ever."""
    watch = Watch(silence_s=0.0)
    assert watch.dog.pause_s is None
    assert not any(watch.looks(100))
