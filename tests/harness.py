"""What the tests' fixtures are made of: waiting for conditions, daemons as processes, and what a test left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEGMENTS = Path("/dev/shm")
RUN_VARIABLE = "HEAPD_TEST_RUN"  # in the environment of every process that this run starts
_RUN = f"t{os.getpid()}-{secrets.token_hex(4)}"
_RUN_MARK = f"{RUN_VARIABLE}={_RUN}".encode()
# They end with the test run, by design of multiprocessing.
_LASTING = (b"multiprocessing.resource_tracker", b"multiprocessing.forkserver")
LIFELINE, _lifeline_end = os.pipe()  # of this run: a daemon that is given LIFELINE ends with it, however it ends
_strangers: set[int] = set()  # pids found not to be this run's, so that a scan reads only what is new


def unique_name() -> str:
    """A name for a daemon or arena that no other test run uses."""
    return f"t{os.getpid()}-{secrets.token_hex(3)}"


def wait_until(condition: Callable[[], Any], deadline_s: float = 10.0, what: str = "") -> Any:
    """The condition's first true value; fails the test if there is none within the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(f"not within {deadline_s:g} s: {what or getattr(condition, '__name__', condition)}")
        time.sleep(0.005)


# -- what a test left behind -------------------------------------------------------------------------------------------
def mark_run() -> None:
    """Mark this run's environment, so that its processes are told from those of another run."""
    os.environ[RUN_VARIABLE] = _RUN


@dataclass(frozen=True)
class Traces:
    """What a test may leave: segments (names in /dev/shm), processes (pid and command), contexts (ZeroMQ threads)."""

    segments: frozenset[str]
    processes: frozenset[tuple[int, str]]
    contexts: frozenset[int]

    @classmethod
    def now(cls) -> Traces:
        return cls(frozenset(_segments()), frozenset(_processes()), frozenset(_context_threads()))

    def __sub__(self, before: Traces) -> Traces:
        segments = self.segments - before.segments
        return Traces(
            frozenset(name for name in segments if not _is_strangers(name)),
            self.processes - before.processes,
            self.contexts - before.contexts,
        )

    def __bool__(self) -> bool:
        return bool(self.segments or self.processes or self.contexts)

    def __str__(self) -> str:
        lines = [f"segment /dev/shm/{name}" for name in sorted(self.segments)]
        lines += [f"process {pid}: {command}" for pid, command in sorted(self.processes)]
        if self.contexts:
            lines.append(f"a ZeroMQ context that was not terminated ({len(self.contexts)} threads)")
        return "\n".join(lines)

    def remove(self) -> None:
        """Clear away what this run left, so that the next test does not trip over it."""
        for pid, _ in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for name in self.segments:
            if name.startswith(f"heapd-t{os.getpid()}-"):
                (SEGMENTS / name).unlink(missing_ok=True)


def _segments() -> Iterable[str]:
    return (name for name in os.listdir(SEGMENTS) if name.startswith("heapd-"))


def _is_strangers(name: str) -> bool:
    """True if another run made the segment: it is named so, or a process that is not ours has it mapped."""
    run = name.removeprefix("heapd-").split("-")[0]
    if run[:1] == "t" and run[1:].isdigit():
        return run[1:] != str(os.getpid())
    ours = {pid for pid, _ in _processes()} | {os.getpid()}
    return any(pid not in ours and f"/{name}".encode() in _read(pid, "maps") for pid in _pids())


def _processes() -> Iterable[tuple[int, str]]:
    """Living processes of this run: its children, and whatever carries its mark; (pid, command)."""
    pids = set(_pids())
    _strangers.intersection_update(pids)
    for pid in pids - _strangers - {os.getpid()}:
        state = _read(pid, "stat").rpartition(b") ")[2].split()  # state, parent, ...
        if len(state) < 2 or state[0] in b"ZX":
            continue
        if int(state[1]) != os.getpid() and _RUN_MARK not in _read(pid, "environ").split(b"\0"):
            _strangers.add(pid)
            continue
        command = _read(pid, "cmdline")
        if not any(lasting in command for lasting in _LASTING):
            yield pid, command.replace(b"\0", b" ").decode(errors="replace")[:120]


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # it has ended, or is another user's
        return b""


