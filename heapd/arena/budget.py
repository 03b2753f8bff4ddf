"""How many bytes may be committed: the daemon's own cap, asked before every commit.

Why a cap of our own: under a memory cgroup fallocate does not fail, the OOM killer comes; and /dev/shm is often as
large as the machine's memory, so that the OOM killer comes before ENOSPC there, too. So a commit must fit in the
configured limit and in what the machine has left: /dev/shm, the cgroup, MemAvailable less a margin.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from heapd.errors import HeapFullError
from heapd.units import MIB

__all__ = ["SHM_ADVICE", "Budget", "Headroom", "default_commit_limit", "measure_headroom", "shm_left"]

_FRESH_NS = 100_000_000  # a reading of the machine is good for 100 ms ...
_SPEND = 64 * MIB  # ... and for this many bytes; both arbitrary: a reading costs 50 us
SHM_ADVICE: Final = (
    "free blocks, or enlarge /dev/shm (`docker run --shm-size=...`, `mount -o remount,size=... /dev/shm`)"
)
_ADVICE = {
    "commit": "free blocks, or start the daemon with a larger --commit-limit",
    "shm": SHM_ADVICE,
    "cgroup": "free blocks, or raise the memory limit of the container or cgroup (`docker run --memory=...`)",
    "memory": "free blocks, or end other programs: the machine itself is short of memory",
}


class Headroom(NamedTuple):
    """Bytes that may still be committed and where the tightest bound is: "shm", "cgroup" or "memory"."""

    size: int
    source: str


def shm_left(directory: str = "/dev/shm") -> int:
    """Bytes that /dev/shm has left."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _cgroup_left() -> int | None:
    """Bytes left below the tightest memory limit of this process's cgroups; None where there is no limit."""
    left = None
    for path, maximum, current in _cgroup_files():
        try:
            limit, used = (path / maximum).read_text().strip(), int((path / current).read_text())
        except (OSError, ValueError):
            continue
        if limit != "max" and int(limit) < 1 << 60:
            left = min(left, int(limit) - used) if left is not None else int(limit) - used
    return left


def _cgroup_files() -> list[tuple[Path, str, str]]:
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        path = root / name.lstrip("/")
        found += [(level, *files) for level in (path, *path.parents) if level.is_relative_to(root)]
    return found


def _memory_left() -> int | None:
    """MemAvailable less a margin of 1/32 of the memory, at least 64 MiB, so that others go on."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available, total = (int(fields[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return None
    return available - max(total // 32, 64 * MIB)


def measure_headroom() -> Headroom:
    """What the machine has left for shared memory now."""
    bounds = {"shm": shm_left(), "cgroup": _cgroup_left(), "memory": _memory_left()}
    size, source = min((size, source) for source, size in bounds.items() if size is not None)
    return Headroom(max(size, 0), source)


def default_commit_limit() -> int:
    """Bytes a daemon may commit when not told: what the machine leaves now, less a margin of 1/16.

    Not less than 1 MiB: where there is none, it is the machine that the error has to tell of, and not this limit.
    """
    size = measure_headroom().size
    return max(size - size // 16, MIB)


class Budget:
    """Grants commits against the limit and the machine.

    Fields: limit (bytes), committed (bytes granted and not given back), peak (largest `committed` so far).
    """

    def __init__(self, limit: int, *, measure: Callable[[], Headroom] = measure_headroom) -> None:
        self.limit = limit
        self.committed = 0
        self.peak = 0
        self._measure = measure
        self._allowance = 0  # bytes of the last reading that may be spent without a new one
        self._read_ns = 0

    def take(self, size: int) -> None:
        """Count `size` bytes as committed.

        Raises: HeapFullError, and nothing is counted, if the limit or the machine has no room for them.
        """
        if self.committed + size > self.limit:
            raise HeapFullError.of(
                "commit", requested=size, used=self.committed, limit=self.limit, advice=_ADVICE["commit"]
            )
        if size > self._allowance or time.monotonic_ns() - self._read_ns > _FRESH_NS:
            self._read(size)
        self._allowance -= size
        self.committed += size
        self.peak = max(self.peak, self.committed)

    def _read(self, size: int) -> None:
        room = self._measure()
        if size > room.size:
            raise self.refusal(size, room)
        self._allowance = min(room.size, max(size, _SPEND))
        self._read_ns = time.monotonic_ns()

    def refusal(self, size: int, room: Headroom | None = None) -> HeapFullError:
        """The error for a commit that the machine has no room for (measured, or told by ENOSPC)."""
        room = room or self._measure()
        return HeapFullError.of(
            "memory",
            requested=size,
            used=self.committed,
            limit=self.committed + room.size,
            advice=_ADVICE[room.source],
        )

    def give(self, size: int) -> None:
        """`size` bytes were decommitted, or could not be committed after all."""
        self.committed -= size
