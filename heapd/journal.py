"""Changes of the daemon's private records, told by the layers that make them, so that somebody may write them down.

The journal is the one thing that arena, heaps and manager know of the ledger. They tell it what changed, in order, in
plain values; told again to empty records, the changes make the same records. Two things must wait until the changes
are written down, for a kill in between would show what was not recorded: the store of a word that takes a block back
(`store`, `restate`), and giving memory back (`later`). What goes the other way, a word that gives a block out or a
commit, comes before: an unrecorded one is taken back at recovery. This journal keeps nothing, and waits for nothing.

A change is an int or a tuple. An int n >= 0 says that a slab's block was lent, ~n that it was taken back:

    first page of the slab << BLOCK_SHIFT | index

A tuple begins with what it is. `heap` is always the index of a control block; the rest are sessions' numbers, pages,
slots, bytes as everywhere. They say what is now, never by how much: telling one twice changes nothing.

    PAGES      first, count, state                                      what the pages' state (PAGE_*) is now
    REGION     heap, serial, first, page_count, is_big                  a region is there, as it is now
    NO_REGION  heap, serial
    SLAB       heap, first, page_count, class_index, carved, lent       lent: which blocks are, as bits
    SLAB_CUT   first, page_count                                        a slab has only so many pages now
    NO_SLAB    first
    RUN        heap, first, page_count, is_finished                     is_finished 0: its commit goes on
    NO_RUN     heap, first
    WORD       slot, word                                               a state word that is stored after this
    HEAP       heap, heap_id, name, flags, creator, is_default, maximum, max_block, initial (pages), initial (bytes),
               quota
    NO_HEAP    heap
    COUNTS     heap, allocations, releases
    EPOCH      heap, epoch                                              also of control blocks without a heap
    JOIN       number, heap_id                                          a session has the heap open
    LEAVE      number, heap_id                                          ... has closed it; blocks may be left
    NAME       heap, name, slot, address, generation
    NO_NAME    heap, name
    OWNERS     heap, [number, ...]                                      ended sessions with blocks, at the last scan
    SESSION    number, token, pid, uid, start_time, opened_ns
    ENDING     number                                                   its end began
    ENDED      number                                                   ... and is done; blocks may be left
    RETIRED    number                                                   the number is free again
    PENDING    ticket, heap, heap_id, address, generation               a block for a request that is not answered yet
    DONE       ticket                                                   ... which it is now, or never will be
    WHOLE      peak (bytes), last session number given, next serial of a heap     ends a retelling
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

__all__ = ["BLOCK_SHIFT", "Change", "Journal"]

BLOCK_SHIFT: Final = 14  # a slab has at most 8,192 blocks

PAGES: Final = 1
REGION: Final = 2
NO_REGION: Final = 3
SLAB: Final = 4
SLAB_CUT: Final = 5
NO_SLAB: Final = 6
RUN: Final = 7
NO_RUN: Final = 8
WORD: Final = 9
HEAP: Final = 10
NO_HEAP: Final = 11
COUNTS: Final = 12
EPOCH: Final = 13
JOIN: Final = 14
LEAVE: Final = 15
NAME: Final = 16
NO_NAME: Final = 17
OWNERS: Final = 18
SESSION: Final = 19
ENDING: Final = 20
ENDED: Final = 21
RETIRED: Final = 22
PENDING: Final = 23
DONE: Final = 24
WHOLE: Final = 25

Change = int | tuple[Any, ...]


def _forget(change: Change) -> None:
    pass


class Journal:
    """Writes nothing down. Args: words (the arena as "Q"). Fields: note (to be called with each change made)."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self.note: Callable[[Change], object] = _forget

    def store(self, slot: int, word: int) -> None:
        """Store a word that says less than the one there; recovery does it by itself, knowing the records."""
        self._words[slot] = word

    def restate(self, slot: int, word: int) -> None:
        """Store a word that recovery could not know."""
        self._words[slot] = word

    def withdraw(self, first: int, end: int) -> None:
        """Store none of the words that wait for these slots (`end` is the first after them): they are used anew."""

    def later(self, action: Callable[[], object]) -> None:
        """Do what makes bytes vanish."""
        action()

    def hasten(self) -> None:
        """Do now what waits, for its memory is needed. A request that takes memory has taken no block back before:
        what waits is of empty slabs, or of ranges that were released by earlier requests."""
