"""A slab: a run of pages cut into equal blocks of one size class, their state words at its head.

The daemon's own truth about a block is `lent`: to whom it was given out, until it is taken back. What the state word
says meanwhile is the client's; it is checked, never trusted. Blocks are carved in address order, pages
committed as carving reaches them. Where pages are short, a slab has fewer than its class's: from its birth, or because
it is cut behind what is lent. Where each block lies stays the same, so nobody else need know.

A free block may be *hollow*: the pages that it has to itself are decommitted until it is given out again. Blocks of
many pages are few in a slab, and one that is lent keeps the slab; without this, a class's slabs would keep the memory
of the most blocks that were ever in use.
"""

from __future__ import annotations

from array import array

from heapd.heap.holdings import NOBODY
from heapd.layout import SLAB_WORD, WORD, slab_descriptor
from heapd.sizeclass import SizeClass
from heapd.units import PAGE_SHIFT, PAGE_SIZE

__all__ = ["Slab"]


class Slab:
    """Blocks of one class.

    Fields:
        kind          SizeClass
        first_page    of the slab
        page_count    pages it has, at most its class's
        block_count   blocks that fit on them
        base          address of block 0
        slot          of block 0's state word
        lent          for each block the session it was given out to (see holdings.py), 0 while it is not
        lent_count    how many that are
        carved        blocks whose pages are committed and that have been given out at least once
        free          indices of carved blocks that are not lent, most recently taken back last; but not of those
        hollow        whose own pages are decommitted
    """

    __slots__ = (
        "base",
        "block_count",
        "carved",
        "first_page",
        "free",
        "hollow",
        "kind",
        "lent",
        "lent_count",
        "page_count",
        "slot",
    )

    def __init__(self, kind: SizeClass, first_page: int, page_count: int) -> None:
        self.kind = kind
        self.first_page = first_page
        self.page_count = page_count
        self.block_count = kind.blocks_in(page_count)
        self.base = (first_page << PAGE_SHIFT) + kind.first_offset
        self.slot = (first_page << PAGE_SHIFT) // WORD + 1
        self.lent = array("H", bytes(2 * self.block_count))
        self.lent_count = 0
        self.carved = 0
        self.free: list[int] = []
        self.hollow: list[int] = []

    @classmethod
    def restore(cls, kind: SizeClass, first_page: int, page_count: int, carved: int, lent: bytearray) -> Slab:
        """The slab that an earlier process had. Args: lent (1 for each block that was; they are charged to NOBODY)."""
        slab = cls(kind, first_page, page_count)
        slab.lent_count = lent.count(1)
        if slab.is_full:
            slab.lent = array("H", (NOBODY,)) * slab.block_count
        else:
            slab.lent = array("H", (NOBODY if is_lent else 0 for is_lent in lent))
        slab.carved = carved
        if slab.lent_count < carved:
            slab.free = [index for index in range(carved - 1, -1, -1) if not lent[index]]
        return slab

    def rewrite_head(self, words: memoryview) -> None:
        """Make the head say what the records say: the descriptor, and free words for blocks that are not lent."""
        words[self.slot - 1] = slab_descriptor(self.kind.index)
        for index in self.free:
            word = words[self.slot + index]
            if SLAB_WORD.session(word) or SLAB_WORD.state(word):
                words[self.slot + index] = SLAB_WORD.free(SLAB_WORD.generation(word))

    def __lt__(self, other: Slab) -> bool:
        return self.first_page < other.first_page

    def write_head(self, words: memoryview, seed: int) -> None:
        """Write the descriptor and a free state word for each block; generations count on from `seed`."""
        kind = self.kind
        word = SLAB_WORD.free(seed & SLAB_WORD.generation_mask)
        # Also for the blocks that a short slab lacks: who comes with an old handle finds no nonsense.
        words[self.slot : self.slot + kind.block_count] = memoryview(array("Q", [word]) * kind.block_count)
        words[self.slot - 1] = slab_descriptor(kind.index)

    @property
    def is_full(self) -> bool:
        return self.lent_count == self.block_count

    @property
    def is_ready(self) -> bool:
        """Whether it can give a block without another page."""
        return bool(self.free) or (
            self.carved < self.block_count and self.pages_until(self.carved + 1) == self.pages_touched
        )

    @property
    def carved_end(self) -> int:
        """Address after the last block carved."""
        return self.base + self.carved * self.kind.extent

    @property
    def pages_touched(self) -> int:
        """Pages that head and carved blocks lie on: those are committed, the ones after them are not asked for yet."""
        return self.pages_until(self.carved)

    def pages_until(self, carved: int) -> int:
        """Pages that must be committed once `carved` blocks are carved."""
        return self.kind.pages_of(carved)

    @property
    def pages_in_use(self) -> int:
        """Pages up to the end of the last block that is lent."""
        end = self.carved
        while end and not self.lent[end - 1]:
            end -= 1
        return self.pages_until(end)

    def cut(self, page_count: int) -> None:
        """Do without the pages from `page_count` on; no block is lent there."""
        self.page_count = page_count
        self.block_count = self.kind.blocks_in(page_count)
        self.carved = min(self.carved, self.block_count)
        del self.lent[self.block_count :]
        self.free = [index for index in self.free if index < self.block_count]
        self.hollow = [index for index in self.hollow if index < self.block_count]

    def own_pages(self, index: int) -> tuple[int, int]:
        """The pages that a block shares with nothing, as (first, count)."""
        address = self.base + index * self.kind.extent
        first = (address + PAGE_SIZE - 1) >> PAGE_SHIFT
        return first, max((address + self.kind.extent >> PAGE_SHIFT) - first, 0)

    def index_of(self, address: int) -> int | None:
        """Index of the block that begins at `address`, None if none does."""
        index, rest = divmod(address - self.base, self.kind.extent)
        return index if rest == 0 and 0 <= index < self.block_count else None

    def lend(self, session: int) -> int:
        """Give out a block: the one taken back last, else the next to carve (its pages are committed). Its index."""
        if self.free:
            index = self.free.pop()
        else:
            index = self.carved
            self.carved += 1
        self.lent[index] = session
        self.lent_count += 1
        return index

    def take_back(self, index: int) -> int:
        """Have a block back; the session it was lent to."""
        session = self.lent[index]
        self.lent[index] = 0
        self.lent_count -= 1
        self.free.append(index)
        return session
