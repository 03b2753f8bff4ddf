"""A heap as its clients share it: id, name, flags, control block, who has it open, what is published in it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field

from heapd.arena import Arena
from heapd.errors import LimitError
from heapd.heap import Heap
from heapd.journal import EPOCH, HEAP, Change
from heapd.layout import (
    C_ACQUIRED,
    C_CONTENDED,
    C_FLAGS,
    C_HEAP_ID,
    C_HOLDER,
    C_LIVE,
    C_MUTEX,
    C_RECOVERED,
    C_WAITED_NS,
    F_FREE_ORPHANS,
    F_PERSISTENT,
    HEAP_INDEX_BITS,
    WORD,
)
from heapd.mutex import fault, init, make_ready
from heapd.records import HeapInfo, Violation
from heapd.units import PAGE_SHIFT

__all__ = ["Controls", "SharedHeap"]

_INDEX_MASK = (1 << HEAP_INDEX_BITS) - 1


@dataclass(slots=True, eq=False)
class SharedHeap:
    """Fields: heap_id, name, flags (F_*), heap, creator (session number), is_default, openers (session numbers),
    names (name -> (slot, address, generation)), orphan_owners (ended sessions that had blocks at the last scan),
    is_destroyed, quota (bytes that one session may have of it, 0: no limit of its own), initial (bytes committed when
    it was made)."""

    heap_id: int
    name: str | None
    flags: int
    heap: Heap
    creator: int
    is_default: bool
    openers: set[int] = field(default_factory=set)
    names: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    orphan_owners: set[int] = field(default_factory=set)
    is_destroyed: bool = False
    quota: int = 0
    initial: int = 0

    def change(self) -> Change:
        """What the journal is told of a heap that is made."""
        heap = self.heap
        return (
            HEAP,
            self.index,
            self.heap_id,
            self.name,
            self.flags,
            self.creator,
            self.is_default,
            heap.maximum,
            heap.max_block,
            heap.space.initial,
            self.initial,
            self.quota,
        )

    @property
    def index(self) -> int:
        return self.heap_id & _INDEX_MASK

    @property
    def is_persistent(self) -> bool:
        return bool(self.flags & F_PERSISTENT)

    @property
    def frees_orphans(self) -> bool:
        return bool(self.flags & F_FREE_ORPHANS)

    def info(self, epoch: int, creator_is_live: bool) -> HeapInfo:
        return HeapInfo(
            heap_id=self.heap_id,
            name=self.name,
            flags=self.flags,
            maximum=self.heap.maximum,
            max_block=self.heap.max_block,
            epoch=epoch,
            base=next(iter(self.heap.space.regions.values())).first << PAGE_SHIFT,
            creator=self.creator if creator_is_live else 0,
            is_default=self.is_default,
            sessions=len(self.openers),
            session_quota=self.quota,
        )


class Controls:
    """The control blocks: which are in use; ids of heaps; live words. A block's mutex is initialised once, for good:
    its page is never punched, and a client may still hold it when the heap is gone. Epochs are counted in private: the
    live word is there for others to read."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._limit = arena.shape.heap_limit
        self._unused: list[int] = []  # given back, most recent last
        self._next_index = 0
        self._next_serial = 1
        self._epochs: list[int] = []  # by index, over all the heaps that used the control block
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(arena.segment.mapping))

    def take(self) -> int:
        """A new heap id; its control block's index is in the low 16 bits. Raises: LimitError, HeapFullError."""
        for position, index in enumerate(self._unused):
            if make_ready(self._mutex(index)):
                del self._unused[position]
                break
        else:
            index = self._next_index
            if index >= self._limit:
                raise LimitError(f"the arena has {self._limit} heaps, its limit; destroy some", limit=self._limit)
            self._arena.prepare_control(index)
            init(self._mutex(index))
            self._next_index += 1
            self._epochs.append(0)
            self._set_epoch(index, 0)
        heap_id = self._next_serial << HEAP_INDEX_BITS | index
        self._next_serial += 1
        return heap_id

    @property
    def next_serial(self) -> int:
        """Of the next heap's id."""
        return self._next_serial

    @property
    def epochs(self) -> list[int]:
        """Of every control block that was ever used, by index."""
        return self._epochs

    def restore(self, epochs: list[int], next_serial: int, heap_flags: dict[int, int]) -> None:
        """Take over the control blocks of an earlier process; what they say is written anew, but for mutexes and their
        counters. Args: epochs (by index), heap_flags (heap id -> F_*, of the heaps there are)."""
        self._epochs = list(epochs)
        self._next_index = len(epochs)
        self._next_serial = next_serial
        used = {heap_id & _INDEX_MASK: heap_id for heap_id in heap_flags}
        words = self._arena.words
        for index in range(self._next_index):
            slot, heap_id = self._arena.shape.control_slot(index), used.get(index, 0)
            words[slot + C_HEAP_ID] = heap_id
            words[slot + C_FLAGS] = heap_flags.get(heap_id, 0)
            words[slot + C_LIVE] = epochs[index] << 1 | (heap_id > 0)
        self._unused = [index for index in range(self._next_index) if index not in used]

    def was_used(self, heap_id: int) -> bool:
        """True if a heap of that id was made at some time."""
        return 0 < heap_id >> HEAP_INDEX_BITS < self._next_serial

    def activate(self, heap_id: int, flags: int) -> None:
        """Fill in the control block; the live word comes last. Counters start at zero."""
        words, slot = self._arena.words, self._slot(heap_id)
        words[slot + C_HEAP_ID] = heap_id
        words[slot + C_FLAGS] = flags
        for counter in (C_ACQUIRED, C_CONTENDED, C_WAITED_NS, C_RECOVERED, C_HOLDER):
            words[slot + counter] = 0
        self.bump(heap_id)

    def epoch(self, heap_id: int) -> int:
        return self._epochs[heap_id & _INDEX_MASK]

    def bump(self, heap_id: int) -> None:
        """Make every front end look up at its next operation."""
        self._set_epoch(heap_id & _INDEX_MASK, self.epoch(heap_id) + 1)
        self._arena.words[self._slot(heap_id) + C_LIVE] = self.epoch(heap_id) << 1 | 1

    def _set_epoch(self, index: int, epoch: int) -> None:
        self._epochs[index] = epoch
        self._arena.journal.note((EPOCH, index, epoch))

    def release(self, heap_id: int) -> None:
        """The heap is gone: its live word says so first."""
        words, slot = self._arena.words, self._slot(heap_id)
        self._set_epoch(heap_id & _INDEX_MASK, self.epoch(heap_id) + 1)
        words[slot + C_LIVE] = self.epoch(heap_id) << 1
        words[slot + C_HEAP_ID] = 0
        self._unused.append(heap_id & _INDEX_MASK)

    def violations(self, heap_id: int, flags: int) -> Iterator[Violation]:
        """What a heap's control block says wrong."""
        words, slot = self._arena.words, self._slot(heap_id)
        address = slot * WORD
        if words[slot + C_HEAP_ID] != heap_id:
            detail = f"the control block names heap {words[slot + C_HEAP_ID]}, not {heap_id}"
            yield Violation("control-block", address, 0, detail)
        if words[slot + C_LIVE] != self.epoch(heap_id) << 1 | 1:
            detail = f"the live word is {words[slot + C_LIVE]:#x}; the heap lives, in epoch {self.epoch(heap_id)}"
            yield Violation("control-block", address, 0, detail)
        if words[slot + C_FLAGS] != flags:
            detail = f"the flags are {words[slot + C_FLAGS]:#x}, the heap was made with {flags:#x}"
            yield Violation("control-block", address, 0, detail)
        if detail := fault(self._mutex(heap_id & _INDEX_MASK)):
            yield Violation("mutex", address + C_MUTEX * WORD, 0, detail)

    def abandon(self, heap_id: int) -> None:
        """Give back an id that `take` gave and no heap came to use."""
        self._unused.append(heap_id & _INDEX_MASK)

    def _slot(self, heap_id: int) -> int:
        return self._arena.shape.control_slot(heap_id & _INDEX_MASK)

    def _mutex(self, index: int) -> int:
        """Pointer to the mutex of control block `index`. Nothing here ever takes one."""
        return self._base + self._arena.shape.mutex_address(index)
