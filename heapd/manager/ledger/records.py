"""The daemon's records as plain data, made again by reading a ledger: what the changes of `heapd.journal` mean.

Nothing here is trusted less than it was when it was written, and nothing is looked up in the arena. A log begins with
a retelling (see retelling.py) during which others' changes come in between: a change of something that was not told
of yet is passed over, for what is told later has it. From WHOLE on, such a change is a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from heapd import journal as j
from heapd.errors import SegmentError
from heapd.layout import HEAP_INDEX_BITS, PAGE_COMMITTED
from heapd.sizeclass import CLASSES
from heapd.units import PAGE_SHIFT
from heapd.wire import KEPT_REPLIES

__all__ = ["HeapRecord", "Records", "SessionRecord", "SlabRecord", "pack_bits", "unpack_bits"]

_BLOCK_MASK: Final = (1 << j.BLOCK_SHIFT) - 1
_INDEX_MASK: Final = (1 << HEAP_INDEX_BITS) - 1
_DIGITS: Final = bytes.maketrans(b"\0\1", b"01")
_FLAGS: Final = bytes.maketrans(b"01", b"\0\1")


def pack_bits(flags: bytes) -> bytes:
    """Flags (0 or 1) as bits, the last one's in the lowest, after a 1 that tells how many they are."""
    return int(b"1" + flags.translate(_DIGITS), 2).to_bytes(len(flags) // 8 + 1, "big")


def unpack_bits(bits: bytes) -> bytearray:
    """The flags that `pack_bits` was given."""
    return bytearray(bin(int.from_bytes(bits, "big"))[3:].encode().translate(_FLAGS))


@dataclass(slots=True, eq=False)
class SlabRecord:
    """A slab. Fields: heap, page_count, class_index, carved, lent (1 for each block given out; a byte for every
    block)."""

    heap: HeapRecord
    page_count: int
    class_index: int
    carved: int
    lent: bytearray


@dataclass(slots=True, eq=False)
class HeapRecord:
    """A heap. Fields: as the changes name them; regions (by serial), slabs and runs (by first page), unfinished (first
    pages of runs). It comes into being with its first region: heap_id is 0 until HEAP."""

    index: int
    heap_id: int = 0
    name: str | None = None
    flags: int = 0
    creator: int = 0
    is_default: bool = False
    maximum: int = 0
    max_block: int = 0
    initial: int = 0
    initial_bytes: int = 0
    quota: int = 0
    allocations: int = 0
    releases: int = 0
    regions: dict[int, tuple[int, int, bool]] = field(default_factory=dict)
    slabs: dict[int, SlabRecord] = field(default_factory=dict)
    runs: dict[int, int] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)
    names: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    owners: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class SessionRecord:
    """A session. Fields: as the changes name them; opened, closed (heap ids, also of heaps that went), replies, state
    ("live", "ending", "ended")."""

    number: int
    token: bytes
    pid: int
    uid: int
    start_time: int
    opened_ns: int
    requests: int = 0
    state: str = "live"
    opened: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)
    replies: dict[int, bytes] = field(default_factory=dict)


