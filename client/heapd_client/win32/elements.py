"""What a heap consists of, as HeapWalk and Toolhelp tell it: the entries of a walk, in Windows' terms.

Windows knows regions, blocks, free blocks and uncommitted ranges. So here free bytes that touch are one element
whoever caches them, and slab heads belong to none. A large block, which has a region of its own underneath, is told
as a block in no region, after all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from heapd.layout import WORD
from heapd.records import Entry, EntryKind

__all__ = ["NO_REGION", "Element", "Kind", "after", "elements"]

NO_REGION: Final = -1
_MAX_OVERHEAD: Final = 255  # of a BYTE


class Kind:
    """What an element is."""

    REGION: Final = 1
    BUSY: Final = 2
    FREE: Final = 3
    UNCOMMITTED: Final = 4


_KIND_OF: Final = {
    EntryKind.BUSY: Kind.BUSY,
    EntryKind.FREE: Kind.FREE,
    EntryKind.CACHED: Kind.FREE,
    EntryKind.UNCOMMITTED: Kind.UNCOMMITTED,
}


class Element(NamedTuple):
    """Fields: kind (Kind.*), address, size (bytes; of a busy block as asked for), extent (bytes), overhead (bytes, at
    most 255), region (index, NO_REGION), committed (bytes, of a region), generation (of a busy block)."""

    kind: int
    address: int
    size: int
    extent: int
    overhead: int
    region: int
    committed: int = 0
    generation: int = 0

    @property
    def end(self) -> int:
        return self.address + self.extent


def elements(entries: Iterator[Entry], tail: int = 0) -> Iterator[Element]:
    """The elements of a heap from the entries of its walk. `tail`: bytes of filler behind each block."""
    pending: Element | None = None  # free or uncommitted, and may go on
    is_large = False
    for entry in entries:
        if entry.kind is EntryKind.REGION:
            is_large = entry.is_run
        element = _element(entry, is_large, tail)
        if pending is not None and element is not None and _continues(pending, element):
            size = pending.size + element.size
            pending = pending._replace(size=size, extent=size)
            continue
        if pending is not None:
            yield pending
        pending = None
        if element is not None and element.kind in (Kind.FREE, Kind.UNCOMMITTED):
            pending = element
        elif element is not None:
            yield element
    if pending is not None:
        yield pending


def _element(entry: Entry, is_large: bool, tail: int) -> Element | None:
    """What an entry is on its own; None if it is no element."""
    if is_large:
        if entry.kind is not EntryKind.BUSY:
            return None  # its region, the rest of its last 64 KiB, or a large block that is cached
        size = entry.size - tail
        return Element(Kind.BUSY, entry.address, size, entry.extent, 0, NO_REGION, 0, entry.generation)
    if entry.kind is EntryKind.REGION:
        return Element(Kind.REGION, entry.address, entry.size, entry.extent, 0, entry.region, entry.committed)
    kind = _KIND_OF.get(entry.kind)
    if kind is None:
        return None
    if kind == Kind.BUSY:
        size = entry.size - tail
        overhead = min(entry.extent - size + WORD, _MAX_OVERHEAD)  # what it does not use, and its state word
        return Element(kind, entry.address, size, entry.extent, overhead, entry.region, 0, entry.generation)
    return Element(kind, entry.address, entry.extent, entry.extent, 0, entry.region)


def _continues(pending: Element, element: Element) -> bool:
    return (element.kind, element.region, element.address) == (pending.kind, pending.region, pending.end)


def after(found: Iterator[Element], address: int, was_region: bool) -> Iterator[Element]:
    """The elements after the one that was told last, at `address`; also if it is not there any more."""
    is_inside = False
    for element in found:
        begins = element.kind == Kind.REGION or element.region == NO_REGION
        if begins and is_inside:
            break
        if begins:
            is_inside = element.address <= address < element.end
        elif is_inside and (element.address > address or (was_region and element.address == address)):
            break
    else:
        return
    yield element
    yield from found
