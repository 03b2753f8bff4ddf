"""The arena as a client sees it: the daemon's segment mapped into this process, and its tables read.

Attaches by plain open and mmap, so that Python's resource tracker never hears of the segment: a tracker unlinks, when
its process ends, what it was told of. The mapping is never unmapped by hand; every memoryview of it keeps it alive,
and the last reference takes it away, silently, also at interpreter exit.

Must never read a page that is not committed (the read would commit it), so look at pages through `page_word`.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import stat
from collections.abc import Iterator
from typing import Final, NamedTuple
from weakref import WeakSet

from heapd.errors import ExecuteError, SegmentError, VersionError
from heapd.layout import (
    C_HEAP_ID,
    C_LIVE,
    CHUNK_PAGES,
    CHUNK_SHIFT,
    H_CONTROLS_READY,
    H_HEAP_LIMIT,
    H_INCARNATION,
    H_INSTANCE,
    H_MAGIC,
    H_PAGE_COUNT,
    H_PID,
    H_START_TIME,
    H_STATE,
    H_VERSION,
    HEAP_INDEX_BITS,
    LAYOUT_VERSION,
    MAGIC,
    MAPPED,
    PAGE_COMMITTED,
    STOPPED,
    WORD,
    ArenaShape,
    PageInfo,
    page_word,
    split_page_word,
)
from heapd.units import PAGE_SHIFT, PAGE_SIZE, align_down, align_up, format_size
from heapd.wire import Access

__all__ = ["Mapping", "Server"]

_SHM_DIRECTORY: Final = "/dev/shm"
_READ_WRITE: Final = mmap.PROT_READ | mmap.PROT_WRITE
_MANY: Final = 32  # arbitrary: mappings of closed sessions that are left to the collector's own pace
_closed: Final[WeakSet[mmap.mmap]] = WeakSet()
_many = _MANY
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Server(NamedTuple):
    """A process that serves the arena. Fields: incarnation (of the arena, from 1), pid, start_time (clock ticks after
    boot)."""

    incarnation: int
    pid: int
    start_time: int


class Mapping:
    """One arena, mapped.

    Fields: name (of the segment), size (bytes), base (memoryview of bytes), words (the same as "Q"), shape (where the
    tables are), instance (16 bytes: the arena's identity), pointer (of the arena's first byte, in this process only).
    Locks:  none; any thread may read.
    """

    def __init__(self, name: str, size: int, instance: bytes, access: Access | None = None) -> None:
        """Map the daemon's segment.

        Args:   name, size (bytes) and instance (16 bytes) as hello told them; access (whose daemon that is, None: this
                user's own).
        Raises: SegmentError if it is missing, not a private file of that user, another arena than was promised, or too
                large for the address space that is left;
                VersionError if its layout is another one than this client knows.
        """
        _collect_closed()
        self.name = name
        self.size = size
        self.instance = instance
        self._memory: mmap.mmap | None = None
        self._fd = _open(name, size, access or Access(os.geteuid()))
        try:
            self._memory = _map(self._fd, name, size)
            self.base = memoryview(self._memory)
            self.words = self.base.cast("Q")
            self._check_header()
        except BaseException:
            self.close()
            raise
        self.shape = ArenaShape(self.words[H_PAGE_COUNT], self.words[H_HEAP_LIMIT])
        self._directory, self._page_map = self.shape.directory // WORD, self.shape.page_map // WORD
        self.pointer: int = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._executable: bytearray | None = None  # one byte a page, 1 where this process made it executable

    def _check_header(self) -> None:
        words = self.words
        if words[H_MAGIC] != MAGIC or words[H_PAGE_COUNT] << PAGE_SHIFT != self.size:
            raise SegmentError(f"the shared memory segment {self.name} holds no arena")
        if words[H_VERSION] != LAYOUT_VERSION:
            raise VersionError(
                f"the arena has layout version {words[H_VERSION]}, this client knows {LAYOUT_VERSION}; "
                f"install the same heapd on both sides"
            )
        found = words[H_INSTANCE].to_bytes(8, "little") + words[H_INSTANCE + 1].to_bytes(8, "little")
        if found != self.instance:
            raise SegmentError(f"the shared memory segment {self.name} holds another daemon's arena")

    def close(self) -> None:
        """Forget the file. The memory stays mapped for as long as anything refers to it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self._memory is not None:
                _closed.add(self._memory)

    def stay_mapped(self) -> None:
        """Keep the memory mapped to the end of the process, which is past the interpreter's: the kernel then frees the
        locks that its threads hold, but for those in memory that is not mapped any more."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._memory))

    @property
    def is_stopped(self) -> bool:
        """The daemon has said in the header that it ended on purpose."""
        state: int = self.words[H_STATE]
        return state == STOPPED

    @property
    def server(self) -> Server:
        """Who serves the arena now, or did until it died, as the header has it; a restarted daemon is another one."""
        words = self.words
        return Server(words[H_INCARNATION], words[H_PID], words[H_START_TIME])

    # -- what is where -----------------------------------------------------------------------------------------------
    def page(self, page: int) -> PageInfo:
        """What a page is. Args: page (page index, 0 <= page < shape.page_count)."""
        return split_page_word(page_word(self.words, self.shape, page))

    def is_committed(self, page: int) -> bool:
        """Whether a page may be read: what `page` says of its state, for a sixth of the time."""
        entry = self.words[self._directory + (page >> CHUNK_SHIFT)]
        return (self.words[self._page_map + page] if entry == MAPPED else entry) >> 62 == PAGE_COMMITTED

    def find_page(self, address: int) -> PageInfo | None:
        """What the page that holds `address` is, None beyond the arena."""
        if not 0 <= address < self.size:
            return None
        return self.page(address >> PAGE_SHIFT)

    def has_heap(self, heap_id: int) -> bool:
        """Whether that heap is there; from its control block."""
        index = heap_id & (1 << HEAP_INDEX_BITS) - 1
        if index >= self.words[H_CONTROLS_READY]:
            return False
        control = self.shape.control_slot(index)
        return bool(self.words[control + C_LIVE] & 1) and heap_id == self.words[control + C_HEAP_ID]

    def spans(self, first_page: int = 0, page_count: int | None = None) -> Iterator[tuple[int, int, PageInfo]]:
        """The maximal spans of pages with equal words, as (first page, page count, what they are), in order.

        A snapshot of a moving thing: the daemon may change the map between two spans.
        """
        end = self.shape.page_count if page_count is None else min(first_page + page_count, self.shape.page_count)
        start, word = first_page, -1
        for at, stop, each in self._stretches(first_page, end):
            if each != word:
                if at > start:
                    yield start, at - start, split_page_word(word)
                start, word = at, each
            if stop == end:
                yield start, end - start, split_page_word(word)

    def _stretches(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first page, page after the last, word): whole chunks where the directory says it all, else single pages."""
        words, directory, page_map = self.words, self.shape.directory // WORD, self.shape.page_map // WORD
        at = first
        while at < end:
            entry = words[directory + (at >> CHUNK_SHIFT)]
            stop = min((at >> CHUNK_SHIFT) + 1 << CHUNK_SHIFT, end)
            if entry != MAPPED:
                yield at, stop, entry
            else:
                for page, word in enumerate(words[page_map + at : page_map + stop].tolist(), at):
                    yield page, page + 1, word
            at = stop

    def page_slots(self, page: int) -> tuple[int, int]:
        """The two slots whose words tell what a page is: in the directory, and in the map if that is there."""
        directory = self.shape.directory // WORD + (page >> CHUNK_SHIFT)
        return directory, self.shape.page_map // WORD + page if self.words[directory] == MAPPED else directory

    def is_run_word_ready(self, page: int) -> bool:
        """The run word of `page` may be read: its chunk of the table is committed."""
        entry: int = self.words[self.shape.directory // WORD + page // CHUNK_PAGES]
        return entry == MAPPED

    # -- bytes -------------------------------------------------------------------------------------------------------
    def zero(self, address: int, size: int) -> None:
        """Zero bytes in bulk; other threads run meanwhile."""
        if size:
            ctypes.memset(self.pointer + address, 0, size)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes from one address to another, in place; other threads run meanwhile."""
        if size:
            ctypes.memmove(self.pointer + target, self.pointer + source, size)

    @property
    def has_executable_pages(self) -> bool:
        """Some page was ever made executable in this process."""
        return self._executable is not None

    # -- execution ---------------------------------------------------------------------------------------------------
    def check_executable(self) -> None:
        """Raises: ExecuteError if the system refuses to map this segment for execution (a noexec /dev/shm)."""
        try:
            probe = mmap.mmap(self._fd, PAGE_SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC)
        except PermissionError:
            raise ExecuteError(
                "the system refuses to execute shared memory: /dev/shm is mounted noexec, or a security policy "
                "forbids it; remount it with exec to use executable heaps"
            ) from None
        probe.close()

    def protect(self, address: int, size: int, *, executable: bool) -> None:
        """See that the pages of a block just granted are executable in this process, or are not.

        A page that served an executable heap may serve another one later: what was opened is closed again. Costs
        nothing in a process that has no executable heap.
        Raises: ExecuteError if the system refuses; the pages can be read and written as before.
        """
        if self._executable is None:
            if not executable:
                return
            self._executable = bytearray(self.shape.page_count)  # untouched parts of it cost nothing
        first, end = align_down(address, PAGE_SIZE) >> PAGE_SHIFT, align_up(address + size, PAGE_SIZE) >> PAGE_SHIFT
        if self._executable.find(not executable, first, end) < 0:
            return
        protection = _READ_WRITE | mmap.PROT_EXEC if executable else _READ_WRITE
        if _libc.mprotect(self.pointer + (first << PAGE_SHIFT), (end - first) << PAGE_SHIFT, protection):
            reason = os.strerror(ctypes.get_errno())
            raise ExecuteError(f"the system refuses to make a block executable: {reason}")
        self._executable[first:end] = bytes([executable]) * (end - first)


def _map(fd: int, name: str, size: int) -> mmap.mmap:
    """The whole segment, mapped; it takes address space, and memory only where it is committed."""
    try:
        return mmap.mmap(fd, size, mmap.MAP_SHARED, _READ_WRITE)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise SegmentError(
            f"this process has no address space left for the {format_size(size)} of the arena {name}; raise its limit "
            f"(ulimit -v), or start the daemon with a smaller --reserve"
        ) from None


def _collect_closed() -> None:
    """Have the collector look for mappings of closed sessions, where they are many: they are part of cycles, and each
    keeps a descriptor and the address space of a whole arena, of which a process has some thousands."""
    global _many
    if len(_closed) >= _many:
        gc.collect()
        _many = max(2 * len(_closed), _MANY)


def _open(name: str, size: int, access: Access) -> int:
    """A descriptor of the segment, checked: nobody else can have put another file in its place."""
    if "/" in name:
        raise SegmentError("the daemon named a segment that is none")
    try:
        fd = os.open(f"{_SHM_DIRECTORY}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentError(f"the shared memory segment {name} cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not access.admits(status):
        fault = f"is not a private file of user {access.uid}"
    elif status.st_nlink != 1:
        fault = "was removed, or has a second name"
    elif status.st_size != size:
        fault = f"is {status.st_size} bytes, not {size}"
    else:
        return fd
    os.close(fd)
    raise SegmentError(f"the shared memory segment {name} {fault}")
