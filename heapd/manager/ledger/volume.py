"""The ledger's segment: a header and two logs, in which whole frames are found again after a kill at any instant.

    page 0            header, words L_*
    area 0, area 1    a log each; L_ACTIVE says which one counts, the other is empty or being written

A log is frames one after another. A frame is a word, its payload, and zeros up to the next 8 bytes; the word holds the
payload's length (low 32 bits) and CRC-32 (high), and is stored last, by one aligned store: a frame is there or not.
Where no frame follows, the word is 0: an area is zeros (a hole) before its log is begun.

Memory is committed before it is written, as in the arena, and some ahead, so that a request that was let in can be
written down whatever /dev/shm says by then.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator, Iterator
from contextlib import suppress
from mmap import MADV_REMOVE
from pathlib import Path
from typing import Final, NamedTuple
from uuid import UUID
from zlib import crc32

from heapd.arena import SHM_DIRECTORY, Segment
from heapd.errors import SegmentError
from heapd.layout import LAYOUT_VERSION, WORD
from heapd.units import GIB, MIB, PAGE_SIZE, align_up

__all__ = ["LedgerHeader", "Log", "Volume", "read_ledger_header", "stop_ledger"]

LEDGER_VERSION: Final = 2
_MAGIC: Final = int.from_bytes(b"heapdlog", "little")

L_MAGIC: Final = 0
L_VERSION: Final = 1  # LEDGER_VERSION << 32 | LAYOUT_VERSION
L_INSTANCE: Final = 2  # two words: the arena's
L_BOOT: Final = 4  # two words: the kernel's boot id; process start times mean something within one boot
L_AREA: Final = 6  # bytes of each area
L_PAGE_COUNT: Final = 7  # pages of the arena
L_COMMIT_LIMIT: Final = 8  # bytes that the arena may commit
L_INCARNATION: Final = 9  # processes that have served the arena
L_ACTIVE: Final = 10  # 0 or 1: the log that counts
L_APPLIED: Final = 11  # number of the last record that was carried out
L_PID: Final = 12  # who serves the arena, as its header says it to clients; 0 before
L_START_TIME: Final = 13
L_INODE: Final = 14  # of the arena's file: what the kernel says, and no client can write
L_STOPPED: Final = 15  # 1 once it is to go, arena and all

_AHEAD: Final = 2 * MIB  # arbitrary: several times the largest record, a batch of 4,096 blocks with its answer
_STEP: Final = 1 * MIB
_WIPE_SLICE: Final = 8 * MIB  # measured: 2 ms
_AREA_SLICE: Final = 1 * GIB  # at the start nobody waits, and holes cost nothing
_LOW_HALF: Final = (1 << 32) - 1
_HEADER_WORDS: Final = L_STOPPED + 1


class Log:
    """One area. Fields: end (bytes used), is_short (the memory ahead of it is not there)."""

    def __init__(self, segment: Segment, base: int, size: int) -> None:
        self._segment = segment
        self._buffer = segment.buffer
        self._words = segment.words
        self._base = base
        self._size = size
        self._committed = 0  # bytes
        self.end = 0
        self.is_short = False

    def append(self, payload: bytes) -> None:
        """Add a frame of at least 1 byte. Raises: SegmentError if there is no memory for it; nothing has changed."""
        size = len(payload)
        if self.end + size + 2 * WORD + _AHEAD > self._committed:
            self.make_room(size + 2 * WORD)
        at = self._base + self.end
        self._buffer[at + WORD : at + WORD + size] = payload
        self._words[at // WORD] = crc32(payload) << 32 | size
        self.end += WORD + align_up(size, WORD)

    def make_room(self, size: int = 0) -> None:
        """Commit `size` bytes and _AHEAD more. Raises: SegmentError if not even the first is possible."""
        wanted = self._wanted(size)
        try:
            while self._committed < wanted:
                os.posix_fallocate(self._segment.fd, self._base + self._committed, _STEP)
                self._committed += _STEP
        except OSError:
            pass
        self.is_short = self._committed < self.end + size + _AHEAD
        if self._committed < self.end + size:
            raise SegmentError(f"no memory is left for the ledger {self._segment.name}, of {self.end} bytes")

    def _wanted(self, size: int = 0) -> int:
        """Bytes that are to be committed before `size` more are written."""
        return min(align_up(self.end + size + _AHEAD, _STEP), self._size)

    @property
    def room(self) -> int:
        """Bytes committed and not written."""
        return self._committed - self.end

    @property
    def lacking(self) -> int:
        """Bytes that are to be committed ahead and are not; whole steps."""
        return max(0, self._wanted() - self._committed)

    def frames(self) -> Iterator[bytes]:
        """The payloads of all whole frames. `end` is after the last of them, once they were all read.

        Raises: SegmentError if a frame is damaged: that no kill can do.
        """
        self.end = 0
        written = self._written()
        while self.end < written:
            at = self._base + self.end
            word = self._words[at // WORD]
            size = word & _LOW_HALF
            if not word:
                return
            payload = bytes(self._buffer[at + WORD : at + WORD + size]) if self.end + size < written else b""
            if len(payload) != size or crc32(payload) != word >> 32:
                raise SegmentError(f"the ledger {self._segment.name} is damaged {self.end} bytes into its log")
            yield payload
            self.end += WORD + align_up(size, WORD)

    def _written(self) -> int:
        """Bytes up to the first page that was never written: to read beyond, by a damaged length, would commit it."""
        return min(os.lseek(self._segment.fd, self._base, os.SEEK_HOLE) - self._base, self._size)

    def trim(self) -> None:
        """Make what follows the last frame zeros: a kill may have left the beginning of another."""
        at = self._base + self.end
        page = align_up(at, PAGE_SIZE)
        self._buffer[at:page] = bytes(page - at)
        self._committed = page - self._base
        for start in range(page, self._base + self._size, _AREA_SLICE):
            self._remove(start, min(_AREA_SLICE, self._base + self._size - start))
        # Whole steps again: committing twice is harmless.
        self._committed = self._committed // _STEP * _STEP
        self.make_room()

    def wipe(self) -> Generator[None, None, None]:
        """Make it empty, in slices."""
        for start in range(0, align_up(max(self._committed, self.end), _STEP), _WIPE_SLICE):
            self._remove(self._base + start, min(_WIPE_SLICE, self._size - start))
            yield
        self.end = self._committed = 0

    def wipe_all(self) -> None:
        """As wipe, of an area of which nothing is known."""
        for start in range(0, self._size, _AREA_SLICE):
            self._remove(self._base + start, min(_AREA_SLICE, self._size - start))
        self.end = self._committed = 0

    def _remove(self, start: int, size: int) -> None:
        self._segment.mapping.madvise(MADV_REMOVE, start, size)


class Volume:
    """Header and logs. Fields: segment, instance (16 bytes: the arena's), page_count, commit_limit, inode, logs."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._words = words = segment.words
        self.instance = words[L_INSTANCE].to_bytes(8, "little") + words[L_INSTANCE + 1].to_bytes(8, "little")
        self.page_count: int = words[L_PAGE_COUNT]
        self.commit_limit: int = words[L_COMMIT_LIMIT]
        self.inode: int = words[L_INODE]
        area = words[L_AREA]
        self.logs = Log(segment, PAGE_SIZE, area), Log(segment, PAGE_SIZE + area, area)

    @classmethod
    def create(cls, name: str, *, instance: bytes, page_count: int, commit_limit: int, inode: int) -> Volume:
        """Make the segment of an arena's ledger. It counts once `seal` was called.

        Raises: SegmentError; nothing is left behind.
        """
        # One byte of a snapshot for 64 of the arena is ample: it costs two bytes or so a page that slabs lie on.
        area = align_up(GIB + page_count * PAGE_SIZE // 64, _STEP)
        segment = Segment.create(name, PAGE_SIZE + 2 * area)
        try:
            os.posix_fallocate(segment.fd, 0, PAGE_SIZE)
        except OSError as error:
            segment.unlink()
            segment.close()
            raise SegmentError(f"no memory is left for the ledger {name}") from error
        words = segment.words
        words[L_VERSION] = LEDGER_VERSION << 32 | LAYOUT_VERSION
        words[L_INSTANCE] = int.from_bytes(instance[:8], "little")
        words[L_INSTANCE + 1] = int.from_bytes(instance[8:], "little")
        words[L_BOOT], words[L_BOOT + 1] = _boot_id()
        words[L_AREA] = area
        words[L_PAGE_COUNT] = page_count
        words[L_COMMIT_LIMIT] = commit_limit
        words[L_INCARNATION] = 1
        words[L_INODE] = inode
        return cls(segment)

    def seal(self) -> None:
        """The first records are written: from now on the ledger counts."""
        self._words[L_MAGIC] = _MAGIC

    @classmethod
    def open(cls, name: str, *, is_to_write: bool = True) -> Volume:
        """Attach to what an earlier process left.

        Args:   is_to_write (False: to look only).
        Raises: SegmentError, saying why it cannot be gone on with: there is none, it was never finished, it is of
                another version, of an earlier boot, or damaged.
        """
        segment = Segment.attach(name, is_to_write=is_to_write)
        try:
            cls._check(segment)
        except SegmentError:
            segment.close()
            raise
        return cls(segment)

    @staticmethod
    def _check(segment: Segment) -> None:
        words, what = segment.words, f"the ledger {segment.name}"
        if segment.size < PAGE_SIZE or not segment.allocated_bytes or not words[L_MAGIC]:
            raise SegmentError(f"{what} is incomplete: the daemon that was making it did not finish")
        if words[L_MAGIC] != _MAGIC:
            raise SegmentError(f"{what} is damaged: its first word is {words[L_MAGIC]:#x}")
        if words[L_VERSION] != LEDGER_VERSION << 32 | LAYOUT_VERSION:
            raise SegmentError(f"{what} is of another version of heapd")
        if (words[L_BOOT], words[L_BOOT + 1]) != _boot_id():
            raise SegmentError(f"{what} is of an earlier boot of this machine")
        if segment.size < PAGE_SIZE + 2 * words[L_AREA] or words[L_ACTIVE] > 1:
            raise SegmentError(f"{what} is damaged: its size is {segment.size} bytes")

    @property
    def active(self) -> Log:
        return self.logs[self._words[L_ACTIVE]]

    @property
    def spare(self) -> Log:
        return self.logs[1 - self._words[L_ACTIVE]]

    def switch(self) -> None:
        """From now on the other log counts."""
        self._words[L_ACTIVE] = 1 - self._words[L_ACTIVE]

    @property
    def applied(self) -> int:
        return int(self._words[L_APPLIED])

    @applied.setter
    def applied(self, sequence: int) -> None:
        self._words[L_APPLIED] = sequence

    @property
    def incarnation(self) -> int:
        return int(self._words[L_INCARNATION])

    def count_incarnation(self) -> int:
        """Another process serves the arena: its number."""
        self._words[L_INCARNATION] += 1
        return self.incarnation

    def name_server(self, pid: int, start_time: int) -> None:
        """Say who serves the arena from now on."""
        self._words[L_PID] = 0  # a kill in between must not leave one's id with the other's time
        self._words[L_START_TIME] = start_time
        self._words[L_PID] = pid

    def stop(self) -> None:
        """From now on nobody is to go on with the arena."""
        self._words[L_STOPPED] = 1

    def remove(self) -> None:
        """Unlink and unmap it."""
        self.segment.unlink()
        self.segment.close()


class LedgerHeader(NamedTuple):
    """What the first page of a ledger says that counts.

    Fields: is_intact (False: its seal is damaged, and the rest means nothing), layout_version, page_count, pid (of who
    serves the arena or did, 0: nobody has), start_time, is_stopped.
    """

    is_intact: bool
    layout_version: int
    page_count: int
    pid: int
    start_time: int
    is_stopped: bool


def read_ledger_header(name: str) -> LedgerHeader | None:
    """The header of this user's ledger of that name; None if there is none that counts. Maps nothing.

    A seal that was damaged since counts: what was recorded under it is not to be taken for nothing.
    """
    try:
        descriptor = os.open(SHM_DIRECTORY / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return None
        page = os.pread(descriptor, _HEADER_WORDS * WORD, 0)
    finally:
        os.close(descriptor)
    words = struct.unpack(f"<{_HEADER_WORDS}Q", page.ljust(_HEADER_WORDS * WORD, b"\0"))
    if not words[L_MAGIC]:
        return None
    return LedgerHeader(
        is_intact=words[L_MAGIC] == _MAGIC,
        layout_version=words[L_VERSION] & _LOW_HALF,
        page_count=words[L_PAGE_COUNT],
        pid=words[L_PID],
        start_time=words[L_START_TIME],
        is_stopped=words[L_STOPPED] != 0,
    )


def stop_ledger(name: str) -> None:
    """As `Volume.stop`, for a ledger that nobody has open, if it is there."""
    with suppress(OSError):
        descriptor = os.open(SHM_DIRECTORY / name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, (1).to_bytes(WORD, "little"), L_STOPPED * WORD)
        finally:
            os.close(descriptor)


def _boot_id() -> tuple[int, int]:
    """The kernel's id of this boot, as two words."""
    number = UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).int
    return number >> 64, number & (1 << 64) - 1
