"""A heap's entries, region by region: what walk, statistics and pictures are built on.

The entries of a region tile it: REGION first, then blocks, free bytes, uncommitted ranges and overhead, without gap
or overlap. Nothing here touches an uncommitted page: reading one would commit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from heapd.heap.heap import Heap
from heapd.heap.slab import Slab
from heapd.heap.space import Region
from heapd.layout import BUSY, CACHED, RUN_WORD, SLAB_WORD
from heapd.records import Entry, EntryKind
from heapd.units import PAGE_SHIFT, PAGE_SIZE

__all__ = ["walk"]

# A cursor: bit 62 for a large run's region, its serial + 1 from bit 42, bytes from its base + 1 (0: its REGION entry).
_BIG_SHIFT = 62
_OFFSET_BITS = 42
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
_SERIAL_MASK = (1 << _BIG_SHIFT - _OFFSET_BITS) - 1

IsLive = Callable[[int], bool]


def walk(heap: Heap, cursor: int, limit: int, is_live: IsLive) -> tuple[list[Entry], int]:
    """About `limit` entries from `cursor` on, and the next cursor.

    Args:    cursor (0: from the start), limit (entries; a few more may come), is_live (session number -> bool, to tell
             orphaned blocks).
    Returns: the entries, and the cursor of the entry after them, 0 at the end. A heap that changes between two calls
             is walked as it is at each of them; a block that is there all the time is told exactly once.
    """
    if cursor == 0:
        heap.tidy()
    entries: list[Entry] = []
    regions = heap.space.in_order()
    at, offset = _find(regions, cursor)
    for index in range(at, len(regions)):
        region = regions[index]
        for entry in _region_entries(heap, region, index, offset, is_live):
            if len(entries) >= limit:
                offset = -1 if entry.kind is EntryKind.REGION else entry.address - (region.first << PAGE_SHIFT)
                return entries, region.is_big << _BIG_SHIFT | (region.serial + 1) << _OFFSET_BITS | offset + 1
            entries.append(entry)
        offset = -1
    return entries, 0


def _find(regions: list[Region], cursor: int) -> tuple[int, int]:
    """Where to go on: (index of the region, byte offset in it; -1: at its REGION entry)."""
    if cursor == 0:
        return 0, -1
    place = cursor >> _BIG_SHIFT & 1 == 1, (cursor >> _OFFSET_BITS & _SERIAL_MASK) - 1
    for index, region in enumerate(regions):
        if (region.is_big, region.serial) >= place:
            return index, (cursor & _OFFSET_MASK) - 1 if (region.is_big, region.serial) == place else -1
    return len(regions), -1


def _region_entries(heap: Heap, region: Region, index: int, offset: int, is_live: IsLive) -> Iterator[Entry]:
    """Entries of one region that begin at or after `offset` bytes from its base; with -1 its REGION entry, too."""
    base = region.first << PAGE_SHIFT
    if offset < 0:
        extent = region.page_count << PAGE_SHIFT
        committed = heap.arena.committed_in(region.first, region.page_count) << PAGE_SHIFT
        yield Entry(EntryKind.REGION, base, extent, extent, index, committed=committed, is_run=region.is_big)
        offset = 0
    page, skip = region.first + (offset >> PAGE_SHIFT), base + offset
    page = _piece_start(heap, page, region.first) if page < region.end else page
    while page < region.end:
        slab = heap.slabs.get(page)
        if slab is not None:
            yield from _slab_entries(heap, slab, index, skip, is_live)
            page += slab.page_count
        elif page in heap.runs:
            if page << PAGE_SHIFT >= skip:
                yield run_entry(heap, page, index, is_live)
            page += heap.runs[page]
        else:
            count = heap.space.spare.count_at(page) or region.end - page  # the rest of a large run's last granule
            yield from _spare_entries(heap, page, count, index, skip)
            page += count


def _piece_start(heap: Heap, page: int, first: int) -> int:
    """First page of the slab, spare extent or run that `page` lies in: a cursor may point inside one."""
    slab = heap.pool.at(page)
    if slab is not None:
        return slab.first_page
    if page in heap.runs:
        return page
    for start, count in heap.space.spare:
        if start <= page < start + count:
            return start
    for start in range(page, first - 1, -1):
        if page < start + heap.runs.get(start, 0):
            return start
    return page  # the rest of a large run's last granule


def _spare_entries(heap: Heap, first: int, page_count: int, index: int, skip: int) -> Iterator[Entry]:
    for start, count, is_committed in heap.arena.stretches(first, page_count):
        kind = EntryKind.FREE if is_committed else EntryKind.UNCOMMITTED
        if start << PAGE_SHIFT >= skip:
            yield Entry(kind, start << PAGE_SHIFT, count << PAGE_SHIFT, count << PAGE_SHIFT, index)


def run_entry(heap: Heap, first: int, index: int, is_live: IsLive) -> Entry:
    """The entry of the run that begins at page `first`."""
    word = heap.arena.words[heap.arena.shape.run_slot(first)]
    extent = heap.runs[first] << PAGE_SHIFT
    state, session = RUN_WORD.state(word), RUN_WORD.session(word)
    kind = EntryKind.BUSY if state == BUSY else EntryKind.CACHED if state == CACHED else EntryKind.FREE
    size = min(RUN_WORD.size(word), extent) if state == BUSY else extent
    orphaned = state == BUSY and not is_live(session)
    return Entry(
        kind, first << PAGE_SHIFT, size, extent, index, session, orphaned, RUN_WORD.generation(word), is_run=True
    )


def _slab_entries(heap: Heap, slab: Slab, index: int, skip: int, is_live: IsLive) -> Iterator[Entry]:
    start, extent = slab.first_page << PAGE_SHIFT, slab.kind.extent
    if start >= skip:
        yield Entry(EntryKind.OVERHEAD, start, slab.kind.first_offset, slab.kind.first_offset, index)
    first = max(0, (skip - slab.base) // extent)
    words = heap.arena.words[slab.slot + first : slab.slot + slab.carved].tolist() if first < slab.carved else []
    for number, word in enumerate(words, first):
        state, session = SLAB_WORD.state(word), SLAB_WORD.session(word)
        generation = SLAB_WORD.generation(word)
        address = slab.base + number * extent
        if address < skip and slab.lent[number]:
            continue
        if state == BUSY and slab.lent[number]:
            size, orphaned = min(SLAB_WORD.size(word), extent), not is_live(session)
            yield Entry(EntryKind.BUSY, address, size, extent, index, session, orphaned, generation)
        elif state == CACHED and slab.lent[number]:
            yield Entry(EntryKind.CACHED, address, extent, extent, index, session, False, generation)
        elif number in slab.hollow:
            yield from (Entry(*part, part[2], index) for part in hollow_parts(slab, number) if part[1] >= skip)
        elif address >= skip:
            yield Entry(EntryKind.FREE, address, extent, extent, index, 0, False, generation)
    yield from _slab_rest(heap, slab, index, skip)


def _slab_rest(heap: Heap, slab: Slab, index: int, skip: int) -> Iterator[Entry]:
    """What follows the last block carved: committed bytes not carved yet, uncommitted pages, the unusable end."""
    for kind, address, size in slab_rest(heap, slab):
        if address >= skip:
            yield Entry(kind, address, size, size, index)


def hollow_parts(slab: Slab, number: int) -> list[tuple[EntryKind, int, int]]:
    """(kind, address, bytes) of the parts of a hollow block."""
    first, page_count = slab.own_pages(number)
    start = slab.base + number * slab.kind.extent
    hole, hole_end, end = first << PAGE_SHIFT, (first + page_count) << PAGE_SHIFT, start + slab.kind.extent
    parts = [(EntryKind.FREE, start, hole - start), (EntryKind.UNCOMMITTED, hole, hole_end - hole)]
    return [part for part in [*parts, (EntryKind.FREE, hole_end, end - hole_end)] if part[2]]


def slab_rest(heap: Heap, slab: Slab) -> list[tuple[EntryKind, int, int]]:
    """(kind, address, bytes) of the parts of a slab after the last block carved."""
    parts: list[tuple[EntryKind, int, int]] = []
    at = slab.carved_end
    end = (slab.first_page + slab.page_count) << PAGE_SHIFT
    usable_end = slab.base + slab.block_count * slab.kind.extent
    page = (at + PAGE_SIZE - 1) >> PAGE_SHIFT
    stretches = [(at, min(page << PAGE_SHIFT, end) - at, True)] if at % PAGE_SIZE else []
    for start, count, is_committed in heap.arena.stretches(page, max((end >> PAGE_SHIFT) - page, 0)):
        stretches.append((start << PAGE_SHIFT, count << PAGE_SHIFT, is_committed))
    for address, size, is_committed in stretches:
        if not is_committed:
            parts.append((EntryKind.UNCOMMITTED, address, size))
            continue
        usable = max(0, min(address + size, usable_end) - address)
        if usable:
            parts.append((EntryKind.FREE, address, usable))
        if usable < size:
            parts.append((EntryKind.OVERHEAD, address + usable, size - usable))
    return parts
