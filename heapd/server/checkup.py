"""Is this machine fit for a daemon? Each check looks at one thing, tries it where it can, and says what to do.

ok        as it should be
warning   a daemon works, and somebody may be surprised: less memory, fewer clients, no executable heaps
problem   a daemon does not start here, or may lose what it was given
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import platform
import pwd
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heapd.arena import Arena, measure_headroom
from heapd.errors import HeapdError
from heapd.layout import WORD
from heapd.mutex import Mutex, init
from heapd.server.config import DEFAULT_RESERVE
from heapd.server.credentials import SO_PEERPIDFD
from heapd.server.garbage import find_leftovers
from heapd.server.guards import MIN_DESCRIPTORS, room_for_clients
from heapd.units import GRANULE_PAGES, MIB, PAGE_SIZE, format_size
from heapd.wire import DEFAULT_NAME, Endpoint, check_directory, runtime_directory

__all__ = ["OK", "PROBLEM", "WARNING", "Finding", "check_up"]

OK: Final = "ok"
WARNING: Final = "warning"
PROBLEM: Final = "problem"

_SMALL_SHM: Final = 64 * MIB  # what containers give by default
_SLOW_CLOCK_NS: Final = 1_000  # arbitrary; a request reads the clock a few times
_EXTRAS: Final = {"numpy": "numpy", "matplotlib": "plot", "prometheus_client": "metrics"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found. Fields: check (its name), level (OK, WARNING, PROBLEM), found, advice ("" if it is ok)."""

    check: str
    level: str
    found: str
    advice: str = ""


def check_up() -> Iterator[Finding]:
    """Run every check, in an order in which one would look by hand."""
    for name, check in _CHECKS.items():
        try:
            yield from (Finding(name, *rest) for rest in check())
        except OSError as error:
            yield Finding(name, PROBLEM, f"cannot be looked at: {error}", "see that /proc and /sys are mounted")


_Findings = Iterator[tuple[str, str] | tuple[str, str, str]]


# -- what runs -----------------------------------------------------------------------------------------------------
def _python() -> _Findings:
    name, version = platform.python_implementation(), platform.python_version()
    if name != "CPython":
        yield PROBLEM, f"{name} {version}", "run heapd with CPython: it counts on its reference counts"
    else:
        yield OK, f"CPython {version}"


def _libraries() -> _Findings:
    import zmq

    if not zmq.has("ipc"):
        yield PROBLEM, f"libzmq {zmq.zmq_version()} has no ipc transport", "install pyzmq from its wheel on PyPI"
    else:
        yield OK, f"pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}"
    missing = {module: extra for module, extra in _EXTRAS.items() if importlib.util.find_spec(module) is None}
    if missing:
        names = ",".join(missing.values())
        yield OK, f"optional and not installed: {', '.join(missing)} (pip install 'heapd[{names}]' if wanted)"


def _kernel() -> _Findings:
    release = f"{platform.system()} {platform.release()}"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        yield PROBLEM, f"{release}: pidfd_open fails ({error.strerror})", "use Linux 5.3 or later, outside a sandbox"
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
        except OSError:
            yield (
                WARNING,
                f"{release}: pidfds, but no SO_PEERPIDFD",
                "nothing need be done; with Linux 6.5 or later a client is known even if its process id is used again",
            )
            return
    yield OK, f"{release}: pidfds, SO_PEERPIDFD"


def _processor() -> _Findings:
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        yield OK, f"{machine}: stores are seen in order; {os.cpu_count()} processors"
    else:
        yield WARNING, f"{machine}: heapd was tested on x86-64 only, and relies on its order of stores", "use x86-64"


def _mutex() -> _Findings:
    """A thread takes a robust mutex and ends; the kernel must give it to us and say so, as it does for processes."""
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        storage = ctypes.c_char.from_buffer(memory)
        try:
            pointer = ctypes.addressof(storage)
            init(pointer)
            mutex = Mutex(pointer)
            holder = threading.Thread(target=mutex.acquire)
            holder.start()
            holder.join()
            recovered = mutex.acquire(5.0)
            mutex.release()
        except HeapdError as error:
            yield PROBLEM, f"the C library's mutexes do not work: {error}", "use Linux with glibc 2.30 or later"
            return
        finally:
            del storage
    if recovered:
        yield OK, f"{' '.join(platform.libc_ver())}: a lock whose holder died was recovered"
    else:
        yield PROBLEM, "a lock whose holder died was not reported", "use Linux with glibc 2.30 or later"