def _context_threads() -> Iterable[int]:
    """Thread ids of this process's ZeroMQ contexts; libzmq names its threads ZMQbg/..."""
    for entry in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            if Path(f"/proc/self/task/{entry}/comm").read_text().startswith("ZMQbg"):
                yield int(entry)


def children_of(pid: int) -> list[int]:
    """Process ids of the children that a process has now."""
    return [int(child) for child in _read(pid, f"task/{pid}/children").split()]


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    state = _read(pid, "stat").rpartition(b") ")[2][:1]
    return state not in (b"", b"Z", b"X")


# -- daemons -----------------------------------------------------------------------------------------------------------
class Daemon:
    """`heapd serve` as a process of its own: a supervisor, whose child is the server. It ends with the test run.

    Fields: name, directory (of its sockets), endpoint (as clients write it), process (the supervisor).
    """

    def __init__(self, directory: Path, name: str, arguments: Sequence[str] = ()) -> None:
        self.name = name
        self.directory = directory
        self.endpoint = f"ipc://{directory}/{name}"
        self._log = directory / f"{name}.log"
        command = [sys.executable, "-m", "heapd", "serve", "--name", name, "--runtime-dir", str(directory)]
        command += ["--until-eof", str(LIFELINE)]
        if "--reserve" not in arguments:
            command += ["--reserve", "1GiB"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[LIFELINE],
            )

    @property
    def pid(self) -> int:
        """Process id of the server itself."""
        return int(self.status()["pid"])

    @property
    def log(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return self._log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def status(self, deadline_s: float = 10.0) -> dict[str, Any]:
        """Its answer to a status request; waits for a daemon that has only just begun."""
        import zmq

        from heapd.wire import codec, messages

        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.reconnect_ivl = 10
            socket.connect(f"{self.endpoint}.control")

            def is_answered() -> bool:
                """One that dies over the question is asked again."""
                socket.send(codec.encode_request(messages.Status(), 1))
                return bool(socket.poll(500)) or not self.is_running

            wait_until(is_answered, deadline_s, f"{self.endpoint} answers status")
            if not socket.poll(0):
                raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log}")
            _, code, payload = codec.decode_reply(socket.recv())
        assert code == 0, payload
        answer: dict[str, Any] = payload
        return answer

    def segments(self) -> list[str]:
        """Names of its segments that are in /dev/shm: the arena's, and the ledger's."""
        return sorted(name for name in _segments() if name.startswith(f"heapd-{self.name}"))

    def stop(self, deadline_s: float = 10.0) -> int:
        """SIGTERM; its exit status."""
        if self.is_running:
            self.process.terminate()
        return self.process.wait(deadline_s)

    def kill(self) -> None:
        """SIGKILL to supervisor and server; its segments stay, as after any crash, until the test ends."""
        if self.is_running:
            self.process.send_signal(signal.SIGSTOP)  # so that it starts no other server
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it may just have ended
            servers = [os.pidfd_open(pid) for pid in children_of(self.process.pid)]
            for server in servers:
                signal.pidfd_send_signal(server, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            for server in servers:  # tells the end of its last thread: a zombie may have others that still hold files
                assert select.select([server], [], [], 10)[0], "the killed server does not end"
                os.close(server)

    def kill_server(self) -> int:
        """SIGKILL to the server alone, which the supervisor starts again. Returns: its process id."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def check_clean_end(self) -> None:
        """Stop it if it runs; unless it was killed it has ended with 0 and left no segment."""
        killed = self.process.returncode == -signal.SIGKILL
        try:
            if not killed:
                status = self.stop()
                assert status == 0, f"heapd serve ended with {status}:\n{self.log}"
                assert self.segments() == [], f"left after a clean stop:\n{self.log}"
        finally:
            if self.is_running:
                self.kill()
            for name in self.segments():
                (SEGMENTS / name).unlink(missing_ok=True)
