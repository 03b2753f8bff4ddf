"""Who may reach a daemon: its user alone, or a group that it was opened to on purpose.

                    alone    a group
    directory       0700     0750      the group may enter it, but neither put anything in nor take anything out
    sockets         0600     0660
    arena           0600     0660
    lock            0600     0640      says who serves, so that clients know whether to wait for a restart
    ledger          0600     0600      the daemon's own; no client has business there

The directory says which: a client trusts a daemon of another user only if that user's directory is open to a group of
the client's, and nobody else can have put the socket there.
"""

from __future__ import annotations

import os
import stat
from typing import NamedTuple

from heapd.errors import SegmentError
from heapd.wire.endpoint import own_directory

__all__ = ["Access", "check_directory", "make_directory"]


class Access(NamedTuple):
    """Who serves in a directory and whom. Fields: uid (its user), gid (the group it is open to, None: nobody)."""

    uid: int
    gid: int | None = None

    @property
    def file_mode(self) -> int:
        """Permissions of sockets and arena."""
        return 0o600 if self.gid is None else 0o660

    def give(self, path: str) -> None:
        """Set the owner group and the permissions of a socket or segment of ours. Raises: OSError."""
        if self.gid is not None:
            os.chown(path, -1, self.gid)  # first: with the group's permissions it would be open to another group
        os.chmod(path, self.file_mode)

    def admits(self, status: os.stat_result) -> bool:
        """Whether a file is this user's own, and open to nobody beside the group."""
        if status.st_uid != self.uid or status.st_mode & 0o007:
            return False
        return not status.st_mode & 0o070 or status.st_gid == self.gid


def make_directory(path: str, gid: int | None = None) -> Access:
    """Make a directory for this user, unless it is there; open it to a group; then check it.

    Raises: SegmentError as check_directory does; if it belongs to somebody else or is open to another group; if the
            directory that it would lie in is missing; or with the system's reason if it cannot be made.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise SegmentError(
            f"the runtime directory {path} cannot be made: {_first_missing(path)} does not exist; make that one, or "
            f"choose another (--runtime-dir, $HEAPD_RUNTIME_DIR)"
        ) from None
    except OSError as error:
        raise SegmentError(f"the runtime directory {path} cannot be made: {error.strerror}") from error
    found = check_directory(path)
    if found.uid != os.getuid():
        raise _of_another_user(path, found.uid)
    return found if gid is None else _open_directory(path, found, gid)


def _first_missing(path: str) -> str:
    """The first directory on the way to `path` that is not there."""
    missing = path
    while not os.path.isdir(parent := os.path.dirname(missing)):
        missing = parent
    return missing


def check_directory(path: str) -> Access:
    """See that nobody but its user can put anything in the directory, or take it away from inside.

    That user is the calling one, or one who opened the directory to a group that the caller is in.
    Raises: SegmentError if it is missing, a symlink, no directory, of another user, or open to others.
    """
    try:
        status = os.lstat(path)
    except OSError as error:
        raise SegmentError(f"the runtime directory {path} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise SegmentError(f"the runtime directory {path} is not a directory (a symlink is refused too)")
    is_open = status.st_mode & 0o070 == 0o050
    if status.st_uid != os.getuid() and not (is_open and _is_asked_for(path, status.st_gid)):
        raise _of_another_user(path, status.st_uid)
    if status.st_mode & 0o077 and (not is_open or status.st_mode & 0o007):
        raise SegmentError(
            f"the runtime directory {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"chmod 700 it, or choose another with --runtime-dir"
        )
    return Access(status.st_uid, status.st_gid if is_open else None)


def _is_asked_for(path: str, gid: int) -> bool:
    """Another user's directory was named on purpose, by somebody in its group.

    Never this user's own: in /tmp anybody in a group as wide as "users" could make that first.
    """
    return gid in (os.getegid(), *os.getgroups()) and path != own_directory(os.environ)


def _of_another_user(path: str, uid: int) -> SegmentError:
    return SegmentError(f"the runtime directory {path} belongs to user {uid}, not to {os.getuid()}")


def _open_directory(path: str, found: Access, gid: int) -> Access:
    if found.gid not in (None, gid):
        raise SegmentError(
            f"the runtime directory {path} is open to group {found.gid} already; chmod 700 it, or choose another with "
            f"--runtime-dir"
        )
    parent = path
    while (parent := os.path.dirname(parent)) != "/":
        if not os.stat(parent).st_mode & 0o011:
            raise SegmentError(
                f"no group can reach the runtime directory {path}: {parent} is its owner's alone; choose another place "
                f"with --runtime-dir, such as /run/NAME or /tmp/NAME"
            )
    try:
        os.chown(path, -1, gid)
        os.chmod(path, 0o750)
    except OSError as error:
        raise SegmentError(
            f"the runtime directory {path} cannot be opened to group {gid}: {error.strerror}; be a member of it"
        ) from error
    return Access(found.uid, gid)
