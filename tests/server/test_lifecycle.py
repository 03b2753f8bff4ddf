"""A daemon's start and end: what it refuses, what it cleans up, what it leaves, and when it ends by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import heapd.wire as heapd_wire
from heapd.errors import SegmentError
from heapd.layout import F_PERSISTENT, F_SERIALIZE, H_MAGIC, H_PID, H_START_TIME, MAGIC, WORD
from heapd.server.credentials import start_time_of
from heapd.server.leftovers import Claim, claim_segment, inspect_segment
from heapd.wire import Endpoint
from heapd.wire.messages import HeapDestroy, HeapOpen, Request, SessionClose, Stop
from heapd_client import control
from tests.conftest import StartDaemon
from tests.harness import Daemon, children_of, unique_name, wait_until
from tests.server.raw import RawSession, connect_raw, hello, status

SHM = Path("/dev/shm")


def heapd(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a heapd command to its end."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "heapd", *arguments], capture_output=True, text=True, timeout=20, **options
    )


def files_of(daemon: Daemon) -> list[str]:
    """Sockets and lock file of a daemon."""
    return sorted(path.name for path in daemon.directory.glob(f"{daemon.name}.*") if path.suffix != ".log")


# -- one at a time -------------------------------------------------------------------------------------------------
def test_a_second_daemon_of_one_name_is_refused_by_the_firsts_pid(daemon: Daemon) -> None:
    """A bind on the path would succeed silently and take the clients away: the lock comes first."""
    server = daemon.pid
    second = heapd("serve", "-e", daemon.endpoint)
    assert second.returncode == 5
    assert second.stderr.startswith(f"heapd: daemon {daemon.name!r} is running already: process {daemon.process.pid} ")
    assert status(daemon.endpoint)["pid"] == server


def test_daemons_of_one_name_in_two_directories_do_not_meet(start_daemon: StartDaemon, tmp_path: Path) -> None:
    """Their segments lie in one flat space and are told apart."""
    first = start_daemon(name="same")
    second = subprocess.Popen(
        [sys.executable, "-m", "heapd", "serve", "--name", "same", "--runtime-dir", str(tmp_path / "r")],
        stderr=subprocess.DEVNULL,
    )
    try:
        endpoint = f"ipc://{tmp_path}/r/same"
        assert status(endpoint)["segment"] != status(first.endpoint)["segment"]
    finally:
        second.terminate()
        assert second.wait(10) == 0


# -- the end -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stops_it_cleanly(start_daemon: StartDaemon, number: signal.Signals) -> None:
    """Exit status 0; sockets, lock file and segment are gone."""
    daemon = start_daemon()
    assert daemon.segments()
    daemon.process.send_signal(number)
    assert daemon.process.wait(10) == 0
    assert files_of(daemon) == []
    assert daemon.segments() == []


def test_stop_waits_until_it_has_ended(start_daemon: StartDaemon) -> None:
    """After `heapd stop` nothing of it is left."""
    daemon = start_daemon()
    server = daemon.pid
    stopped = heapd("stop", daemon.endpoint)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert f"process {server}" in stopped.stdout
    assert daemon.process.wait(1) == 0
    assert files_of(daemon) == []


def test_stop_is_done_where_the_daemon_goes_between_its_questions(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks who the daemon is and then tells it to stop; what somebody else stopped meanwhile has stopped."""
    daemon = start_daemon()
    server, ask = daemon.pid, control.ask

    def ask_too_late(endpoint: Endpoint, request: Request, timeout_s: float) -> object:
        if isinstance(request, Stop):
            daemon.stop()
        return ask(endpoint, request, timeout_s)

    monkeypatch.setattr(control, "ask", ask_too_late)
    assert control.stop_daemon(daemon.endpoint) == server


