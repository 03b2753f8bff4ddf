"""The arena: reserve, commit, decommit and release pages of one segment, and say in the page map what each one is.

The state of every page is kept twice: `_state`, private, is the truth; the page map is for clients to read, and
nothing is ever derived from it. Pages go FREE -> RESERVED -> COMMITTED and back. Commit is posix_fallocate before any
byte is handed out, so that a full /dev/shm is an error here and never a SIGBUS in a client; decommit is MADV_REMOVE.
"""

from __future__ import annotations

import os
import uuid
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from mmap import MADV_REMOVE

from heapd.arena.budget import Budget, default_commit_limit
from heapd.arena.extents import Extents
from heapd.arena.pagemap import PageMap
from heapd.arena.segment import Segment
from heapd.errors import HeapFullError, InvalidArgumentError
from heapd.journal import PAGES, Journal
from heapd.layout import (
    CONTROL_SIZE,
    H_COMMIT_LIMIT,
    H_COMMITTED,
    H_CONTROLS_READY,
    H_HEAP_LIMIT,
    H_INCARNATION,
    H_INSTANCE,
    H_MAGIC,
    H_PAGE_COUNT,
    H_PID,
    H_RESERVED,
    H_SESSIONS_READY,
    H_START_TIME,
    H_STATE,
    H_VERSION,
    KIND_NONE,
    KIND_SPARE,
    LAYOUT_VERSION,
    MAGIC,
    MIN_RESERVE,
    PAGE_COMMITTED,
    PAGE_FREE,
    PAGE_RESERVED,
    RUNNING,
    STARTING,
    STOPPED,
    WORD,
    ArenaShape,
    make_page_word,
)
from heapd.records import ArenaStatistics, Violation
from heapd.units import GRANULE_PAGES, GRANULE_SIZE, MIB, PAGE_SHIFT, PAGE_SIZE, align_up, format_size

__all__ = ["Arena"]

SLICE_PAGES = 16 * MIB // PAGE_SIZE  # commit or decommit this much at a time: 4 to 10 ms, the loop's longest stall
_STATE_BYTES = (b"\0", b"\1", b"\2")


