"""A bin of a front end: the cached blocks of one extent, which is a size class's or a number of pages.

It is filed under a key: the class's index, or LARGE and the pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from heapd.layout import RUN_WORD, SLAB_WORD
from heapd.sizeclass import CLASSES, MAX_CLASS_SIZE, class_index
from heapd.units import KIB, MIB, PAGE_SHIFT, pages_for

from .block import Block
from .stream import Stream

__all__ = ["LARGE", "MAX_LEASE", "Bin", "key_of"]

LARGE: Final = 1 << 16  # keys from here on are of runs over 64 KiB
MAX_LEASE: Final = 16 * MIB  # bytes; the daemon commits no more in one turn
# Arbitrary, chosen by scripts/bench alloc, frames and trace; see also frontend.py.
_FREE_LEASE: Final = 8 * KIB  # a batch doubles up to this many bytes, whatever was leased before;
_SHARE: Final = 8  # beyond, it is this part of the blocks that the bin leased so far
_MAX_BATCH: Final = 512


def key_of(size: int) -> int:
    """The key of the bin for blocks of `size` bytes; an extent gives that of the blocks that occupy it."""
    return class_index(size) if size <= MAX_CLASS_SIZE else LARGE + pages_for(size)


class Bin:
    """Cached blocks of one extent.

    Fields: key, extent (bytes), form (of its state words), stack (cached blocks, freed last on top), limit (blocks at
    which free asks), batch (of the last lease), leased (blocks, so far), emptied (times since the last spare), spares
    (blocks), stream (what the hot path takes blocks from; None: the stack); block_type, set_limit and take_count (see
    hotpath).
    """

    __slots__ = (
        "batch",
        "block_type",
        "emptied",
        "extent",
        "form",
        "key",
        "leased",
        "limit",
        "set_limit",
        "spares",
        "stack",
        "stream",
        "take_count",
    )

    def __init__(self, key: int) -> None:
        self.key = key
        if key >= LARGE:
            self.extent, self.form = (key - LARGE) << PAGE_SHIFT, RUN_WORD
        else:
            kind = CLASSES[key]
            self.extent, self.form = kind.extent, RUN_WORD if kind.is_run else SLAB_WORD
        self.stack: list[Any] = []
        self.stream: Stream | None = None
        self.block_type: type[Block] = Block
        self.set_limit: Callable[[int], None] = lambda blocks: None
        self.take_count: Callable[[], int] = lambda: 0
        self.limit = 0
        self.batch = 0
        self.leased = 0
        self.emptied = 0
        self.spares = 0

    @property
    def is_large(self) -> bool:
        return self.key >= LARGE

    @property
    def cached(self) -> int:
        """Bytes in the bin."""
        return len(self.stack) * self.extent

    @property
    def claimed(self) -> int:
        """Bytes in the bin, or that free may fill it with before it asks."""
        return max(len(self.stack), self.limit) * self.extent

    def may_replace(self, smaller: Bin) -> bool:
        """Whether blocks of this bin do for a smaller one: those of runs begin on a page, those of slabs do not."""
        return self.form is RUN_WORD or smaller.form is SLAB_WORD

    def next_batch(self) -> int:
        """How many blocks to lease now, if there is room for them."""
        doubled = min(self.batch * 2, _FREE_LEASE // self.extent)
        wanted = max(doubled, self.leased // _SHARE, 1)
        return min(wanted, _MAX_BATCH, max(MAX_LEASE // self.extent, 1))

    def set(self, limit: int) -> None:
        self.limit = limit
        self.set_limit(limit)
