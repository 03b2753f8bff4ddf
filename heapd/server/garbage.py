"""What killed daemons and jobs left behind: found without touching it, removed when nobody wants it.

A thing is owned, and not even listed, while its process lives: an endpoint while its lock is held (by a server, or by
the supervisor that is about to start one), a segment while its daemon lives or its endpoint is held, a job's folder
while the job or its daemon lives.

What nobody owns may still be *wanted*: by clients that go on with a dead daemon's arena and wait for the next one,
because the next one would bring persistent heaps back, or because it would refuse what may hold some, and leave that
to somebody who knows better. Such an arena is listed and left alone, unless by force. Who has a segment mapped, of
whatever user, the kernel knows: it grants a lease on a file only while nobody has it open or mapped for writing, as
daemons and clients do. (A read lease: whoever only reads a header is not in its way, nor it in theirs.)
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heapd.errors import DaemonRunningError, HeapdError, SegmentError
from heapd.layout import WORD
from heapd.manager import count_persistent
from heapd.server.leftovers import clear_sockets, inspect_segment, mark_stopped
from heapd.server.lock import DaemonLock
from heapd.wire import (
    LEDGER_SUFFIX,
    SHUT_SUFFIX,
    Endpoint,
    abandoned_folders,
    check_directory,
    own_directory,
    runtime_directory,
)

__all__ = ["Leftover", "find_leftovers", "remove_leftover"]

SHM: Final = Path("/dev/shm")
_PREFIX: Final = "heapd-"
_FILE: Final = re.compile(rf"(.+)\.(?:control|work|lock)(?:{re.escape(SHUT_SUFFIX)})?")


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that nobody owns.

    Fields: kind ("arena", "segment", "endpoint", "folder"), path (a file, a folder, or an endpoint's text), size (bytes
    of memory, or of files), what (how it came to be), wanted (who would miss it, "" if nobody), pids (processes of this
    user that have it mapped), files (all that goes with it).
    """

    kind: str
    path: str
    size: int
    what: str
    wanted: str
    pids: tuple[int, ...]
    files: tuple[str, ...]


def find_leftovers(names: Collection[str] = (), directories: Collection[str] = ()) -> list[Leftover]:
    """What is left of this user's daemons and jobs.

    Args: names (of daemons and jobs, none: all), directories (where else endpoints may be than in the user's own and in
          the folder for temporary files).
    """
    held = _held_endpoints()
    found = list(_folders(held))
    inside = {leftover.path for leftover in found}
    found += _endpoints({*directories, *_known_directories()} - inside)
    found += _segments(held)
    return [leftover for leftover in found if not names or _name_of(leftover) in names]


def remove_leftover(leftover: Leftover, *, force: bool = False) -> bool:
    """Remove it, unless somebody owns or wants it (now, or by then). Returns: whether it is gone.

    Args:   force (do so although it is wanted: clients that wait for its daemon are told that it was stopped).
    Raises: OSError with the system's reason.
    """
    if leftover.kind == "endpoint":
        return _remove_endpoint(Endpoint.parse(leftover.path))
    if leftover.kind == "folder":
        _remove_folder(leftover.path)
        return True
    return _remove_segments(leftover, force)


def _name_of(leftover: Leftover) -> str:
    """The daemon's name, or the job's."""
    name = os.path.basename(leftover.path)
    if leftover.kind == "endpoint":
        return name
    name = name.removeprefix(_PREFIX).removesuffix(LEDGER_SUFFIX)
    if leftover.kind == "folder":
        return name.rpartition("-")[0]
    return re.sub(r"-[0-9a-f]{8}$", "", name)


# -- endpoints -----------------------------------------------------------------------------------------------------
def _known_directories() -> Iterator[str]:
    yield runtime_directory()
    yield own_directory(os.environ)
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        yield str(path)


def _endpoints(directories: Collection[str]) -> Iterator[Leftover]:
    for directory in sorted(directories):
        for endpoint in _endpoints_in(directory):
            if DaemonLock.is_held(endpoint) or _is_answering(endpoint):
                continue
            files = [path for path in _files_of(endpoint) if os.path.lexists(path)]
            if files:
                what = "sockets and lock file of a daemon that was killed"
                yield Leftover("endpoint", str(endpoint), 0, what, "", (), tuple(files))


def _endpoints_in(directory: str) -> list[Endpoint]:
    """Whose files lie in a directory of this user's."""
    try:
        if check_directory(directory).uid != os.getuid():
            return []
        matches = {match[1] for name in os.listdir(directory) if (match := _FILE.fullmatch(name))}
        return [Endpoint(directory, name) for name in sorted(matches)]
    except (HeapdError, OSError):
        return []


def _files_of(endpoint: Endpoint) -> list[str]:
    sockets = (endpoint.control_path, endpoint.work_path)
    return [*sockets, *(path + SHUT_SUFFIX for path in sockets), endpoint.lock_path]


def _is_answering(endpoint: Endpoint) -> bool:
    """A daemon lives whose lock file somebody took away."""
    for path in (endpoint.control_path, endpoint.control_path + SHUT_SUFFIX):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe, suppress(OSError):
            probe.connect(path)
            return True
    return False


def _held_endpoints() -> list[Endpoint]:
    """The endpoints whose lock some process of this user holds, wherever their directories are."""
    found = set()
    for pid in _own_processes():
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError, HeapdError):  # closed meanwhile; a lock file of somebody else's making
                    directory, name = os.path.split(os.readlink(entry.path))
                    if name.endswith(".lock"):
                        found.add(Endpoint(directory, name.removesuffix(".lock")))
    return [endpoint for endpoint in found if DaemonLock.is_held(endpoint)]