class Arena:
    """Pages of one segment.

    Fields: segment, words (the mapping as "Q"), shape, instance (16 bytes), pages (the page map), budget, journal (is
    told of changes; replaced before the first heap is made, or never).
    Locks:  none; the daemon is one thread.
    """

    def __init__(self, segment: Segment, shape: ArenaShape, budget: Budget) -> None:
        self.segment = segment
        self.shape = shape
        self.budget = budget
        self.words = segment.words
        self.journal = Journal(self.words)
        self.instance = uuid.uuid4().bytes
        self.pages = PageMap(self.words, shape, self._commit_table)
        self._header: dict[int, int] = {}  # what was written there, by slot
        self.reserved = 0
        self._state = bytearray(shape.page_count)  # PAGE_*; zeros, so untouched parts cost nothing
        self._granules = Extents()  # free address space
        self._chores: list[Callable[[], bool]] = []
        self._doomed: list[tuple[int, int]] = []  # released ranges that still have to be decommitted
        self._seed = int.from_bytes(os.urandom(4), "little")
        self._controls_ready = 0  # control blocks whose page is committed
        self._sessions_ready = 0  # session words, likewise

    @classmethod
    def create(cls, name: str, *, reserve: int, commit_limit: int | None = None) -> Arena:
        """Make a new arena.

        Args:    name (of the segment), reserve (bytes of address space, at least 16 MiB), commit_limit (bytes; None:
                 what the machine leaves now, less a margin).
        Raises:  InvalidArgumentError for a reserve that is too small; SegmentError if the segment cannot be made;
                 HeapFullError if not even the tables fit. Nothing is left behind.
        """
        if reserve < MIN_RESERVE:
            raise InvalidArgumentError(
                f"a reserve of {format_size(reserve)} is too small; give at least {format_size(MIN_RESERVE)}"
            )
        shape = ArenaShape(align_up(reserve, GRANULE_SIZE) >> PAGE_SHIFT)
        segment = Segment.create(name, shape.size)
        try:
            arena = cls(segment, shape, Budget(default_commit_limit() if commit_limit is None else commit_limit))
            arena._set_up()
        except BaseException:
            segment.unlink()
            segment.close()
            raise
        return arena

    @property
    def doomed(self) -> list[tuple[int, int]]:
        """Ranges that were released and are not decommitted yet, as (first page, pages)."""
        return self._doomed

    def states(self, first: int, page_count: int) -> bytes:
        """PAGE_* of each page of a range."""
        return bytes(self._state[first : first + page_count])

    def _set_up(self) -> None:
        shape = self.shape
        self._commit_table(0, PAGE_SIZE)
        self._write_header(1)
        self.pages.prepare()
        self._granules.give(shape.first_page // GRANULE_PAGES, (shape.page_count - shape.first_page) // GRANULE_PAGES)
        self._tell(H_MAGIC, MAGIC)  # last: a segment without it was never finished

    def _write_header(self, incarnation: int) -> None:
        self._tell(H_STATE, STARTING)
        self._tell(H_VERSION, LAYOUT_VERSION)
        self._tell(H_INSTANCE, int.from_bytes(self.instance[:8], "little"))
        self._tell(H_INSTANCE + 1, int.from_bytes(self.instance[8:], "little"))
        self._tell(H_INCARNATION, incarnation)
        self._tell(H_PAGE_COUNT, self.shape.page_count)
        self._tell(H_HEAP_LIMIT, self.shape.heap_limit)
        self._tell(H_COMMIT_LIMIT, self.budget.limit)
        self._tell(H_CONTROLS_READY, self._controls_ready)
        self._tell(H_SESSIONS_READY, self._sessions_ready)
        self._publish()

    def _tell(self, slot: int, value: int) -> None:
        """Write a word of the header, and remember it: who scribbles there is found out."""
        self.words[slot] = self._header[slot] = value

    def limit_commit(self, limit: int) -> None:
        """Change how much may be committed. Args: limit (bytes; what is committed beyond it stays)."""
        self.budget.limit = limit
        self._tell(H_COMMIT_LIMIT, limit)

    def start(self, pid: int, start_time: int) -> None:
        """Say who serves the arena. Args: pid, start_time (clock ticks after boot, /proc/PID/stat field 22)."""
        self._tell(H_PID, pid)
        self._tell(H_START_TIME, start_time)
        self._tell(H_STATE, RUNNING)

    def stop(self) -> None:
        """Mark the arena as stopped on purpose, unlink and unmap it."""
        self.words[H_STATE] = STOPPED
        self.segment.unlink()
        self.words = memoryview(b"")
        self.segment.close()

    # -- address space -----------------------------------------------------------------------------------------------
    def reserve(self, page_count: int, heap: int) -> int:
        """Reserve a region for a heap.

        State:   FREE -> RESERVED.
        Args:    page_count (is rounded up to 64 KiB, here as in `release`), heap (control index).
        Returns: the region's first page, on a 64 KiB boundary.
        Raises:  HeapFullError; nothing has changed.
        """
        page_count = align_up(page_count, GRANULE_PAGES)
        first = self._take_granules(page_count // GRANULE_PAGES)
        try:
            self.pages.map_edges(first, page_count)
        except HeapFullError:
            self._granules.give(first // GRANULE_PAGES, page_count // GRANULE_PAGES)
            raise
        self._own(first, page_count, heap)
        return first

    def reserve_at(self, first: int, page_count: int, heap: int) -> bool:
        """Reserve these very pages, which follow a region of the heap; False if they are not free.

        Raises:  HeapFullError if the page map cannot grow; nothing has changed.
        """
        if not self._granules.take_at(first // GRANULE_PAGES, page_count // GRANULE_PAGES):
            return False
        try:
            self.pages.map_edges(first, page_count)
        except HeapFullError:
            self._granules.give(first // GRANULE_PAGES, page_count // GRANULE_PAGES)
            raise
        self._own(first, page_count, heap)
        return True

    def _take_granules(self, count: int) -> int:
        start = self._granules.take(count)
        if start is None and not self.is_settled:
            self.settle_all()
            start = self._granules.take(count)
        if start is None:
            raise HeapFullError.of(
                "reserve",
                requested=count * GRANULE_SIZE,
                used=self.reserved,
                limit=(self.shape.page_count - self.shape.first_page) * PAGE_SIZE,
                advice="destroy heaps, or start the daemon with a larger --reserve",
            )
        return start * GRANULE_PAGES

    def _own(self, first: int, page_count: int, heap: int) -> None:
        self._state[first : first + page_count] = _STATE_BYTES[PAGE_RESERVED] * page_count
        self.journal.note((PAGES, first, page_count, PAGE_RESERVED))
        self.pages.set(first, page_count, make_page_word(PAGE_RESERVED, KIND_SPARE, heap, first))
        self.reserved += page_count * PAGE_SIZE
        self._publish()

    def release(self, first: int, page_count: int) -> None:
        """Give a region (or whole granules of one) back.

        State:   any -> FREE. A large range is decommitted later, by `settle`; until then it counts as committed.
        """
        page_count = align_up(page_count, GRANULE_PAGES)
        self.pages.set(first, page_count, make_page_word(PAGE_FREE, KIND_NONE, 0, 0))
        self.reserved -= page_count * PAGE_SIZE
        self._doomed.append((first, page_count))
        if page_count <= SLICE_PAGES and len(self._doomed) == 1:
            self.settle()
        self._publish()

    @property
    def is_settled(self) -> bool:
        """False: pages that were released, or are spare beyond measure, are waiting to be decommitted."""
        return not self._doomed and not self._chores

    def defer(self, trim: Callable[[], bool]) -> None:
        """Have `trim` called by `settle` until it returns False: it decommits a slice of what a heap has too much."""
        if trim not in self._chores:
            self._chores.append(trim)

    def undefer(self, trim: Callable[[], bool]) -> None:
        """There is nothing to trim any more."""
        if trim in self._chores:
            self._chores.remove(trim)

    def settle(self) -> None:
        """Decommit one slice of what waits for it."""
        if not self._doomed:
            if self._chores and not (trim := self._chores[-1])():
                self.undefer(trim)
            return
        first, count = self._doomed.pop()
        if count > SLICE_PAGES:
            self._doomed.append((first, count - SLICE_PAGES))
            first, count = first + count - SLICE_PAGES, SLICE_PAGES
        self._punch(first, count, PAGE_FREE)
        self._granules.give(first // GRANULE_PAGES, count // GRANULE_PAGES)
        self._publish()

    def settle_all(self) -> None:
        while not self.is_settled:
            self.settle()

    # -- commit ------------------------------------------------------------------------------------------------------
    def commit(self, first: int, page_count: int) -> int:
        """Make reserved pages usable. The caller says in the page map what they are (`describe`).

        State:   RESERVED -> COMMITTED; COMMITTED pages stay as they are.
        Returns: pages newly committed; all of them read as zero.
        Raises:  HeapFullError; no page has changed.
        """
        missing = page_count - self.committed_in(first, page_count)
        if not missing:
            return 0
        self.journal.hasten()  # these very pages may wait to be decommitted
        try:
            self.budget.take(missing * PAGE_SIZE)
        except HeapFullError:
            if self.is_settled:
                raise
            self.settle_all()
            self.journal.hasten()
            self.budget.take(missing * PAGE_SIZE)
        done: list[tuple[int, int]] = []
        for start, count, is_committed in self.stretches(first, page_count):
            if is_committed:
                continue
            try:
                os.posix_fallocate(self.segment.fd, start << PAGE_SHIFT, count << PAGE_SHIFT)
            except OSError as error:
                self.budget.give((missing - sum(count for _, count in done)) * PAGE_SIZE)
                for undone in done:
                    self._punch(*undone, PAGE_RESERVED)
                raise self.budget.refusal(missing * PAGE_SIZE) from error
            self._state[start : start + count] = _STATE_BYTES[PAGE_COMMITTED] * count
            done.append((start, count))
        self.journal.note((PAGES, first, page_count, PAGE_COMMITTED))
        self._publish()
        return missing

    def decommit(self, first: int, page_count: int, heap: int) -> int:
        """Give the memory behind spare pages of a region back, and say so in the page map.

        State:   COMMITTED -> RESERVED; RESERVED pages stay. The bytes read as zero afterwards.
        Returns: pages decommitted.
        """
        committed = self.committed_in(first, page_count)
        if committed:
            self.pages.set(first, page_count, make_page_word(PAGE_RESERVED, KIND_SPARE, heap, first))
            self._punch(first, page_count, PAGE_RESERVED)
            self._publish()
        return committed

    def _punch(self, first: int, page_count: int, state: int) -> None:
        for start, count, is_committed in self.stretches(first, page_count):
            if is_committed:
                self.journal.later(partial(self._remove, start, count))
        self._state[first : first + page_count] = _STATE_BYTES[state] * page_count
        self.journal.note((PAGES, first, page_count, state))

    def _remove(self, first: int, page_count: int) -> None:
        self.segment.mapping.madvise(MADV_REMOVE, first << PAGE_SHIFT, page_count << PAGE_SHIFT)
        self.budget.give(page_count * PAGE_SIZE)
        self._publish()

    def _commit_table(self, address: int, size: int) -> None:
        first, count = address >> PAGE_SHIFT, (size + PAGE_SIZE - 1) >> PAGE_SHIFT
        self._state[first : first + count] = self._state[first : first + count].replace(b"\0", b"\1")
        self.commit(first, count)

    # -- what pages are ----------------------------------------------------------------------------------------------
    def committed_in(self, first: int, page_count: int) -> int:
        """Committed pages of a range."""
        return self._state.count(PAGE_COMMITTED, first, first + page_count)

    def state_of(self, page: int) -> int:
        return self._state[page]

    def stretches(self, first: int, page_count: int) -> list[tuple[int, int, bool]]:
        """A range of reserved and committed pages as (start, count, is_committed), in order."""
        state, at, end = self._state, first, first + page_count
        found = []
        while at < end:
            is_committed = state[at] == PAGE_COMMITTED
            stop = state.find(PAGE_RESERVED if is_committed else PAGE_COMMITTED, at, end)
            if stop < 0:
                stop = end
            found.append((at, stop - at, is_committed))
            at = stop
        return found

    def describe(self, first: int, page_count: int, kind: int, heap: int, start: int) -> None:
        """Say in the page map what the pages of a range are; states are filled in from what they are."""
        if self.committed_in(first, page_count) == page_count:
            self.pages.set(first, page_count, make_page_word(PAGE_COMMITTED, kind, heap, start))
            return
        for at, count, is_committed in self.stretches(first, page_count):
            state = PAGE_COMMITTED if is_committed else PAGE_RESERVED
            self.pages.set(at, count, make_page_word(state, kind, heap, start))

    # -- control blocks, numbers ---------------------------------------------------------------------------------------
    def prepare_control(self, index: int) -> int:
        """Commit control block `index`; its first slot. Raises: HeapFullError; nothing has changed."""
        ready = self._controls_ready
        if index >= ready:
            per_page = PAGE_SIZE // CONTROL_SIZE
            until = align_up(index + 1, per_page)
            self._commit_table(self.shape.controls + ready * CONTROL_SIZE, (until - ready) * CONTROL_SIZE)
            self._controls_ready = until
            self._tell(H_CONTROLS_READY, until)
        return self.shape.control_slot(index)

    def set_session(self, number: int, word: int) -> None:
        """Store the word of a session. Raises: HeapFullError if its page cannot be committed; nothing has changed."""
        ready = self._sessions_ready
        if number >= ready:
            until = align_up(number + 1, PAGE_SIZE // WORD)
            self._commit_table(self.shape.sessions + ready * WORD, (until - ready) * WORD)
            self._sessions_ready = until
            self._tell(H_SESSIONS_READY, until)
        self.words[self.shape.session_slot(number)] = word

    def restore_sessions(self, live: dict[int, int]) -> None:
        """Store the words of the sessions that live, by number, and that no other does."""
        first = self.shape.session_slot(0)
        words = array("Q", bytes(self._sessions_ready * WORD))
        for number, word in live.items():
            words[number] = word
        self.words[first : first + len(words)] = memoryview(words)

    def next_seed(self) -> int:
        """A number to start generations from: different for each slab made, so that a stale handle into a slab
        whose pages became another slab does not name a block of that one."""
        self._seed = self._seed + 0x9E3779B1 & 0x7FFFFFFF
        return self._seed

    def violations(self) -> Iterator[Violation]:
        """What the header says wrong."""
        known = {**self._header, H_COMMITTED: self.budget.committed, H_RESERVED: self.reserved}
        for slot, value in known.items():
            if self.words[slot] != value:
                detail = f"word {slot} of the header is {self.words[slot]:#x}, and was written as {value:#x}"
                yield Violation("header", slot * WORD, 0, detail)

    def _publish(self) -> None:
        self.words[H_COMMITTED] = self.budget.committed
        self.words[H_RESERVED] = self.reserved

    def statistics(self, heap_count: int, session_count: int) -> ArenaStatistics:
        tables = self.shape.first_page << PAGE_SHIFT
        committed_tables = self.committed_in(0, self.shape.first_page) << PAGE_SHIFT
        return ArenaStatistics(
            size=self.shape.size,
            tables_reserved=tables,
            reserved=self.reserved,
            unreserved=self.shape.size - tables - self.reserved,
            committed=self.budget.committed,
            tables=committed_tables,
            heaps=self.budget.committed - committed_tables,
            commit_limit=self.budget.limit,
            peak_committed=self.budget.peak,
            heap_count=heap_count,
            session_count=session_count,
        )
