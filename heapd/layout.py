"""Byte layout of everything in the arena; every number here is part of LAYOUT_VERSION.

The arena is one mapping, addressed in bytes from its base (an *address*) or in 8-byte words (a *slot* = address / 8),
little endian. The daemon writes all of it but three things, which clients write: state words of blocks leased to or
allocated by them, a heap's mutex, and the lock counters while they hold it. Payloads are theirs, of course.

    page 0              header                               H_*
    pages 1 ..          control blocks, 256 B a heap         C_*
    then                session words, 8 B a session         not 0 while it lives, and different each time
    then                page directory, 8 B a chunk          one page word a chunk of 512 pages, or MAPPED
    then                page map, 8 B a page                 committed chunk by chunk
    then                run words, 8 B a page                state words of runs, committed with the page map
    first_page ..       regions of heaps: slabs, runs, free pages

Page word: what a page is. Read it with `page_word`, never by hand: a chunk whose pages are all alike has its word in
the directory and no page of the map behind it, and a read of an uncommitted page would commit it.

    bits 62-63  state       FREE 0, RESERVED 1, COMMITTED 2
    bits 56-58  kind        NONE 0, TABLE 1, SPARE 2, SLAB 3, RUN 4
    bits 40-55  heap        index of the heap's control block
    bits 0-39   start       first page of the slab, run or region that the page is part of

State word: the whole truth about one block. Moved from one state to the next by one aligned 8-byte store.

    top bits    generation  33 bits for slab blocks, 14 for runs
    14 bits     session     who allocated or caches it, 0 when FREE
    low bits    size        17 bits for slab blocks, 36 for runs: bytes requested when BUSY, 0 when CACHED or FREE

The state follows: FREE has no session, CACHED a session and no size, BUSY both. A BUSY block of 0 bytes has all bits
of the size set. So a front end, which holds the word of a cached block, allocates by adding the size to it and frees
by storing it again; nothing in the arithmetic of the hot path knows of states.

Slab head: word 0 is the descriptor (magic, class index), then a state word for each block; geometry follows from the
class (sizeclass.py).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from heapd.errors import InvalidArgumentError
from heapd.units import GIB, MIB, PAGE_SHIFT, PAGE_SIZE, align_up

__all__ = [
    "ArenaShape",
    "Handle",
    "RUN_WORD",
    "SLAB_WORD",
    "WordFormat",
    "page_word",
]

LAYOUT_VERSION: Final = 1
MAGIC: Final = int.from_bytes(b"heapd\x00\x00\x01", "little")
WORD: Final = 8  # bytes in a slot
MIN_RESERVE: Final = 16 * MIB  # bytes of an arena; arbitrary: the tables take 6 MiB, mostly not committed

# -- header, page 0: slot numbers ------------------------------------------------------------------------------------
H_MAGIC: Final = 0
H_VERSION: Final = 1
H_INSTANCE: Final = 2  # two words: 16 random bytes, the arena's identity
H_STATE: Final = 4  # STARTING, RUNNING, STOPPED
H_INCARNATION: Final = 5  # restarts of the daemon on this arena, from 1
H_PAGE_COUNT: Final = 6  # pages of the arena, tables included
H_HEAP_LIMIT: Final = 7  # control blocks there is room for
H_PID: Final = 8  # the daemon's process id
H_START_TIME: Final = 9  # its start time, clock ticks after boot (/proc/PID/stat field 22)
H_COMMITTED: Final = 10  # bytes committed now, tables included
H_COMMIT_LIMIT: Final = 11  # bytes the daemon may commit
H_RESERVED: Final = 12  # bytes reserved by regions now
H_CONTROLS_READY: Final = 13  # control blocks whose page is committed: none beyond may be read
H_SESSIONS_READY: Final = 14  # session words, likewise

STARTING: Final = 1
RUNNING: Final = 2
STOPPED: Final = 3

# -- control block: slots from its first -----------------------------------------------------------------------------
CONTROL_SIZE: Final = 256
C_LIVE: Final = 0  # epoch << 1 | 1 while the heap lives; changes when front ends must look up
C_HEAP_ID: Final = 1  # id of the heap that uses this control block, 0 for none
C_FLAGS: Final = 2  # F_* bits
C_MUTEX: Final = 8  # 64 bytes: pthread_mutex_t, initialised once for the life of the arena
C_ACQUIRED: Final = 16  # lock counters, written by the lock's holder
C_CONTENDED: Final = 17
C_WAITED_NS: Final = 18
C_RECOVERED: Final = 19  # times the lock came from a holder that had died
C_HOLDER: Final = 20  # session << 32 | pid of an explicit lock's holder, 0 when free

F_SERIALIZE: Final = 1
F_EXECUTABLE: Final = 2
F_PERSISTENT: Final = 4
F_GENERATE_EXCEPTIONS: Final = 8
F_FREE_ORPHANS: Final = 16
F_TAIL_CHECK: Final = 32
F_FREE_CHECK: Final = 64
TAIL: Final = b"\xab" * 16  # with F_TAIL_CHECK, clients end each block in these, the requested size so much larger

HEAP_INDEX_BITS: Final = 16
MAX_HEAPS: Final = 1 << 14  # arbitrary; 4 MiB of control blocks, committed as used

# -- page words ------------------------------------------------------------------------------------------------------
PAGE_FREE: Final = 0
PAGE_RESERVED: Final = 1
PAGE_COMMITTED: Final = 2

KIND_NONE: Final = 0
KIND_TABLE: Final = 1
KIND_SPARE: Final = 2  # in a region, part of no slab or run
KIND_SLAB: Final = 3
KIND_RUN: Final = 4

CHUNK_SHIFT: Final = 9
CHUNK_PAGES: Final = 1 << CHUNK_SHIFT  # pages whose words fill one page of the map
MAPPED: Final = 1 << 61  # directory entry: look in the page map
_START_MASK: Final = (1 << 40) - 1


def make_page_word(state: int, kind: int, heap: int, start: int) -> int:
    return state << 62 | kind << 56 | heap << 40 | start


class PageInfo(NamedTuple):
    """A page word taken apart: state (PAGE_*), kind (KIND_*), heap (control index), start (page index)."""

    state: int
    kind: int
    heap: int
    start: int


def split_page_word(word: int) -> PageInfo:
    return PageInfo(word >> 62, word >> 56 & 7, word >> 40 & 0xFFFF, word & _START_MASK)


# -- state words -----------------------------------------------------------------------------------------------------
FREE: Final = 0
CACHED: Final = 1
BUSY: Final = 2

SESSION_MASK: Final = (1 << 14) - 1  # sessions are numbered from 1 to this
SESSION_TABLE_SIZE: Final = (SESSION_MASK + 1) * WORD  # 128 KiB, committed as used


class WordFormat:
    """How a state word divides, given the bits of the requested size.

    Fields: size_bits, size_mask (also: the mark of a BUSY block of 0 bytes), generation_shift, generation_mask (of a
    generation).
    """

    __slots__ = ("generation_mask", "generation_shift", "size_bits", "size_mask")

    def __init__(self, size_bits: int) -> None:
        self.size_bits = size_bits
        self.size_mask = (1 << size_bits) - 1
        self.generation_shift = size_bits + 14
        self.generation_mask = (1 << 64 - self.generation_shift) - 1

    def free(self, generation: int) -> int:
        return generation << self.generation_shift

    def cached(self, session: int, generation: int) -> int:
        return generation << self.generation_shift | session << self.size_bits

    def busy(self, session: int, generation: int, size: int) -> int:
        return generation << self.generation_shift | session << self.size_bits | (size or self.size_mask)

    def state(self, word: int) -> int:
        if word & self.size_mask:
            return BUSY
        return CACHED if word >> self.size_bits & SESSION_MASK else FREE

    def session(self, word: int) -> int:
        return word >> self.size_bits & SESSION_MASK

    def generation(self, word: int) -> int:
        return word >> self.generation_shift

    def size(self, word: int) -> int:
        """Bytes requested, of a BUSY block's word."""
        size = word & self.size_mask
        return 0 if size == self.size_mask else size

    def next_generation(self, generation: int) -> int:
        """The one after; 0 is skipped, so that a handle of zeros never names a block."""
        return (generation + 1) & self.generation_mask or 1


