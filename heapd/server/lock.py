"""The lock that keeps daemons single: a bind on a socket path succeeds even where somebody else listens."""

from __future__ import annotations

import fcntl
import os

from heapd.errors import DaemonRunningError, SegmentError
from heapd.wire import Endpoint

__all__ = ["DaemonLock"]


class DaemonLock:
    """An flock on the endpoint's lock file, held for the life of the daemon; its death lets it go."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path

    @classmethod
    def acquire(cls, endpoint: Endpoint) -> DaemonLock:
        """Take the lock and write this process's id into the file.

        Raises: DaemonRunningError, naming the process that serves the endpoint; SegmentError if the file cannot be
                made.
        """
        path = endpoint.lock_path
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise SegmentError(f"the lock file {path} cannot be opened: {error.strerror}") from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                raise _running(endpoint, int(holder) if holder.isdigit() else None) from None
            if _is_at(descriptor, path):
                break
            os.close(descriptor)  # its holder removed it while we waited for nothing: take the new one
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor, path)

    def release(self) -> None:
        """Remove the file and let go, in this order: whoever opened it before sees that it is gone, and opens anew."""
        if self._descriptor >= 0:
            if _is_at(self._descriptor, self._path):
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


def _running(endpoint: Endpoint, pid: int | None) -> DaemonRunningError:
    who = "another process" if pid is None else f"process {pid}"
    return DaemonRunningError(
        f"daemon {endpoint.name!r} is running already: {who} serves {endpoint}; stop it with "
        f"`heapd stop -e {endpoint}`, or choose another --name",
        pid=pid,
    )
