"""What an earlier daemon left behind when it was killed: its socket files and its arena.

An arena is adopted, with its ledger, when it is whole, of this layout and of the size that is wanted. One that was
never finished, or whose daemon was just stopping, holds nothing that anybody was promised, and is removed. One that may
hold something but cannot be served, because it is of another layout or size, is neither used nor removed: the user is
told. What counts is what the ledger and the kernel say: the arena's header is for clients, who can write to it.

All of it is done under the endpoint's lock, so that the earlier daemon is known to be dead. Nothing here maps a
segment or waits for anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
from dataclasses import dataclass, replace
from typing import NamedTuple

from heapd.arena import remove_segment
from heapd.errors import SegmentError
from heapd.layout import (
    H_MAGIC,
    H_PID,
    H_START_TIME,
    H_STATE,
    H_VERSION,
    LAYOUT_VERSION,
    MAGIC,
    STOPPED,
    WORD,
)
from heapd.manager import LedgerHeader, read_ledger_header, stop_ledger
from heapd.server.credentials import start_time_of
from heapd.units import GRANULE_SIZE, PAGE_SHIFT, align_up, format_size
from heapd.wire import LEDGER_SUFFIX, SHUT_SUFFIX, Endpoint

__all__ = ["Claim", "Remains", "claim_segment", "clear_sockets", "discard", "inspect_segment", "mark_stopped"]

log = logging.getLogger("heapd.server")

_HEADER_WORDS = max(H_MAGIC, H_VERSION, H_STATE, H_PID, H_START_TIME) + 1
_SHM = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Remains:
    """A segment that is there; see the module.

    Fields: is_foreign (of another user, or no plain file), is_arena (its header or a ledger says so), pid (of the
    daemon that serves or served it, 0 if none has), is_alive (that very process still runs), useless (why nothing in
    it is worth keeping, "" if something may be), version (of its layout), size (bytes).
    """

    is_foreign: bool
    is_arena: bool = False
    pid: int = 0
    is_alive: bool = False
    useless: str = ""
    version: int = 0
    size: int = 0


class Claim(NamedTuple):
    """What a daemon is to serve: the names of arena and ledger, and whether they are there, to be adopted."""

    arena: str
    ledger: str
    is_there: bool

    @classmethod
    def of(cls, arena: str, *, is_there: bool) -> Claim:
        return cls(arena, arena + LEDGER_SUFFIX, is_there)


def claim_segment(endpoint: Endpoint, reserve: int | None = None) -> Claim:
    """What this daemon's segments are to be; what is useless under their names is removed.

    The caller holds the endpoint's lock. This is the one place that decides what becomes of an earlier arena.
    Args:   reserve (bytes that the arena is to have, None: any).
    Raises: SegmentError if the segment belongs to a daemon that lives (one in another directory, or whose lock file
            somebody took away), or to another user, or was left with another layout or size.
    """
    for name in dict.fromkeys((endpoint.segment, endpoint.unique_segment)):
        remains = inspect_segment(name)
        if remains is None:
            _remove_ledger(name)
            return Claim.of(name, is_there=False)
        if remains.is_foreign:
            continue  # the name is taken in the flat space of /dev/shm; the next has the directory's hash
        if remains.is_alive:
            raise SegmentError(
                f"the shared memory segment {name} is in use by the daemon of process {remains.pid}", pid=remains.pid
            )
        if remains.useless:
            log.warning("removing the shared memory segment %s, which %s", name, remains.useless)
            mark_stopped(name)
            _remove(name)
            return Claim.of(name, is_there=False)
        _check_fit(name, remains, reserve)
        return Claim.of(name, is_there=True)
    raise SegmentError(f"the shared memory segment {endpoint.unique_segment} belongs to another user")


def _remove(arena: str) -> None:
    """The arena first: a ledger without one is known to be useless."""
    remove_segment(arena)
    _remove_ledger(arena)


def _remove_ledger(arena: str) -> None:
    ledger = inspect_segment(arena + LEDGER_SUFFIX)
    if ledger is not None and not ledger.is_foreign:
        remove_segment(arena + LEDGER_SUFFIX)


def _check_fit(name: str, remains: Remains, reserve: int | None) -> None:
    left = f"the arena {name}, which the daemon of process {remains.pid} left behind,"
    if remains.version != LAYOUT_VERSION:
        raise SegmentError(
            f"{left} has layout version {remains.version}, and this heapd serves {LAYOUT_VERSION}: serve it with the "
            f"heapd that made it, or remove it with `heapd gc --force`",
            segment=name,
        )
    if reserve is not None and align_up(reserve, GRANULE_SIZE) != remains.size:
        raise SegmentError(
            f"{left} is of {format_size(remains.size)}, and {format_size(reserve)} were asked for: start without "
            f"--reserve to go on with it, or remove it with `heapd gc --force`",
            segment=name,
        )


def inspect_segment(name: str) -> Remains | None:
    """What the segment `name` is, None if there is none. Maps nothing."""
    try:
        descriptor = os.open(f"{_SHM}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:  # a symlink, or not ours to read
        return Remains(is_foreign=True)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            return Remains(is_foreign=True)
        header = os.pread(descriptor, _HEADER_WORDS * WORD, 0)
    finally:
        os.close(descriptor)
    ledger = read_ledger_header(name + LEDGER_SUFFIX)
    if ledger is not None and ledger.is_intact:
        return _by_ledger(ledger, status.st_size)
    if len(header) < _HEADER_WORDS * WORD:
        return Remains(False, useless="was never finished: it has no header", size=status.st_size)
    remains = _by_header(struct.unpack(f"<{_HEADER_WORDS}Q", header), status.st_size)
    return remains if ledger is None else replace(remains, is_arena=True, useless="", version=LAYOUT_VERSION)


def _by_ledger(ledger: LedgerHeader, size: int) -> Remains:
    """What an arena is whose ledger counts, whatever its header says."""
    useless = ""
    if ledger.is_stopped:
        useless = f"the daemon of process {ledger.pid} was about to remove"
    elif ledger.layout_version == LAYOUT_VERSION and ledger.page_count << PAGE_SHIFT != size:
        useless = f"is damaged: {size} bytes long, and its records are of {ledger.page_count << PAGE_SHIFT}"
    is_alive = _is_running(ledger.pid, ledger.start_time)
    return Remains(False, True, ledger.pid, is_alive, useless, ledger.layout_version, size)


def _by_header(words: tuple[int, ...], size: int) -> Remains:
    """What an arena is that has no ledger that counts: one of another layout may be whole all the same."""
    pid, version = words[H_PID], words[H_VERSION]
    useless = "" if version != LAYOUT_VERSION else "was never finished: it has no ledger"
    is_arena = words[H_MAGIC] == MAGIC
    if not is_arena:
        useless, pid = "was never finished: its header does not say so", 0
    elif words[H_STATE] == STOPPED:
        useless = f"the daemon of process {pid} was about to remove"
    return Remains(False, is_arena, pid, _is_running(pid, words[H_START_TIME]), useless, version, size)


def _is_running(pid: int, start_time: int) -> bool:
    return bool(pid) and start_time_of(pid) == start_time


def discard(endpoint: Endpoint) -> None:
    """Remove all that a daemon left which was to stop and died before it had done that; its clients are told."""
    clear_sockets(endpoint)
    for name in dict.fromkeys((endpoint.segment, endpoint.unique_segment)):
        remains = inspect_segment(name)
        if remains is not None and not remains.is_foreign and not remains.is_alive:
            mark_stopped(name)
            _remove(name)


def mark_stopped(name: str) -> None:
    """Say that an arena was stopped on purpose: in its ledger, so that no daemon goes on with it, and in its header,
    so that its clients do not wait for one."""
    stop_ledger(name + LEDGER_SUFFIX)
    with contextlib.suppress(OSError):  # nobody has it mapped, then
        descriptor = os.open(f"{_SHM}/{name}", os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, STOPPED.to_bytes(WORD, "little"), H_STATE * WORD)
        finally:
            os.close(descriptor)


def clear_sockets(endpoint: Endpoint) -> None:
    """Remove the socket files of a daemon that was killed. Raises: SegmentError if one cannot be removed."""
    for path in (endpoint.control_path, endpoint.work_path):
        for leftover in (path, path + SHUT_SUFFIX):
            try:
                os.unlink(leftover)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise SegmentError(
                    f"{leftover} is where a socket of the daemon goes, and cannot be removed: {error.strerror}; remove "
                    f"it, or choose another --name or --runtime-dir"
                ) from error