class Records:
    """All of them.

    Fields: pages (a state a page), heaps (by control index), sessions (by number), epochs (by control index), pending
    (ticket -> {(heap index, heap id, address, generation)}), words (slot -> word: stores of the last record), peak
    (bytes), last_number, next_serial, sequence (of the last record), is_whole.
    """

    def __init__(self, page_count: int) -> None:
        self.pages = bytearray(page_count)
        self.heaps: dict[int, HeapRecord] = {}
        self.sessions: dict[int, SessionRecord] = {}
        self.epochs: dict[int, int] = {}
        self.pending: dict[int, set[tuple[int, int, int, int]]] = {}
        self.words: dict[int, int] = {}
        self.peak = 0
        self.last_number = 0
        self.next_serial = 1
        self.sequence = 0
        self.is_whole = False
        self._committed = 0  # pages; right once it is whole
        self._slabs: dict[int, SlabRecord] = {}
        self._apply: list[Callable[..., None]] = [self._unknown] * (j.WHOLE + 1)
        for name in _KINDS:
            self._apply[getattr(j, name)] = getattr(self, f"_{name.lower()}")

    @classmethod
    def read(cls, frames: Iterable[bytes], page_count: int) -> Records:
        """Raises: SegmentError if the frames do not make whole records."""
        records = cls(page_count)
        unpack = msgpack.unpackb
        try:
            for frame in frames:
                records.add(*unpack(frame, use_list=True))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise SegmentError(f"the ledger holds a record that makes no sense: {error!r}") from error
        if not records.is_whole:
            raise SegmentError("the ledger was not finished")
        return records

    def add(
        self, sequence: int, number: int, requests: int, request_id: int, answer: bytes, changes: list[Any]
    ) -> None:
        """Take in one record; sequence 0 is of a retelling."""
        if sequence:
            self.sequence = sequence
            self.words.clear()
        apply = self._apply
        for change in changes:
            if type(change) is int:
                self._block(change)
            else:
                apply[change[0]](*change[1:])
        session = self.sessions.get(number)
        if session is not None:
            session.requests = requests
            if request_id:
                session.replies.pop(request_id, None)
                session.replies[request_id] = answer
                if len(session.replies) > KEPT_REPLIES:
                    del session.replies[next(iter(session.replies))]

    def _unknown(self, *values: Any) -> None:
        raise ValueError(f"an unknown change with {values}")

    def _missing(self, what: str, key: object) -> None:
        if self.is_whole:
            raise KeyError(f"{what} {key}")

    # -- pages, blocks -------------------------------------------------------------------------------------------------
    def _block(self, change: int) -> None:
        is_lent = change >= 0
        place = change if is_lent else ~change
        slab = self._slabs.get(place >> j.BLOCK_SHIFT)
        if slab is None:
            self._missing("slab", place >> j.BLOCK_SHIFT)
            return
        index = place & _BLOCK_MASK
        if slab.lent[index] == is_lent:
            return
        slab.lent[index] = is_lent
        if is_lent:
            slab.heap.allocations += 1
            slab.carved = max(slab.carved, index + 1)
        else:
            slab.heap.releases += 1

    def _pages(self, first: int, count: int, state: int) -> None:
        self._committed -= self.pages.count(PAGE_COMMITTED, first, first + count)
        self.pages[first : first + count] = bytes((state,)) * count
        if state == PAGE_COMMITTED:
            self._committed += count
            self.peak = max(self.peak, self._committed << PAGE_SHIFT)

    def _region(self, heap: int, serial: int, first: int, page_count: int, is_big: bool) -> None:
        record = self.heaps.get(heap)
        if record is None:
            record = self.heaps[heap] = HeapRecord(heap)
        record.regions[serial] = first, page_count, is_big

    def _no_region(self, heap: int, serial: int) -> None:
        record = self.heaps.get(heap)
        if record is None or record.regions.pop(serial, None) is None:
            self._missing("region", serial)

    def _slab(self, heap: int, first: int, page_count: int, class_index: int, carved: int, lent: bytes) -> None:
        record = self.heaps.get(heap)
        if record is None:
            self._missing("heap", heap)
            return
        flags = bytearray(CLASSES[class_index].blocks_in(page_count))
        if carved:
            flags[:carved] = unpack_bits(lent)
        self._slabs[first] = record.slabs[first] = SlabRecord(record, page_count, class_index, carved, flags)

    def _slab_cut(self, first: int, page_count: int) -> None:
        slab = self._slabs.get(first)
        if slab is None:
            self._missing("slab", first)
        else:
            slab.page_count = page_count
            del slab.lent[CLASSES[slab.class_index].blocks_in(page_count) :]
            slab.carved = min(slab.carved, len(slab.lent))

    def _no_slab(self, first: int) -> None:
        slab = self._slabs.pop(first, None)
        if slab is None:
            self._missing("slab", first)
        else:
            del slab.heap.slabs[first]

    def _run(self, heap: int, first: int, page_count: int, is_finished: int) -> None:
        record = self.heaps.get(heap)
        if record is None:
            self._missing("heap", heap)
            return
        if first not in record.runs:
            record.allocations += 1
        record.runs[first] = page_count
        if is_finished:
            record.unfinished.discard(first)
        else:
            record.unfinished.add(first)

    def _no_run(self, heap: int, first: int) -> None:
        record = self.heaps.get(heap)
        if record is None or record.runs.pop(first, None) is None:
            self._missing("run", first)
        else:
            record.unfinished.discard(first)
            record.releases += 1

    def _word(self, slot: int, word: int) -> None:
        self.words[slot] = word

    # -- heaps ---------------------------------------------------------------------------------------------------------
    def _heap(
        self,
        heap: int,
        heap_id: int,
        name: str | None,
        flags: int,
        creator: int,
        is_default: bool,
        maximum: int,
        max_block: int,
        initial: int,
        initial_bytes: int,
        quota: int,
    ) -> None:
        record = self.heaps.setdefault(heap, HeapRecord(heap))
        record.heap_id, record.name, record.flags, record.creator = heap_id, name, flags, creator
        record.is_default, record.maximum, record.max_block, record.initial = is_default, maximum, max_block, initial
        record.initial_bytes, record.quota = initial_bytes, quota
        self.next_serial = max(self.next_serial, (heap_id >> HEAP_INDEX_BITS) + 1)

    def _no_heap(self, heap: int) -> None:
        record = self.heaps.pop(heap, None)
        if record is None:
            self._missing("heap", heap)
            return
        for first in record.slabs:
            del self._slabs[first]

    def _counts(self, heap: int, allocations: int, releases: int) -> None:
        self.heaps[heap].allocations, self.heaps[heap].releases = allocations, releases

    def _epoch(self, heap: int, epoch: int) -> None:
        self.epochs[heap] = epoch

    def _name(self, heap: int, name: str, slot: int, address: int, generation: int) -> None:
        record = self.heaps.get(heap)
        if record is None:
            self._missing("heap", heap)
        else:
            record.names[name] = slot, address, generation

    def _no_name(self, heap: int, name: str) -> None:
        record = self.heaps.get(heap)
        if record is None or record.names.pop(name, None) is None:
            self._missing("name", name)

    def _owners(self, heap: int, owners: list[int]) -> None:
        record = self.heaps.get(heap)
        if record is None:
            self._missing("heap", heap)
        else:
            record.owners = owners

    # -- sessions ------------------------------------------------------------------------------------------------------
    def _session(self, number: int, token: bytes, pid: int, uid: int, start_time: int, opened_ns: int) -> None:
        self.sessions[number] = SessionRecord(number, token, pid, uid, start_time, opened_ns)
        self.last_number = number

    def _find(self, number: int) -> SessionRecord | None:
        session = self.sessions.get(number)
        if session is None:
            self._missing("session", number)
        return session

    def _join(self, number: int, heap_id: int) -> None:
        if (session := self._find(number)) is not None:
            session.opened.add(heap_id)

    def _leave(self, number: int, heap_id: int) -> None:
        if (session := self._find(number)) is not None:
            session.opened.discard(heap_id)
            session.closed.add(heap_id)

    def _ending(self, number: int) -> None:
        if (session := self._find(number)) is not None:
            session.state = "ending"

    def _ended(self, number: int) -> None:
        if (session := self._find(number)) is not None:
            session.state = "ended"
        for record in self.heaps.values():
            if record.creator == number:
                record.creator = 0

    def _retired(self, number: int) -> None:
        if self.sessions.pop(number, None) is None:
            self._missing("session", number)

    def _pending(self, ticket: int, heap: int, heap_id: int, address: int, generation: int) -> None:
        self.pending.setdefault(ticket, set()).add((heap, heap_id, address, generation))

    def _done(self, ticket: int) -> None:
        self.pending.pop(ticket, None)

    def _whole(self, peak: int, last_number: int, next_serial: int) -> None:
        self.peak, self.last_number, self.next_serial = peak, last_number, next_serial
        self._committed = self.pages.count(PAGE_COMMITTED)
        self.is_whole = True


_KINDS: Final = (
    "PAGES", "REGION", "NO_REGION", "SLAB", "SLAB_CUT", "NO_SLAB", "RUN", "NO_RUN", "WORD", "HEAP", "NO_HEAP", "COUNTS",
    "EPOCH", "JOIN", "LEAVE", "NAME", "NO_NAME", "OWNERS", "SESSION", "ENDING", "ENDED", "RETIRED", "PENDING", "DONE",
    "WHOLE",
)  # fmt: skip
