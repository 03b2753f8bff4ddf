"""What keeps one client, or a crowd, from bringing the daemon down through things that libzmq does not limit.

Descriptors: accept() at the limit aborts the process. Memory: a message of endless parts is buffered before anybody
sees it. Both guards only say when; the loop shuts or renews its gates.
"""

from __future__ import annotations

import os
import resource
from typing import Final

from heapd.errors import LimitError
from heapd.units import PAGE_SIZE

__all__ = ["MIN_DESCRIPTORS", "DescriptorGuard", "MemoryGuard", "raise_descriptor_limit", "room_for_clients"]

MIN_DESCRIPTORS: Final = 256  # arbitrary: thirty clients; with less, a crowd comes faster than gates are shut
_OWN: Final = 34  # of a daemon without clients: 26 measured, 31 with --metrics, and some that it was started with
_A_CLIENT: Final = 3  # two connections and a pidfd

_MARGIN: Final = 1024  # descriptors kept back: what libzmq's thread may accept during the loop's longest stall
_MIN_STEP: Final = 16  # connections between two counts, when close to the cap


def raise_descriptor_limit() -> int:
    """Raise the soft limit on descriptors to the hard one. Returns: the limit.

    Raises: LimitError if that is too low for a daemon.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < MIN_DESCRIPTORS:
        raise LimitError(
            f"a daemon needs {MIN_DESCRIPTORS} file descriptors at least, three a client and some of its own, and this "
            f"process may have {hard}: raise the hard limit (ulimit -n, LimitNOFILE= in systemd)",
            limit=hard,
        )
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def room_for_clients(limit: int) -> int:
    """About how many client processes fit into so many descriptors."""
    return max(0, _cap(limit) - _OWN) // _A_CLIENT


def _cap(limit: int) -> int:
    """Descriptors at which new clients are kept out."""
    return limit - min(limit // 2, _MARGIN)


class DescriptorGuard:
    """Says when to shut the gates and when to open them again.

    Fields: cap (descriptors at which to shut), reopen_below (at three quarters of it: lower would lock new clients
    out for good when the old ones alone take more). `limit` is the process's, above the cap by the margin, or by
    half of itself where that is less.
    """

    def __init__(self, limit: int) -> None:
        self.cap = _cap(limit)
        self.reopen_below = self.cap * 3 // 4
        self._counted = count_descriptors()
        self._since = 0

    def is_full(self, accepted: int) -> bool:
        """Whether to shut, now that `accepted` more connections came in. Counts only as often as it has to."""
        self._since += accepted
        if self._since < max(_MIN_STEP, (self.cap - self._counted) // 2) and self._counted + self._since < self.cap:
            return False
        self._count()
        return self._counted >= self.cap

    def has_room(self) -> bool:
        """Whether to open again."""
        self._count()
        return self._counted < self.reopen_below

    def _count(self) -> None:
        self._counted = count_descriptors()
        self._since = 0


class MemoryGuard:
    """Says when the process has grown by more than `growth` bytes of its own memory since it last said so."""

    def __init__(self, growth: int) -> None:
        self._growth = growth
        self._base = own_memory()

    def has_grown(self) -> bool:
        now = own_memory()
        if now - self._base > self._growth:
            self._base = now
            return True
        self._base = min(self._base, now)
        return False

    def rebase(self) -> None:
        """Count growth from here."""
        self._base = own_memory()


def count_descriptors() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd")) - 1  # less the one that lists


def own_memory() -> int:
    """Resident bytes of this process that are not shared: the arena's pages do not count."""
    with open("/proc/self/statm", "rb") as file:
        fields = file.read().split()
    return (int(fields[1]) - int(fields[2])) * PAGE_SIZE