def test_who_stops_what_another_one_is_stopping_is_not_kept_waiting(start_daemon: StartDaemon) -> None:
    """It was stopped, or it is not there; nobody waits for the answer of one that has gone."""
    daemon = start_daemon()
    command = [sys.executable, "-m", "heapd", "stop", daemon.endpoint, "--timeout", "30"]
    stoppers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(5)
    ]
    told = [(stopper.communicate(timeout=60)[0], stopper.returncode) for stopper in stoppers]
    assert {status for _, status in told} <= {0, 3}, told
    assert 0 in {status for _, status in told}, told
    assert daemon.process.wait(1) == 0


def test_a_kill_leaves_the_segment_and_nothing_that_would_remove_it(start_daemon: StartDaemon) -> None:
    """No resource tracker was ever started: the arena outlives its daemon until heapd itself removes it."""
    daemon = start_daemon()
    assert children_of(daemon.process.pid) == [daemon.pid]
    assert children_of(daemon.pid) == []
    daemon.kill()
    assert len(daemon.segments()) == 2


def test_a_start_goes_on_where_a_kill_left_off(start_daemon: StartDaemon) -> None:
    """Stale sockets, a stale lock file with a dead pid, an arena without a daemon: none needs a manual step."""
    name = unique_name()
    first = start_daemon(name=name)
    segment = status(first.endpoint)["segment"]
    with RawSession(first.endpoint) as session:
        session.create_heap("kept", F_SERIALIZE | F_PERSISTENT)
    first.kill()
    assert files_of(first) == [f"{name}.control", f"{name}.lock", f"{name}.work"]
    second = start_daemon(name=name)
    answer = status(second.endpoint)
    assert (answer["segment"], answer["incarnation"], answer["sessions"]) == (segment, 2, 1)
    assert re.search(r"WARNING .* going on with the arena .*: start 2, 1 heaps, 1 sessions", second.log)
    with RawSession(second.endpoint) as session:
        session.ask(HeapOpen("kept"))
        session.alloc(session.create_heap())


def test_it_ends_by_itself_when_nobody_uses_it(start_daemon: StartDaemon) -> None:
    """That long after its last session."""
    daemon = start_daemon("--idle-exit", "0.3")
    with RawSession(daemon.endpoint) as session:
        greeting = session.greeting
        assert greeting["session"] == 1
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.process.wait(1)
        session.ask(SessionClose())
    assert daemon.process.wait(10) == 0
    assert daemon.segments() == []


def test_a_persistent_heap_keeps_it_alive(start_daemon: StartDaemon) -> None:
    """Somebody will want it again."""
    daemon = start_daemon("--idle-exit", "0.2")
    with RawSession(daemon.endpoint) as session:
        heap = session.create_heap("kept", F_SERIALIZE | F_PERSISTENT)
        session.ask(SessionClose())
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.process.wait(1)
    with RawSession(daemon.endpoint) as session:
        session.ask(HeapOpen("kept"))
        session.ask(HeapDestroy(heap))
        session.ask(SessionClose())
    assert daemon.process.wait(10) == 0


@pytest.mark.parametrize("is_abstract", [False, True], ids=["path", "abstract"])
def test_it_says_when_it_is_ready_to_systemd_too(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abstract: bool
) -> None:
    """One datagram to $NOTIFY_SOCKET, from the process that the manager started."""
    name = f"@{unique_name()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        manager.bind(name.replace("@", "\0"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        daemon = start_daemon()
        word, credentials, _, _ = manager.recvmsg(64, socket.CMSG_SPACE(12))
    assert word == b"READY=1"
    assert struct.unpack("3i", credentials[0][2])[0] == daemon.process.pid