SLAB_WORD: Final = WordFormat(17)
RUN_WORD: Final = WordFormat(36)
MAX_BLOCK_SIZE: Final = 64 * GIB - 2  # what 36 bits hold, less the mark of 0 bytes

SLAB_MAGIC: Final = int.from_bytes(b"SLAB", "little")


def slab_descriptor(class_index: int) -> int:
    return SLAB_MAGIC << 32 | class_index


def slab_class_index(descriptor: int) -> int | None:
    """The class index in a slab's descriptor word, None if the word is none."""
    return descriptor & 0xFFFF if descriptor >> 32 == SLAB_MAGIC else None


# -- where the tables are --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ArenaShape:
    """Where each table of an arena of `page_count` pages lies; follows from the two figures in the header, once.

    Fields: page_count (pages), heap_limit (control blocks).
    """

    page_count: int
    heap_limit: int = MAX_HEAPS

    @cached_property
    def size(self) -> int:
        """Bytes of the arena."""
        return self.page_count << PAGE_SHIFT

    @cached_property
    def controls(self) -> int:
        """Address of the first control block."""
        return PAGE_SIZE

    @cached_property
    def sessions(self) -> int:
        """Address of the session word of number 0, which no session has."""
        return align_up(self.controls + self.heap_limit * CONTROL_SIZE, PAGE_SIZE)

    @cached_property
    def directory(self) -> int:
        """Address of the page directory, one word a chunk."""
        return self.sessions + SESSION_TABLE_SIZE

    @cached_property
    def chunk_count(self) -> int:
        return (self.page_count + CHUNK_PAGES - 1) >> CHUNK_SHIFT

    @cached_property
    def page_map(self) -> int:
        """Address of the page map, one word a page."""
        return self.directory + align_up(self.chunk_count * WORD, PAGE_SIZE)

    @cached_property
    def run_words(self) -> int:
        """Address of the run words, one a page."""
        return self.page_map + self.chunk_count * PAGE_SIZE

    @cached_property
    def first_page(self) -> int:
        """First page that regions may use; the first of a chunk, so that tables and regions share none."""
        end = (self.run_words >> PAGE_SHIFT) + self.chunk_count
        return align_up(end, CHUNK_PAGES)

    @cached_property
    def first_slab_slot(self) -> int:
        """The first slot that is not in the tables; a run's word lies below it, a slab block's not."""
        return self.first_page * (PAGE_SIZE // WORD)

    @cached_property
    def first_run_slot(self) -> int:
        """Slot of the run word of page 0."""
        return self.run_words // WORD

    def control_slot(self, index: int) -> int:
        """Slot of the first word of control block `index`."""
        return (self.controls + index * CONTROL_SIZE) // WORD

    def session_slot(self, number: int) -> int:
        """Slot of the word of session `number`."""
        return self.sessions // WORD + number

    def mutex_address(self, index: int) -> int:
        return self.controls + index * CONTROL_SIZE + C_MUTEX * WORD

    def run_slot(self, page: int) -> int:
        """Slot of the state word of the run that begins at `page`."""
        return self.first_run_slot + page

    def is_run_slot(self, slot: int) -> bool:
        return slot < self.first_slab_slot

    def word_format(self, slot: int) -> WordFormat:
        return RUN_WORD if slot < self.first_slab_slot else SLAB_WORD


def page_word(words: memoryview, shape: ArenaShape, page: int) -> int:
    """The page word of `page`, read without touching an uncommitted page of the map.

    Args:    words (the arena as a memoryview of format "Q"), page (page index, 0 <= page < shape.page_count).
    """
    entry: int = words[shape.directory // WORD + (page >> CHUNK_SHIFT)]
    return words[shape.page_map // WORD + page] if entry == MAPPED else entry


# -- handles ---------------------------------------------------------------------------------------------------------
_HANDLE = struct.Struct("<16sQQQ")
HandleFormatError: Final = struct.error  # what `unpack_handle` raises for bytes that are too many or too few
unpack_handle: Final = _HANDLE.unpack
_pack_handle: Final = _HANDLE.pack


class Handle(NamedTuple):
    """Names a block across processes; picklable, and 40 bytes through `encode`.

    Fields:
        instance    16 bytes: the arena's identity
        slot        of the block's state word
        address     of the payload's first byte
        generation  of the block when the handle was made; another one in the state word means the handle is stale
    """

    instance: bytes
    slot: int
    address: int
    generation: int

    def encode(self) -> bytes:
        """Raises: InvalidArgumentError if it was made by hand, and its fields are not what they should be."""
        instance, slot, address, generation = self
        try:
            return _pack_handle(instance, slot, address, generation)
        except HandleFormatError:
            raise InvalidArgumentError("a handle is 16 bytes and three numbers from 0 to 2**64 - 1") from None

    @classmethod
    def decode(cls, data: bytes) -> Handle:
        """Raises: InvalidArgumentError if `data` is not the 40 bytes of a handle."""
        try:
            return tuple.__new__(cls, _HANDLE.unpack(data))
        except (HandleFormatError, TypeError):
            told = f"{len(data)}" if isinstance(data, (bytes, bytearray)) else type(data).__name__
            raise InvalidArgumentError(f"a handle is {_HANDLE.size} bytes, not {told}") from None
