"""The lock that keeps daemons single: a bind on a socket path succeeds even where somebody else listens."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Final

from heapd.errors import DaemonRunningError, SegmentError
from heapd.server.credentials import start_time_of
from heapd.wire import Endpoint

__all__ = ["DaemonLock"]

_PATIENCE_S: Final = 1.0  # arbitrary: a thousand times as long as those hold the lock who are no daemon
_POLL_S: Final = 0.005


class DaemonLock:
    """An flock on the endpoint's lock file, held for the life of the daemon; its death lets it go.

    A forked child holds it, too, for as long as it lives; the file is the parent's to remove, until the child says
    `take_over`.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path
        self._owner = os.getpid()

    @classmethod
    def acquire(cls, endpoint: Endpoint, gid: int | None = None, *, is_daemon: bool = True) -> DaemonLock:
        """Take the lock and write this process's id and start time into the file.

        Waits a moment for a holder that is no daemon: one that only looks, or removes what a killed daemon left, or is
        that daemon, whose last thread is about to end.
        Args:   gid (the group that the daemon is open to: its members may read there whether to wait for a restart),
                is_daemon (False: for a moment, to keep daemons out; the file goes on naming whom it named).
        Raises: DaemonRunningError, naming the process that serves the endpoint; SegmentError if the file cannot be
                made.
        """
        path = endpoint.lock_path
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise SegmentError(
                    f"the lock file {path} cannot be opened: {error.strerror}; remove what is there, or choose another "
                    f"--name or --runtime-dir"
                ) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                daemon = _daemon_of(endpoint)
                if daemon is not None or time.monotonic() >= deadline:
                    raise _running(endpoint, daemon) from None
                time.sleep(_POLL_S)
                continue
            if _is_at(descriptor, path):
                break
            os.close(descriptor)  # its holder removed it while we waited for nothing: take the new one
        lock = cls(descriptor, path)
        if gid is not None:
            os.fchown(descriptor, -1, gid)
        os.fchmod(descriptor, 0o600 if gid is None else 0o640)
        if is_daemon:
            lock.take_over()
        return lock

    @staticmethod
    def is_held(endpoint: Endpoint) -> bool:
        """Whether some process holds the endpoint's lock. Makes no file, and keeps nothing."""
        try:
            descriptor = os.open(endpoint.lock_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def take_over(self) -> None:
        """The file names this process from now on, and is its to remove."""
        self._owner = os.getpid()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{self._owner} {start_time_of(self._owner)}\n".encode(), 0)

    def release(self) -> None:
        """Remove the file and let go, in this order: whoever opened it before sees that it is gone, and opens anew."""
        if self._descriptor >= 0:
            if self._owner == os.getpid() and _is_at(self._descriptor, self._path):
                os.unlink(self._path)
            os.close(self._descriptor)
            self._descriptor = -1


def _is_at(descriptor: int, path: str) -> bool:
    """Whether the open file is the one that `path` names."""
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _daemon_of(endpoint: Endpoint) -> int | None:
    """The process that the lock file names, None if it has died or nobody is named."""
    pid, start_time = endpoint.holder() or (0, 0)
    return pid if pid and start_time_of(pid) == start_time else None


def _running(endpoint: Endpoint, pid: int | None) -> DaemonRunningError:
    who = "another process" if pid is None else f"process {pid}"
    return DaemonRunningError(
        f"daemon {endpoint.name!r} is running already: {who} serves {endpoint}; stop it with "
        f"`heapd stop -e {endpoint}`, or choose another --name",
        pid=pid,
    )
