"""What heapd tells about itself: plain frozen records, made by the layer that knows and read by every other.

Each record crosses the wire as the tuple of its fields, in order (`as_tuple`), and is rebuilt by `Record(*fields)`;
a field may be added at the end with a default, none may change place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from operator import attrgetter
from typing import Any, NamedTuple

__all__ = [
    "ArenaStatistics",
    "Entry",
    "EntryKind",
    "Grant",
    "HeapInfo",
    "HeapStatistics",
    "Publication",
    "SessionInfo",
    "Violation",
    "as_tuple",
]

_GETTERS: dict[type, attrgetter[Any]] = {}


def as_tuple(record: Any) -> tuple[Any, ...]:
    """The fields of a record in order, one level deep."""
    getter = _GETTERS.get(type(record))
    if getter is None:
        getter = _GETTERS[type(record)] = attrgetter(*(field.name for field in fields(record)))
    values: tuple[Any, ...] = getter(record)
    return values


class EntryKind(IntEnum):
    """What a walk entry is."""

    REGION = 1  # a region's first entry; size is its reserve, `committed` the committed part of it
    BUSY = 2  # an allocated block
    FREE = 3  # committed bytes nobody has: a free block of a slab, or a run of free pages
    CACHED = 4  # a free block that a session's front end holds
    UNCOMMITTED = 5  # reserved pages that are not committed
    OVERHEAD = 6  # slab heads and the rest that is too small for a block


class Entry(NamedTuple):
    """One element of a walk; the entries after a REGION tile it, without gap or overlap, in address order.

    Fields:
        kind        EntryKind
        address     of the first byte
        size        bytes: requested for BUSY, the reserve for REGION, else the same as extent
        extent      bytes it occupies (for REGION: the reserve)
        region      index of its region in the heap, from 0
        session     number of the session that holds (BUSY) or caches (CACHED) it, else 0
        orphaned    True: BUSY, and that session has ended
        generation  of the block, 0 where there is none
        committed   bytes committed (REGION only)
        is_run      True: a block that is a run of pages; of a REGION: it holds one large run alone
    """

    kind: EntryKind
    address: int
    size: int
    extent: int
    region: int
    session: int = 0
    orphaned: bool = False
    generation: int = 0
    committed: int = 0
    is_run: bool = False


class Grant(NamedTuple):
    """A block as the back end gives it out; a tuple already, because one is made for every allocation.

    Fields: slot (of its state word), address, generation, extent (bytes it occupies),
    fresh (True: its pages were committed for it and read as zero).
    """

    slot: int
    address: int
    generation: int
    extent: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class HeapInfo:
    """A heap as its clients need to know it.

    Fields:
        heap_id     unique in the instance, never used again; control block index in the low 16 bits
        name        None for an anonymous heap
        flags       layout.F_* bits
        maximum     bytes reserved at most; 0: growable
        max_block   largest request in bytes, 0: no limit of its own
        epoch       value of the live word's epoch when this was made
        base        address of the first region
        creator     number of the session that made it, 0 when that has ended
        is_default  True: some session's default heap
        sessions    sessions that have it open
        session_quota  bytes that one session may have of it, 0: no limit of its own
    """

    heap_id: int
    name: str | None
    flags: int
    maximum: int
    max_block: int
    epoch: int
    base: int
    creator: int
    is_default: bool
    sessions: int = 0
    session_quota: int = 0


@dataclass(frozen=True, slots=True)
class HeapStatistics:
    """Bytes and counts of one heap, from one pass over it; the parts add up at every moment.

    reserved  = committed + uncommitted
    committed = busy + padding + cached + free + overhead

    Fields, in bytes: reserved; committed; uncommitted; busy (requested by allocated blocks); padding (extents of
    those blocks less what was requested); cached (extents of free blocks held by front ends); free (extents of free
    blocks and free committed pages); overhead (slab heads and remainders); largest_free (largest committed free
    extent); orphaned (requested, by blocks whose session ended; part of busy).
    Counts: busy_blocks, cached_blocks, free_blocks, orphaned_blocks, regions, slabs, runs; allocations, releases
    (blocks the back end has given out and taken back so far).
    Lock: acquisitions, contended, waited_ns, recoveries (see layout.C_ACQUIRED).
    """

    reserved: int
    committed: int
    uncommitted: int
    busy: int
    padding: int
    cached: int
    free: int
    overhead: int
    largest_free: int
    orphaned: int
    busy_blocks: int
    cached_blocks: int
    free_blocks: int
    orphaned_blocks: int
    regions: int
    slabs: int
    runs: int
    allocations: int
    releases: int
    acquisitions: int
    contended: int
    waited_ns: int
    recoveries: int


@dataclass(frozen=True, slots=True)
class ArenaStatistics:
    """Bytes of the arena: size = tables_reserved + reserved + unreserved; committed = tables + heaps.

    Fields, in bytes: size; unreserved (no heap's); reserved (by regions); committed (now, in all); tables
    (committed by header, control blocks, page map); heaps (committed in regions, or released and not given back to the
    system yet); commit_limit; peak_committed.
    Counts: heap_count, session_count.
    """

    size: int
    tables_reserved: int
    reserved: int
    unreserved: int
    committed: int
    tables: int
    heaps: int
    commit_limit: int
    peak_committed: int
    heap_count: int
    session_count: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A client process as the daemon knows it.

    Fields: number (in state words), pid, uid, age_ns (since its hello), heaps (it has open), requests (so far),
    is_live (False: it ended and is listed because blocks of it are left), held (bytes of blocks that were lent to it
    and are not back).
    """

    number: int
    pid: int
    uid: int
    age_ns: int
    heaps: int
    requests: int
    is_live: bool
    held: int = 0


@dataclass(frozen=True, slots=True)
class Publication:
    """A name in a heap and the block it stands for: name, slot, address, generation, size (requested, bytes)."""

    name: str
    slot: int
    address: int
    generation: int
    size: int


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant.

    Fields: what (a short stable word, e.g. "state-word", "page-map", "overlap"), address (of the block, page or
    word; 0 when the fault has no place), session (who held it, 0 unknown), detail (a sentence).
    """

    what: str
    address: int
    session: int
    detail: str
