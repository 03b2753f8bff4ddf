"""What an earlier daemon left behind when it was killed: its socket files and its arena.

All of it is done under the endpoint's lock, so that the earlier daemon is known to be dead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import struct
from dataclasses import dataclass

from heapd.arena import remove_segment
from heapd.errors import SegmentError
from heapd.layout import H_MAGIC, H_PID, H_START_TIME, MAGIC, WORD
from heapd.server.credentials import start_time_of
from heapd.server.gate import SHUT_SUFFIX
from heapd.wire import Endpoint

__all__ = ["SegmentOwner", "claim_segment", "clear_sockets", "segment_owner"]

log = logging.getLogger("heapd.server")

_HEADER_WORDS = max(H_MAGIC, H_PID, H_START_TIME) + 1


@dataclass(frozen=True, slots=True)
class SegmentOwner:
    """Whose a segment is.

    Fields: is_foreign (of another user, or no plain file), pid (of the daemon that made it, 0 if it did not get so
    far), is_alive (that very process still runs).
    """

    is_foreign: bool
    pid: int = 0
    is_alive: bool = False


def claim_segment(endpoint: Endpoint) -> str:
    """The name of the segment to make, free to be made: what an earlier daemon left under it is removed.

    The caller holds the endpoint's lock. This is the one place that decides what becomes of an earlier arena.
    Raises: SegmentError if the segment belongs to a daemon that lives (one in another directory, or whose lock file
            somebody took away), or to another user.
    """
    for name in dict.fromkeys((endpoint.segment, endpoint.unique_segment)):
        owner = segment_owner(name)
        if owner is None:
            return name
        if owner.is_foreign:
            continue  # the name is taken in the flat space of /dev/shm; the next has the directory's hash
        if owner.is_alive:
            raise SegmentError(
                f"the shared memory segment {name} is in use by the daemon of process {owner.pid}", pid=owner.pid
            )
        log.warning("removing the arena %s, which the daemon of process %d left behind", name, owner.pid)
        remove_segment(name)
        return name
    raise SegmentError(f"the shared memory segment {endpoint.unique_segment} belongs to another user")


def segment_owner(name: str) -> SegmentOwner | None:
    """Whose segment `name` is, None if there is none. Reads its header without mapping it."""
    try:
        descriptor = os.open(f"/dev/shm/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:  # a symlink, or not ours to read
        return SegmentOwner(is_foreign=True)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            return SegmentOwner(is_foreign=True)
        header = os.pread(descriptor, _HEADER_WORDS * WORD, 0)
    finally:
        os.close(descriptor)
    words = struct.unpack(f"<{len(header) // WORD}Q", header[: len(header) // WORD * WORD])
    if len(words) < _HEADER_WORDS or words[H_MAGIC] != MAGIC:
        return SegmentOwner(is_foreign=False)
    pid = words[H_PID]
    return SegmentOwner(False, pid, bool(pid) and start_time_of(pid) == words[H_START_TIME])


def clear_sockets(endpoint: Endpoint) -> None:
    """Remove the socket files of a daemon that was killed."""
    for path in (endpoint.control_path, endpoint.work_path):
        for leftover in (path, path + SHUT_SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)