def _clock() -> _Findings:
    count = 1000
    started = time.perf_counter_ns()
    for _ in range(count):
        time.monotonic_ns()
    cost = (time.perf_counter_ns() - started) // count
    source = _read("/sys/devices/system/clocksource/clocksource0/current_clocksource") or "unknown"
    if cost > _SLOW_CLOCK_NS:
        yield WARNING, f"reading the clock ({source}) takes {cost} ns", "boot with a faster clock source, such as tsc"
    else:
        yield OK, f"reading the clock ({source}) takes {cost} ns"
    if time.time() < 1_700_000_000:  # November 2023, before heapd was written
        yield WARNING, f"it is {time.strftime('%Y-%m-%d')}", "set the clock: logs and metrics carry its time"


# -- memory --------------------------------------------------------------------------------------------------------
def _shared_memory() -> _Findings:
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        yield PROBLEM, f"/dev/shm: {error.strerror}", "mount a tmpfs there: mount -t tmpfs tmpfs /dev/shm"
        return
    size, left = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"/dev/shm is {format_size(size)}, {format_size(left)} free"
    advice = "enlarge it: docker run --shm-size=4g, or mount -o remount,size=4g /dev/shm"
    if left < 16 * MIB:
        yield PROBLEM, found, f"{advice}; heapd gc removes what killed daemons left"
    elif size <= _SMALL_SHM:
        yield WARNING, f"{found}: little, as in a container", advice
    else:
        yield OK, found
    if _file_system_of("/dev/shm") != "tmpfs":
        yield WARNING, f"/dev/shm is a {_file_system_of('/dev/shm')}, not a tmpfs", "mount a tmpfs there"
    if status.f_flag & os.ST_NOEXEC:
        yield WARNING, "/dev/shm is mounted noexec", "for executable heaps only: mount -o remount,exec /dev/shm"


