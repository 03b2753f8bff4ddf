"""The slabs of one heap: which of them gives the next block of a class, and how they come, shrink and go."""

from __future__ import annotations

from bisect import insort
from contextlib import suppress
from typing import Final

from heapd.arena import Arena
from heapd.errors import HeapFullError
from heapd.heap.slab import Slab
from heapd.heap.space import Space
from heapd.journal import BLOCK_SHIFT, NO_SLAB, SLAB, SLAB_CUT
from heapd.layout import KIND_SLAB
from heapd.sizeclass import CLASSES, HOLLOW_EXTENT, SizeClass

__all__ = ["SlabPool"]

_LONG_SLAB: Final = 4  # pages; making a slab this long for one block costs more than a block of the next class
_MAX_STRETCH: Final = 2  # where memory is short, a block may have room for so many times what was asked for
_PARKED_PAGES: Final = 4  # arbitrary: what an empty slab may keep committed


class SlabPool:
    """Slabs on the spare pages of a space.

    Fields: slabs (first page -> Slab), at (called with a page: the slab that it is part of, or None), partial (for each
    class its slabs with a block to give, lowest address first: so blocks gather in few slabs and others empty).
    """

    def __init__(self, arena: Arena, index: int, space: Space) -> None:
        """Args: index (of the heap's control block), space (the heap's)."""
        self.slabs: dict[int, Slab] = {}
        self.partial: list[list[Slab]] = [[] for _ in CLASSES]
        self._arena = arena
        self._index = index
        self._space = space
        self._note = arena.journal.note
        self._of_page: dict[int, Slab] = {}
        self.at = self._of_page.get
        self._parked: dict[int, Slab] = {}  # class index -> a slab that was left empty, and may be in use again

    def add(self, slab: Slab) -> None:
        """Have the slab that an earlier process had; the caller adds them in order of their addresses."""
        self.slabs[slab.first_page] = slab
        self._of_page.update(dict.fromkeys(range(slab.first_page, slab.first_page + slab.page_count), slab))
        if not slab.is_full:
            self.partial[slab.kind.index].append(slab)
        if not slab.lent_count:
            self._parked[slab.kind.index] = slab

    def clear(self) -> None:
        """Forget all of them: their pages are gone."""
        self.slabs.clear()
        self.partial.clear()
        self._of_page.clear()

    @property
    def largest_free(self) -> int:
        """Bytes of the largest free block."""
        return max((slab.kind.extent for slabs in self.partial for slab in slabs if slab.free), default=0)

    # -- blocks ------------------------------------------------------------------------------------------------------
    def lend(self, kind: SizeClass, session: int) -> tuple[Slab, int]:
        """Give out a block of the class, or of a larger one: its slab and index. Raises: HeapFullError."""
        partial = self.partial[kind.index]
        slab = partial[0] if partial and partial[0].free else self._with_room(kind)
        index = slab.lend(session)
        if slab.lent_count == slab.block_count:
            self.partial[slab.kind.index].remove(slab)
        self._note(slab.first_page << BLOCK_SHIFT | index)
        return slab, index

    def take_back(self, slab: Slab, index: int) -> int:
        """Have a lent block back; the session it was lent to."""
        if slab.is_full:
            insort(self.partial[slab.kind.index], slab)
        session = slab.take_back(index)
        self._note(~(slab.first_page << BLOCK_SHIFT | index))
        if not slab.lent_count:
            self._park(slab)
        elif slab.kind.extent >= HOLLOW_EXTENT:
            self._hollow_out(slab)
        return session

    def _with_room(self, kind: SizeClass) -> Slab:
        """A slab that can give a block for the class: one with a free block, or a hollow one, whose pages are committed
        now; else with pages to carve, else one of the next larger class with a free block, else a new one; where there
        is no memory for that, one of any larger class whose blocks are not too large. Raises: HeapFullError."""
        partial = self.partial[kind.index]
        if not partial and kind.page_count >= _LONG_SLAB:
            larger = self.partial[kind.index + 1]
            if larger and larger[0].free:
                return larger[0]
        try:
            slab = partial[0] if partial else self._make(kind)
            if slab.hollow and not slab.free:
                self._fill(slab)
            if not slab.free:
                # Of the slabs with room at most one or two still have pages to carve.
                if len(partial) > 1 and partial[1].free:
                    return partial[1]
                touched, needed = slab.pages_touched if slab.carved else 1, slab.pages_until(slab.carved + 1)
                if needed > touched:
                    self._commit(slab, touched, needed)
        except HeapFullError:
            other = self._ready(kind)
            if other is None:
                raise
            return other
        return slab

    def _ready(self, kind: SizeClass) -> Slab | None:
        """A slab that needs no other pages to give a block for the class, or for one up to twice as large."""
        for larger in CLASSES[kind.index :]:
            if larger.extent > _MAX_STRETCH * kind.extent:
                return None
            for slab in self.partial[larger.index]:
                if slab.is_ready:
                    return slab
                if slab.hollow:
                    with suppress(HeapFullError):
                        self._fill(slab)
                        return slab
        return None

    def _fill(self, slab: Slab) -> None:
        """Commit the pages of a hollow block, so that it can be given out. Raises: HeapFullError, nothing changed."""
        first, page_count = slab.own_pages(slab.hollow[-1])
        self._space.commit(first, page_count)
        self._arena.describe(first, page_count, KIND_SLAB, self._index, slab.first_page)
        slab.free.append(slab.hollow.pop())

    def _hollow_out(self, slab: Slab) -> None:
        """Decommit the pages that the block taken back last had to itself."""
        self._space.decommit_in_slab(*slab.own_pages(slab.free[-1]), slab.first_page)
        slab.hollow.append(slab.free.pop())

    # -- slabs -------------------------------------------------------------------------------------------------------
    def _make(self, kind: SizeClass) -> Slab:
        first, page_count = self._take_for(kind)
        slab = Slab(kind, first, page_count)
        try:
            self._space.commit(first, 1)
        except HeapFullError:
            self._space.give(first, page_count)
            raise
        # A slab that was dropped to make room for this one may have lain here.
        self._arena.journal.withdraw(slab.slot - 1, slab.slot + kind.block_count)
        slab.write_head(self._arena.words, self._arena.next_seed())
        # Pages that were committed before stay so; the page map tells which.
        self._arena.describe(first, page_count, KIND_SLAB, self._index, first)
        self._note((SLAB, self._index, first, page_count, kind.index, 0, b""))
        self.slabs[first] = slab
        self._of_page.update(dict.fromkeys(range(first, first + page_count), slab))
        insort(self.partial[kind.index], slab)
        return slab

    def _take_for(self, kind: SizeClass) -> tuple[int, int]:
        """Spare pages for a slab, as (first, count): as many as its class's have, or what there is of them that holds
        a block. Raises: HeapFullError."""
        try:
            return self.take_pages(kind.page_count), kind.page_count
        except HeapFullError:
            block_count = kind.blocks_in(self._space.spare.largest)
            if not block_count:
                raise
            page_count = kind.pages_of(block_count)
            return self._space.take(page_count), page_count

    def _commit(self, slab: Slab, touched: int, needed: int) -> None:
        first = slab.first_page + touched
        try:
            self._space.commit(first, needed - touched)
        except HeapFullError:
            if not slab.lent_count:
                self._drop(slab)
            raise
        self._arena.describe(first, needed - touched, KIND_SLAB, self._index, slab.first_page)

    def _park(self, slab: Slab) -> None:
        """Keep an empty slab if it is a small one and its class's only slab with room, else drop it. Making one costs
        as much as five allocations, and a program that allocates and frees in turn would make one each time."""
        if len(self.partial[slab.kind.index]) == 1 and slab.pages_touched <= _PARKED_PAGES:
            self._parked[slab.kind.index] = slab
        else:
            self._drop(slab)

    def drop_empty(self) -> bool:
        """Give the pages of slabs without any block back; False if there was none."""
        parked = [slab for slab in self._parked.values() if not slab.lent_count]
        self._parked.clear()
        for slab in parked:
            if self.slabs.get(slab.first_page) is slab:
                self._drop(slab)
        return bool(parked)

    def take_pages(self, page_count: int) -> int:
        """Spare pages, if need be also those that slabs have and do not use. Raises: HeapFullError."""
        try:
            return self._space.take(page_count)
        except HeapFullError:
            if not self.drop_empty() | self._cut():
                raise
            return self._space.take(page_count)

    def _cut(self) -> bool:
        """Give back the pages behind the last block that is lent of each slab; False if there were none."""
        found = [slab for slabs in self.partial for slab in slabs if slab.pages_in_use < slab.page_count]
        for slab in found:
            keep = slab.pages_in_use
            first, page_count = slab.first_page + keep, slab.page_count - keep
            slab.cut(keep)
            if slab.is_full:
                self.partial[slab.kind.index].remove(slab)
            self._note((SLAB_CUT, slab.first_page, slab.page_count))
            self._give_pages(first, page_count)
        return bool(found)

    def _drop(self, slab: Slab) -> None:
        """Give an empty slab's pages back."""
        self.partial[slab.kind.index].remove(slab)
        del self.slabs[slab.first_page]
        self._note((NO_SLAB, slab.first_page))
        self._arena.words[slab.slot - 1] = 0  # at once: these pages may be taken again before the journal commits
        self._give_pages(slab.first_page, slab.page_count)

    def _give_pages(self, first: int, page_count: int) -> None:
        for page in range(first, first + page_count):
            del self._of_page[page]
        self._space.give(first, page_count)
