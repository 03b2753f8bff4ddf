"""What each session has of one heap, in bytes: charged when a block is lent, until it is back.

Who is charged is a private record (`Slab.lent`, `Heap.borrowers`), not the state word: the session that the daemon lent
the block to, wherever it went since. Blocks wander: one session allocates, another frees, caches and allocates again.
`recount` has each block count for the session that its word names; a word can lie, but only about who is charged. No
ledger needs to know: who restores the records of a heap charges its blocks to NOBODY, and then counts those anew.
"""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator
from typing import TYPE_CHECKING, Final

from heapd.layout import RUN_WORD, SESSION_MASK, SLAB_WORD
from heapd.units import PAGE_SHIFT

if TYPE_CHECKING:
    from heapd.heap.heap import Heap
    from heapd.heap.slab import Slab

__all__ = ["NOBODY", "Holdings", "recount"]

NOBODY: Final = SESSION_MASK + 1  # is charged with what sessions that ended left behind; the number of no session
_BLOCKS_A_SLICE: Final = 5_000


class Holdings:
    """Bytes of extents by session number."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes: dict[int, int] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._bytes.items())

    def of(self, session: int) -> int:
        return self._bytes.get(session, 0)

    def charge(self, session: int, size: int) -> None:
        """Add `size` bytes, which may be negative."""
        held = self._bytes.get(session, 0) + size
        if held:
            self._bytes[session] = held
        else:
            self._bytes.pop(session, None)

    def clear(self) -> None:
        self._bytes.clear()


def recount(heap: Heap, session: int, holders: Container[int], rest: int) -> Generator[None, None, None]:
    """Charge the blocks lent to `session` anew, yielding between slices: each to the one of `holders` that its word
    names, to `rest` where it names none of them."""
    seen = 0
    for slab in list(heap.slabs.values()):
        if session in slab.lent and heap.slabs.get(slab.first_page) is slab:
            _recount_slab(heap, slab, session, holders, rest)
            seen += slab.carved
        if seen >= _BLOCKS_A_SLICE:
            seen = 0
            yield
    for first in [first for first, borrower in heap.borrowers.items() if borrower == session]:
        if heap.borrowers.get(first) == session and first not in heap.unfinished:
            named = RUN_WORD.session(heap.arena.words[heap.arena.shape.run_slot(first)])
            heap.borrowers[first] = borrower = named if named in holders else rest
            _move(heap, session, borrower, heap.runs[first] << PAGE_SHIFT)


def _recount_slab(heap: Heap, slab: Slab, session: int, holders: Container[int], rest: int) -> None:
    for index, word in enumerate(heap.arena.words[slab.slot : slab.slot + slab.carved].tolist()):
        if slab.lent[index] == session:
            named = SLAB_WORD.session(word)
            slab.lent[index] = borrower = named if named in holders else rest
            _move(heap, session, borrower, slab.kind.extent)


def _move(heap: Heap, session: int, borrower: int, size: int) -> None:
    if borrower != session:
        heap.held.charge(session, -size)
        heap.held.charge(borrower, size)