def _own_processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                    yield int(name)


def _remove_endpoint(endpoint: Endpoint) -> bool:
    try:
        lock = DaemonLock.acquire(endpoint, is_daemon=False)  # so that none begins here meanwhile
    except DaemonRunningError:
        return False
    except SegmentError:
        if os.path.lexists(endpoint.directory):
            raise
        return True
    try:
        if _is_answering(endpoint):
            return False
        clear_sockets(endpoint)
    finally:
        lock.release()
    return True


# -- folders of jobs -----------------------------------------------------------------------------------------------
def _folders(held: list[Endpoint]) -> Iterator[Leftover]:
    for path in abandoned_folders():
        if any(endpoint.directory == str(path) for endpoint in held):
            continue  # its daemon ends by itself, soon
        size = sum(map(_size_of_files, os.walk(path)))
        yield Leftover("folder", str(path), size, "folder of a job that was killed", "", (), (str(path),))


def _size_of_files(listing: tuple[str, list[str], list[str]]) -> int:
    """Bytes of the plain files that `os.walk` found in one directory, and that are still there."""
    size = 0
    for name in listing[2]:
        with suppress(FileNotFoundError):
            status = os.lstat(os.path.join(listing[0], name))
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def _remove_folder(path: str) -> None:
    while os.path.lexists(path):
        with suppress(FileNotFoundError):  # somebody else is at it, too
            shutil.rmtree(path)


# -- segments ------------------------------------------------------------------------------------------------------
def _segments(held: list[Endpoint]) -> Iterator[Leftover]:
    owned = {name for endpoint in held for name in (f"{_PREFIX}{endpoint.name}", endpoint.unique_segment)}
    names = {name for name in os.listdir(SHM) if name.startswith(_PREFIX)}
    for name in sorted(names):
        arena = name.removesuffix(LEDGER_SUFFIX)
        remains = inspect_segment(name)
        if remains is None or remains.is_foreign or remains.is_alive or arena in owned:
            continue
        if arena != name and not remains.is_arena:
            if arena not in names:
                yield _leftover("segment", (name,), "ledger without an arena")
            continue
        ledger = f"{name}{LEDGER_SUFFIX}"
        parts = (name, ledger) if ledger in names else (name,)
        if not remains.useless:
            made = (
                f"arena of the daemon of process {remains.pid}, which died" if remains.pid else "arena without a daemon"
            )
            yield _leftover("arena", parts, made, _outlook(name))
        elif remains.is_arena or _is_blank(name):
            yield _leftover("segment", parts, f"segment that {remains.useless}")


def _leftover(kind: str, parts: tuple[str, ...], what: str, outlook: str = "") -> Leftover:
    """Args: outlook (why it is wanted although nobody has it mapped, "" if it is not)."""
    paths = [str(SHM / name) for name in parts]
    wanted, pids = outlook, tuple[int, ...]()
    if any(_is_in_use(path) for path in paths):
        pids = _users_of(paths)
        who = (
            f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, pids))}"
            if pids
            else "a process of another user or container"
        )
        wanted = f"{who} {'have' if len(pids) > 1 else 'has'} it mapped"
    size = 0
    for path in paths:
        with suppress(FileNotFoundError):
            size += os.stat(path).st_blocks * 512
    return Leftover(kind, paths[0], size, what, wanted, pids, tuple(paths))


def _outlook(arena: str) -> str:
    """What the next start of its daemon would do with an arena, if that is a reason to keep it."""
    try:
        count = count_persistent(arena, arena + LEDGER_SUFFIX)
    except SegmentError as error:
        return f"it may hold something, and no start of this heapd can go on with it: {error}"
    return f"the next start of the daemon brings its persistent heaps back ({count})" if count else ""


def _is_blank(name: str) -> bool:
    """Begun by a daemon that was killed at once: nothing, or zeros, where a header would be. Else it is not ours."""
    with suppress(OSError), open(SHM / name, "rb") as file:
        return not any(file.read(WORD))
    return False


@contextmanager
def _without_writers(path: str) -> Iterator[bool]:
    """Whether nobody has the file open or mapped for writing; nobody can begin to while inside.

    Raises: OSError if it is gone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # Somebody who opens the file for writing waits for us, and we are told by a signal: one that does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)  # and the lease with it


def _is_in_use(path: str) -> bool:
    with suppress(FileNotFoundError), _without_writers(path) as is_free:
        return not is_free
    return False


def _users_of(paths: list[str]) -> tuple[int, ...]:
    """This user's processes that have one of the files mapped."""
    wanted = [path.encode() for path in paths]
    found = []
    for pid in _own_processes():
        with suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
            if any(line.rstrip().endswith(path) for line in file for path in wanted):
                found.append(pid)
    return tuple(sorted(found))


def _remove_segments(leftover: Leftover, force: bool) -> bool:
    names = [os.path.basename(path) for path in leftover.files]
    now = inspect_segment(names[0])
    if now is not None and now.is_alive:
        return False
    if leftover.wanted:
        if not force:
            return False
        mark_stopped(names[0])
    for path in reversed(leftover.files):  # the ledger first: an arena without one is of no use to anybody
        with suppress(FileNotFoundError), _without_writers(path) as is_free:
            if not is_free and not force:
                return False
            os.unlink(path)
    return True
