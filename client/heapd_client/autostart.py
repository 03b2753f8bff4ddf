"""Start a daemon for an endpoint where none answers, detached from this process, and wait until it answers.

Any number of processes may do so at once: one of them starts it, under a lock on its log file, the others wait until
it answers. (A starter that is killed frees that lock; what keeps daemons single is their own.) A daemon started so ends
by itself when it has been idle.
"""

from __future__ import annotations

import fcntl
import os
import sys
from time import monotonic, sleep
from typing import Final

import heapd
from heapd.errors import DaemonNotFoundError
from heapd.wire import Endpoint, check_directory, make_directory

from .control import is_answering, not_found

__all__ = ["start_daemon"]

IDLE_EXIT_S: Final = 10  # arbitrary: survives a script that is run again, is gone soon after the last
_POLL_S: Final = 0.01
_GRACE_S: Final = 2.0  # arbitrary: how long a daemon may take from its lock to its socket

# Through a shell, so that the daemon is nobody's child here: no zombie, and no process object to keep.
_SHELL: Final = 'umask 077; exec </dev/null 2>>"$0"; "$@" >&2 & echo $!'


def start_daemon(endpoint: Endpoint, timeout_s: float) -> None:
    """Have a daemon answer at `endpoint`, started here or by somebody else.

    Raises: SegmentError if the runtime directory cannot be used; DaemonNotFoundError if none can be started, or
            answers within `timeout_s` seconds, with the end of its log.
    """
    if os.path.isdir(endpoint.directory) and check_directory(endpoint.directory).uid != os.getuid():
        raise not_found(endpoint)  # a group's daemon, and somebody else's to start
    make_directory(endpoint.directory)
    deadline = monotonic() + timeout_s
    log = os.path.join(endpoint.directory, f"{endpoint.name}.log")
    starter = _open_log(endpoint, log)
    try:
        if _is_first(starter, endpoint, deadline) and not is_answering(endpoint.control_path):
            _wait_for(endpoint, _spawn(endpoint, log), log, deadline)
    finally:
        os.close(starter)


def _open_log(endpoint: Endpoint, log: str) -> int:
    """The log's descriptor. Raises: DaemonNotFoundError if it cannot be written."""
    try:
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _not_started(endpoint, f"its log {log} cannot be written: {error.strerror}") from None


def _not_started(endpoint: Endpoint, reason: str) -> DaemonNotFoundError:
    return DaemonNotFoundError(
        f"no daemon answers at {endpoint}, and none could be started: {reason}", endpoint=str(endpoint)
    )


def _is_first(starter: int, endpoint: Endpoint, deadline: float) -> bool:
    """True once this process alone may start the daemon, False if one answers.

    Raises: DaemonNotFoundError past the deadline.
    """
    while not is_answering(endpoint.control_path):
        try:
            fcntl.flock(starter, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() >= deadline:
                raise not_found(endpoint) from None
            sleep(_POLL_S)
        else:
            return True
    return False


def _wait_for(endpoint: Endpoint, pid: int, log: str, deadline: float) -> None:
    """Wait until the daemon answers; process `pid` was started as it."""
    gone_at: float | None = None
    while not is_answering(endpoint.control_path):
        now = monotonic()
        if gone_at is None and not _is_running(pid):
            gone_at = now
        # Ours may have ended because one started by hand has the lock, and that may not have bound its socket yet.
        if now >= deadline or (gone_at is not None and now > gone_at + _GRACE_S):
            raise DaemonNotFoundError(
                f"no daemon answers at {endpoint}, and the one started for it did not come up: {_tail(log)}",
                endpoint=str(endpoint),
            )
        sleep(_POLL_S)


def _spawn(endpoint: Endpoint, log: str) -> int:
    """Start the daemon; its process id. Raises: DaemonNotFoundError if no process can be."""
    import subprocess  # here: most processes start none

    command = [sys.executable, "-m", "heapd", "serve", "--name", endpoint.name]
    command += ["--runtime-dir", endpoint.directory, "--idle-exit", str(IDLE_EXIT_S)]
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", _SHELL, log, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            check=True,
        )
        return int(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:  # no process, or no descriptor, is left
        raise _not_started(endpoint, str(error)) from None


def _environment() -> dict[str, str]:
    """This process's environment, with the packages that it runs found first."""
    places = [os.path.dirname(os.path.dirname(os.path.abspath(file))) for file in (heapd.__file__, __file__)]
    known = os.environ.get("PYTHONPATH")
    paths = [*dict.fromkeys(places), *([known] if known else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _tail(log: str) -> str:
    """The last line of the log that says something."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else f"it said nothing in {log}"