def test_it_says_nothing_for_the_unit_that_started_it(
    start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program's own readiness is its own to tell, whatever it starts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
        assert start_daemon().stop() == 0
        with pytest.raises(BlockingIOError):
            manager.recv(64)


def test_it_ends_with_whoever_it_was_started_for(runtime_dir: Path) -> None:
    """The other end of a pipe closes, however its process ended; a byte in it means nothing."""
    read_end, write_end = os.pipe()
    ready, told = os.pipe()
    command = [
        sys.executable,
        "-m",
        "heapd",
        "serve",
        "--name",
        "e",
        "--until-eof",
        str(read_end),
        "--ready-fd",
        str(told),
    ]
    daemon = subprocess.Popen(command, pass_fds=[read_end, told], stderr=subprocess.DEVNULL)
    os.close(read_end)
    os.close(told)
    with open(ready, "rb") as pipe:
        assert pipe.read() == b"ready\n"
    os.write(write_end, b"x")
    assert status(f"ipc://{runtime_dir}/e")["state"] == "running"
    os.close(write_end)
    assert daemon.wait(10) == 0
    assert list(runtime_dir.iterdir()) == []


# -- the start -----------------------------------------------------------------------------------------------------
def test_it_says_when_it_is_ready(runtime_dir: Path) -> None:
    """Whoever started it reads a line from a pipe, and can connect at once."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "heapd", "serve", "--name", "r", "--ready-fd", str(write_end)]
    daemon = subprocess.Popen(command, pass_fds=[write_end], stderr=subprocess.DEVNULL)
    os.close(write_end)
    try:
        with open(read_end, "rb") as pipe:
            assert pipe.read() == b"ready\n"
        connect_raw(f"ipc://{runtime_dir}/r").close()
    finally:
        daemon.terminate()
        assert daemon.wait(10) == 0


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    """With one line that says what to do."""
    tmp_path.chmod(0o755)
    refused = heapd("serve", "--runtime-dir", str(tmp_path))
    assert refused.returncode == 1
    assert re.fullmatch(r"heapd: the runtime directory .* is open to others .*\n", refused.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--name", "a/b"], 2, "letters, digits"),
        (["--name", "x" * 65], 2, "letters, digits"),
        (["--runtime-dir", "/tmp/" + "d" * 100], 2, "choose a shorter"),
        (["--reserve", "12x"], 2, "is no size"),
        (["--reserve", "1MiB"], 2, "1 MiB is less than 16 MiB"),
        (["-e", "demo", "--name", "demo"], 2, "--endpoint says it all"),
        (["--ready-fd", "99"], 2, "not open"),
        (["--idle-exit", "-1"], 2, "--idle-exit"),
        (["--until-eof", "99"], 2, "no open pipe"),
        (["--until-eof", "0"], 2, "no open pipe"),  # a file: it would be at its end at once
        (["--commit-limit", "4KiB"], 6, "commit limit"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_clear_line(runtime_dir: Path, arguments: list[str], code: int, text: str) -> None:
    """Never a traceback; nothing is left behind."""
    refused = heapd("serve", *arguments)
    assert refused.returncode == code
    assert text in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path for path in runtime_dir.iterdir() if path.suffix != ".log"] == []


def test_the_segment_of_a_daemon_that_lives_is_not_taken(daemon: Daemon) -> None:
    """Even if somebody took its lock file away, so that a second daemon could lock a new one."""
    (daemon.directory / f"{daemon.name}.lock").unlink()
    refused = heapd("serve", "-e", daemon.endpoint)
    assert refused.returncode == 1
    assert f"in use by the daemon of process {daemon.pid}" in refused.stderr


# -- whose a segment is --------------------------------------------------------------------------------------------
class MadeUp:
    """A segment whose header says what a test wants."""

    def __init__(self, pid: int, start_time: int, magic: int = MAGIC) -> None:
        self.endpoint = Endpoint("/run/nowhere", unique_name())
        words = [0] * 16
        words[H_MAGIC], words[H_PID], words[H_START_TIME] = magic, pid, start_time
        self.path = SHM / self.endpoint.segment
        self.path.write_bytes(b"".join(word.to_bytes(WORD, "little") for word in words))


def test_a_segment_is_its_living_makers() -> None:
    """Process id and start time both have to match: ids are used again."""
    me = os.getpid()
    born = start_time_of(me)
    assert born is not None
    for start_time, is_alive in ((born, True), (born - 1, False)):
        made = MadeUp(me, start_time)
        try:
            owner = inspect_segment(made.endpoint.segment)
            assert owner is not None
            assert (owner.pid, owner.is_alive, owner.is_foreign) == (me, is_alive, False)
        finally:
            made.path.unlink()


def test_a_segment_that_was_never_finished_is_removed() -> None:
    """Its maker was killed before it wrote who it is."""
    made = MadeUp(os.getpid(), 1, magic=0)
    assert claim_segment(made.endpoint) == Claim.of(made.endpoint.segment, is_there=False)
    assert not made.path.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give a file away")
def test_a_name_that_another_user_took_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon takes the name with the hash, and says so if that is taken too."""
    name = unique_name()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/me")
    endpoint = Endpoint("/run/me/heapd", name)
    taken = [SHM / endpoint.segment, SHM / endpoint.unique_segment]
    try:
        taken[0].write_bytes(b"theirs")
        os.chown(taken[0], 65534, 65534)
        assert claim_segment(endpoint) == Claim.of(endpoint.unique_segment, is_there=False)
        taken[1].symlink_to("/etc/hostname")
        with pytest.raises(SegmentError, match="another user"):
            claim_segment(endpoint)
        assert taken[0].read_bytes() == b"theirs"
    finally:
        for path in taken:
            path.unlink(missing_ok=True)


# -- asking --------------------------------------------------------------------------------------------------------
def test_status_says_who_and_how_much(daemon: Daemon) -> None:
    """As JSON for programs, and as lines for people."""
    answer = heapd("status", daemon.endpoint, "--json")
    assert answer.returncode == 0
    values = json.loads(answer.stdout)
    assert (values["name"], values["endpoint"]) == (daemon.name, daemon.endpoint)
    assert (values["pid"], values["incarnation"], values["sessions"]) == (daemon.pid, 1, 0)
    lines = heapd("status", env={**os.environ, "HEAPD_ENDPOINT": daemon.endpoint}).stdout
    assert re.search(r"^arena +.* reserved of 1 GiB, ", lines, re.MULTILINE)


@pytest.mark.parametrize("command", ["status", "stop"])
def test_where_no_daemon_is_the_command_says_so(runtime_dir: Path, command: str) -> None:
    """Exit status 3 and how to start one."""
    answer = heapd(command, "nobody")
    assert answer.returncode == 3
    assert answer.stderr == (
        f"heapd: no daemon answers at ipc://{runtime_dir}/nobody; start one with "
        f"`heapd serve -e ipc://{runtime_dir}/nobody`\n"
    )


def test_a_stale_socket_is_no_daemon(start_daemon: StartDaemon) -> None:
    """After a kill the files are still there; zmq itself would wait for somebody to come."""
    daemon = start_daemon()
    daemon.kill()
    assert heapd("status", daemon.endpoint).returncode == 3


def test_a_daemon_that_does_not_answer_is_lost(daemon: Daemon) -> None:
    """Exit status 4, after the time that was given."""
    server = daemon.pid
    os.kill(server, signal.SIGSTOP)
    try:
        answer = heapd("status", daemon.endpoint, "--timeout", "0.2")
    finally:
        os.kill(server, signal.SIGCONT)
    assert answer.returncode == 4
    assert "did not answer within 0.2 s" in answer.stderr


def test_latency_figures_count_requests(daemon: Daemon) -> None:
    """Each request on the work socket is one."""
    with RawSession(daemon.endpoint) as session:
        heap = session.create_heap()
        for _ in range(20):
            session.alloc(heap)
    wait_until(lambda: status(daemon.endpoint)["requests"] == 21)
    answer = status(daemon.endpoint)
    assert 0 < answer["rpc_median_us"] <= answer["rpc_p99_us"] < 1e6


def test_hello_and_status_are_documented_key_by_key(daemon: Daemon) -> None:
    """PROTOCOL.md lists every key that they answer."""
    document = (Path(heapd_wire.__file__).parent / "PROTOCOL.md").read_text()
    listed = {name for line in document.splitlines() if line[:2] == "| " for name in line.split("|")[1].split(", ")}
    documented = {name.strip() for name in listed}
    assert set(hello(daemon.endpoint)) <= documented
    assert set(status(daemon.endpoint)) <= documented
