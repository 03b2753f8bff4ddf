"""Size classes of small blocks and the geometry of their slabs: pure tables, shared by back end and front end.

A request of up to 64 KiB is rounded up to a class: 16, 32, 48, then multiples of 64 B with steps of at most 1/8. So
payloads are 16-byte aligned, and 64-byte aligned from 64 B up. A class that is a multiple of the page size is served
as a *run* of whole pages (page-aligned); any other is cut from a *slab*. A request that is itself a multiple of
4 KiB is therefore page-aligned.

Why not every block from 4 KiB up: rounding to pages costs 62 % on recorded traces (sqlite's cache pages are 4,368 B);
these classes cost 7.5 % there.
"""

from __future__ import annotations

from dataclasses import dataclass

from heapd.units import KIB, PAGE_SIZE, align_up, pages_for

__all__ = ["CLASSES", "CLASS_COUNT", "HOLLOW_EXTENT", "MAX_CLASS_SIZE", "SizeClass", "class_index", "class_of"]

MAX_CLASS_SIZE = 64 * KIB
_STEPS_PER_DOUBLING = 8  # so that rounding up costs at most 1/8 of the request from 512 B up
_MAX_SLAB_PAGES = 32  # arbitrary: 128 KiB holds at least four of the largest slab class
_MAX_HOLLOW_PAGES = 64  # of slabs whose free blocks keep no pages, so that it matters less when they empty
HOLLOW_EXTENT = 2 * PAGE_SIZE  # from here up a block has a page to itself, wherever it lies
_WORD = 8


@dataclass(frozen=True, slots=True)
class SizeClass:
    """One size class.

    Fields:
        index         position in CLASSES
        extent        bytes a block occupies, the largest request of the class
        is_run        True: a block is a run of `page_count` pages; False: cut from a slab
        page_count    pages of the slab, or of the run
        block_count   blocks in a slab; 1 for a run
        first_offset  bytes from the slab's start to its first block; 0 for a run
    """

    index: int
    extent: int
    is_run: bool
    page_count: int
    block_count: int
    first_offset: int

    def blocks_in(self, page_count: int) -> int:
        """Blocks of a slab that has `page_count` pages, which may be fewer than the class's; its head is as long."""
        return min(max(page_count * PAGE_SIZE - self.first_offset, 0) // self.extent, self.block_count)

    def pages_of(self, block_count: int) -> int:
        """Pages that a slab's head and its first `block_count` blocks lie on."""
        return (self.first_offset + block_count * self.extent + PAGE_SIZE - 1) // PAGE_SIZE


def _extents() -> list[int]:
    extents = [16, 32, 48]
    base = 64
    while base < MAX_CLASS_SIZE:
        extents += range(base, 2 * base, max(base // _STEPS_PER_DOUBLING, 64))
        base *= 2
    return [*extents, MAX_CLASS_SIZE]


def _slab_shape(extent: int, page_count: int) -> tuple[int, int, int]:
    """(blocks, offset of the first, bytes of the pages touched when full) of a slab of `page_count` pages.

    The head is one descriptor word and one state word a block, rounded up to the blocks' alignment.
    """
    alignment = 64 if extent >= 64 else 16
    count = (page_count * PAGE_SIZE - _WORD) // (extent + _WORD)
    while align_up(_WORD + count * _WORD, alignment) + count * extent > page_count * PAGE_SIZE:
        count -= 1
    first = align_up(_WORD + count * _WORD, alignment)
    return count, first, pages_for(first + count * extent) * PAGE_SIZE


def _slab_class(index: int, extent: int) -> SizeClass:
    """The slab size that loses least when full; among near equals (1 %) the smallest, which empties soonest.

    The head stays within the first page, so that a class used once costs one page, or two for a block that
    does not fit beside the head.
    """
    best: tuple[float, int] | None = None
    longest = _MAX_SLAB_PAGES if extent < HOLLOW_EXTENT else _MAX_HOLLOW_PAGES
    for page_count in range(1, longest + 1):
        count, first, touched = _slab_shape(extent, page_count)
        if count < 4 or first + min(extent, 1024) > PAGE_SIZE:
            continue
        cost = touched / (count * extent)
        if best is None or cost < best[0] - 0.01:
            best = cost, page_count
    assert best is not None, extent
    count, first, touched = _slab_shape(extent, best[1])
    return SizeClass(index, extent, False, touched // PAGE_SIZE, count, first)


def _build() -> tuple[SizeClass, ...]:
    return tuple(
        SizeClass(index, extent, True, extent // PAGE_SIZE, 1, 0)
        if extent % PAGE_SIZE == 0
        else _slab_class(index, extent)
        for index, extent in enumerate(_extents())
    )


CLASSES: tuple[SizeClass, ...] = _build()
CLASS_COUNT = len(CLASSES)

# Class of each request in units of 16 bytes: _BY_UNIT[(size + 15) >> 4]; a bytes lookup beats bisect by 4 x.
_BY_UNIT = b"\0" + b"".join(
    bytes([entry.index]) * ((entry.extent - (CLASSES[entry.index - 1].extent if entry.index else 0)) // 16)
    for entry in CLASSES
)


def class_index(size: int) -> int:
    """Index of the smallest class that holds `size` bytes (0 <= size <= MAX_CLASS_SIZE)."""
    return _BY_UNIT[(size + 15) >> 4]


def class_of(size: int) -> SizeClass:
    """The smallest class that holds `size` bytes (0 <= size <= MAX_CLASS_SIZE)."""
    return CLASSES[_BY_UNIT[(size + 15) >> 4]]


def extent_of(size: int) -> int:
    """Bytes that a block of `size` bytes occupies: a class's extent, or whole pages."""
    return class_of(size).extent if size <= MAX_CLASS_SIZE else pages_for(size) * PAGE_SIZE
