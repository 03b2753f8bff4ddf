"""A daemon of one's own for the length of a job: started in a fresh folder, gone afterwards, nothing left.

It runs in a session of its own, so that Ctrl-C reaches the job, which stops it in its own time. Should the job be
killed before that, the daemon ends with it, by a pipe whose other end the job has; the folder is left to `heapd gc`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import heapd_client as hc
from heapd.errors import DaemonError
from heapd.wire import Endpoint, JobFolder
from heapd.workloads import WorkloadError

__all__ = ["private_daemon", "terminations_raise"]

_START_DEADLINE_S = 20.0
_STOP_DEADLINE_S = 20.0  # it gives back what it committed, 0.4 s a GiB
_SHM = Path("/dev/shm")


@contextmanager
def private_daemon(name: str, *arguments: str) -> Iterator[str]:
    """Run a daemon called `name` in a temporary folder, with more arguments to `heapd serve`. Yields: its endpoint.

    Raises: WorkloadError with what the daemon said if it does not start.
    """
    with JobFolder(name) as folder, _lifeline() as lifeline:
        endpoint = Endpoint(str(folder.path), name)
        log = folder.path / "log"
        with log.open("wb") as file:
            daemon = _start(endpoint, file.fileno(), lifeline, arguments)
        try:
            _wait_for(endpoint, daemon, log)
            yield str(endpoint)
        finally:
            _stop(daemon, endpoint)


@contextmanager
def _lifeline() -> Iterator[int]:
    """The end of a pipe to give to the daemon; it reads end of file once this process has ended."""
    ends = os.pipe()
    try:
        yield ends[0]
    finally:
        for end in ends:
            os.close(end)


def _start(endpoint: Endpoint, log: int, lifeline: int, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "heapd", "serve", "--endpoint", str(endpoint), "--until-eof", str(lifeline)]
    return subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        pass_fds=[lifeline],
    )


def _wait_for(endpoint: Endpoint, daemon: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the daemon answers."""
    deadline = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            raise WorkloadError(f"the daemon ended with exit code {daemon.returncode}: {_last_lines(log)}")
        try:
            hc.daemon_status(str(endpoint), timeout=1.0)
        except DaemonError:
            time.sleep(0.01)
        else:
            return
    raise WorkloadError(f"the daemon does not answer after {_START_DEADLINE_S:g} s: {_last_lines(log)}")


def _last_lines(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").split("\n")[-4:]).strip(" /") or "it said nothing"


def _stop(daemon: subprocess.Popen[bytes], endpoint: Endpoint) -> None:
    """Stop the daemon, at any point of its life, and see that its segments are gone; one that does not stop is killed.

    Raises: WorkloadError if it had to be killed.
    """
    daemon.terminate()
    try:
        daemon.wait(_STOP_DEADLINE_S)
    except BaseException as error:  # too slow, or the user is impatient: Ctrl-C again
        with suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGKILL)  # it, and what it has started
        daemon.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            text = f"the daemon did not stop within {_STOP_DEADLINE_S:g} s and was killed"
            raise WorkloadError(text) from None
        raise
    finally:
        for path in _SHM.glob(f"{endpoint.segment}*"):
            path.unlink(missing_ok=True)


@contextmanager
def terminations_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the job as Ctrl-C does, through every cleanup, with exit code 128 + the signal."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