def _commit() -> _Findings:
    """Reserve address space, commit, write, decommit: what a daemon does all day."""
    try:
        arena = Arena.create(f"heapd-doctor-{os.getpid()}", reserve=DEFAULT_RESERVE)
        try:
            first = arena.reserve(GRANULE_PAGES, 0)
            arena.commit(first, GRANULE_PAGES)
            arena.words[first * PAGE_SIZE // WORD] = 1
            arena.release(first, GRANULE_PAGES)
            arena.settle_all()
        finally:
            arena.stop()
    except HeapdError as error:
        yield PROBLEM, f"an arena cannot be made: {error}", "see shared memory, memory and limits"
    else:
        yield OK, f"{format_size(DEFAULT_RESERVE)} can be reserved, committed in part and decommitted"


def _headroom() -> _Findings:
    room = measure_headroom()
    bound = {"shm": "/dev/shm", "cgroup": "the cgroup's memory limit", "memory": "the machine's free memory"}
    found = f"{format_size(room.size)} can be committed now; the tightest bound is {bound[room.source]}"
    if room.size < 64 * MIB:
        advice = {
            "shm": "enlarge /dev/shm",
            "cgroup": "raise the memory limit (docker run --memory=..., MemoryMax= in systemd)",
            "memory": "end other programs, or add memory",
        }
        yield PROBLEM if room.size < 16 * MIB else WARNING, found, advice[room.source]
    else:
        yield OK, found


# -- limits --------------------------------------------------------------------------------------------------------
def _descriptors() -> _Findings:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = (
        f"descriptors: {soft:,}, which a daemon raises to {hard:,}: about {room_for_clients(hard):,} client processes"
    )
    advice = "raise the hard limit: LimitNOFILE= in systemd, nofile in /etc/security/limits.conf"
    if hard < MIN_DESCRIPTORS:
        yield PROBLEM, f"descriptors: at most {hard:,}, and a daemon needs {MIN_DESCRIPTORS}", advice
    elif hard < 4096:
        yield WARNING, found, advice
    else:
        yield OK, found


def _other_limits() -> _Findings:
    limits = (
        ("address space", resource.RLIMIT_AS, 2 * DEFAULT_RESERVE, "ulimit -v unlimited, or a smaller --reserve"),
        ("file size", resource.RLIMIT_FSIZE, DEFAULT_RESERVE, "ulimit -f unlimited, or a smaller --reserve"),
    )
    is_fine = True
    for name, number, wanted, advice in limits:
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY and soft < wanted:
            is_fine = False
            yield PROBLEM, f"{name} is limited to {format_size(soft)}", advice
    if is_fine:
        yield OK, "address space and file size: enough for an arena"


# -- places --------------------------------------------------------------------------------------------------------
def _directory() -> _Findings:
    path = runtime_directory()
    try:
        Endpoint(path, DEFAULT_NAME)
        if os.path.lexists(path):
            access = check_directory(path)
            whose = "this user's alone" if access.gid is None else f"open to group {access.gid}"
            yield OK, f"runtime directory {path}: {whose}"
        else:
            yield OK, f"runtime directory {path}: not there yet"
    except HeapdError as error:
        yield PROBLEM, str(error), "mend that, or name another in $HEAPD_RUNTIME_DIR"
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base is None:
        yield OK, "$XDG_RUNTIME_DIR is not set; a runtime directory that is not named is in /tmp then"
        return
    try:
        status = os.stat(base)
    except OSError as error:
        yield PROBLEM, f"$XDG_RUNTIME_DIR is {base}: {error.strerror}", "log in anew, or unset it"
        return
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        yield WARNING, f"$XDG_RUNTIME_DIR is {base}, which others may write to", "chmod 700 it, or unset it"


def _processes() -> _Findings:
    """Clients are watched through /proc; hidepid and foreign pid namespaces hide them."""
    hidden = not os.path.exists("/proc/1/stat")
    if hidden:
        yield (
            WARNING,
            "/proc hides other users' processes (hidepid)",
            "for daemons with --group only: mount -o remount,hidepid=0 /proc",
        )
    else:
        yield OK, "/proc shows all processes"


def _logout() -> _Findings:
    """systemd removes a user's shared memory at the last logout, unless the user lingers or is a system user."""
    uid = os.getuid()
    if uid < 1000 or not os.path.isdir("/run/systemd/users"):
        yield OK, "nobody removes this user's shared memory at logout"
        return
    name = pwd.getpwuid(uid).pw_name
    if os.path.exists(f"/var/lib/systemd/linger/{name}"):
        yield OK, f"user {name} lingers: shared memory survives a logout"
    elif "no" in _logind_setting("RemoveIPC"):
        yield OK, "logind leaves shared memory at logout (RemoveIPC=no)"
    else:
        yield (
            WARNING,
            "systemd removes this user's shared memory at the last logout, under a running daemon",
            f"loginctl enable-linger {name}, or RemoveIPC=no in /etc/systemd/logind.conf",
        )


def _logind_setting(name: str) -> list[str]:
    """Values that logind's configuration gives to `name`, the last one in force."""
    files = [Path("/etc/systemd/logind.conf"), *sorted(Path("/etc/systemd/logind.conf.d").glob("*.conf"))]
    lines = [line.strip() for file in files for line in (_read(str(file)) or "").splitlines()]
    return [line.partition("=")[2].strip().lower() for line in lines if line.partition("=")[0].strip() == name][-1:]


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def _file_system_of(path: str) -> str:
    """The type of the file system mounted at `path`, the last one mounted there."""
    lines = [line.split() for line in (_read("/proc/mounts") or "").splitlines()]
    return next((fields[2] for fields in reversed(lines) if fields[1] == path), "part of another file system")


def _leftovers() -> _Findings:
    found = find_leftovers()
    if found:
        size = format_size(sum(leftover.size for leftover in found))
        yield WARNING, f"killed daemons and jobs left {len(found)} things, {size}", "see them with heapd gc --dry-run"
    else:
        yield OK, "no killed daemon left anything"


_CHECKS: Final[dict[str, Callable[[], _Findings]]] = {
    "python": _python,
    "libraries": _libraries,
    "kernel": _kernel,
    "processor": _processor,
    "locks": _mutex,
    "clock": _clock,
    "shared memory": _shared_memory,
    "arena": _commit,
    "memory": _headroom,
    "descriptors": _descriptors,
    "limits": _other_limits,
    "directory": _directory,
    "processes": _processes,
    "logout": _logout,
    "leftovers": _leftovers,
}
