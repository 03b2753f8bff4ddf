"""Processes that do one job together: started, let go at once, watched, ended.

Each member has a pipe to the parent that carries words, counts and small results, never a job's data. A member that
fails says why and ends; one that dies is noticed by its sentinel. Members are spawned with SIGINT and SIGHUP blocked,
so that Ctrl-C and the end of the terminal reach the parent alone, which then ends them.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from heapd.errors import HeapdError
from heapd.workloads import WorkloadError

__all__ = ["Line", "Team", "interrupts_held"]

_START_DEADLINE_S = 60.0  # arbitrary: an interpreter starts in 0.1 s, hundreds of them on one core take a while
_STEP_S = 0.2
_END_DEADLINE_S = 5.0


class Line:
    """A member's end of its pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unsaid = 0

    def wait_go(self) -> None:
        """Say that this member is ready, and return when all are."""
        self._connection.send(("ready", None))
        self._receive()

    def progress(self, count: int) -> None:
        """Count work done; said to the parent now and then."""
        self._unsaid += count
        if self._unsaid >= 32:
            self._connection.send(("progress", self._unsaid))
            self._unsaid = 0

    def done(self, result: bytes = b"") -> None:
        """Hand in the result, and return when the parent has looked at what all members left."""
        self._connection.send(("progress", self._unsaid))
        self._connection.send(("done", result))
        self._receive()

    def _receive(self) -> None:
        try:
            self._connection.recv()
        except EOFError:
            raise SystemExit(1) from None  # the parent has gone; nobody is left to tell


def _member(connection: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        target(Line(connection), *arguments)
    except (HeapdError, WorkloadError, OSError) as error:
        _confess(connection, str(error) or type(error).__name__)
    except Exception as error:
        traceback.print_exc()
        _confess(connection, f"{type(error).__name__}: {error}")


def _confess(connection: Connection, text: str) -> None:
    with suppress(OSError):
        connection.send(("error", text))
    sys.exit(1)


class Team:
    """Members of one job. A context manager: on exit every member has ended.

    Raises, in all that waits: WorkloadError naming the member that failed or died.
    """

    def __init__(self) -> None:
        self.context = get_context("spawn")
        self._members: dict[Connection, BaseProcess] = {}
        self._waiting: set[Connection] = set()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.end(gently=kind is None)

    def start(self, name: str, target: Callable[..., None], *arguments: object) -> None:
        """Start a member that runs `target(line, *arguments)`; `target` is a module's function."""
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_member, args=(theirs, target, arguments), name=name, daemon=True)
        with interrupts_held():
            process.start()
        theirs.close()
        self._members[ours] = process

    def wait_ready(self) -> None:
        """Return when every member waits for go."""
        deadline = time.monotonic() + _START_DEADLINE_S
        for connection, (word, _) in self._messages(deadline):
            if word == "ready":
                self._waiting.discard(connection)

    def run(self, progress: Callable[[int], object]) -> tuple[float, dict[str, bytes]]:
        """Let all go. Returns: (seconds from go to the last result, results by member's name)."""
        results: dict[str, bytes] = {}
        started = time.perf_counter()
        for connection in self._members:
            connection.send("go")
        for connection, (word, value) in self._messages(None):
            if word == "progress":
                progress(value)
            elif word == "done":
                self._waiting.discard(connection)
                results[self._members[connection].name] = value
        return time.perf_counter() - started, results

    def _messages(self, deadline: float | None) -> Iterator[tuple[Connection, tuple[str, Any]]]:
        """What members say, until each has been discarded from `_waiting` by the caller."""
        self._waiting = set(self._members)
        while self._waiting:
            if deadline is not None and time.monotonic() > deadline:
                names = ", ".join(sorted(self._members[each].name for each in self._waiting))
                raise WorkloadError(f"not ready after {_START_DEADLINE_S:g} s: {names}")
            for ready in wait(self._waiting, _STEP_S):
                assert isinstance(ready, Connection)
                yield ready, self._receive(ready)

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        member = self._members[connection]
        try:
            word, value = connection.recv()
        except (EOFError, ConnectionResetError):
            member.join(_END_DEADLINE_S)
            raise WorkloadError(f"{member.name} died ({_fate(member.exitcode)})") from None
        if word == "error":
            raise WorkloadError(f"{member.name}: {value}")
        return word, value

    def end(self, *, gently: bool) -> None:
        """End every member: let them finish, or terminate them; kill what is left after some seconds."""
        for connection, member in self._members.items():
            with suppress(OSError):
                connection.send("leave")
            if not gently:
                member.terminate()
        deadline = time.monotonic() + _END_DEADLINE_S
        for connection, member in self._members.items():
            member.join(max(0.0, deadline - time.monotonic()))
            if member.is_alive():
                member.kill()
                member.join()
            connection.close()
            member.close()
        self._members.clear()


def _fate(exit_code: int | None) -> str:
    if exit_code is None:
        return "it hangs"
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Block SIGINT and SIGHUP: a process started meanwhile never sees them; the caller gets them afterwards.

    The resource tracker, which the first start of a process starts, is one of them: by itself it survives SIGINT, and
    SIGHUP would end it before those whose resources it tracks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # not before: the tracker's start would unblock it
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
