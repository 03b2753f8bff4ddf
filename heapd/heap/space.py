"""The pages of one heap: its regions, which of their pages are spare, and when spare pages are decommitted.

A growable heap reserves a first region, then 1, 2, 4, 8 MiB, then 15.8 MiB each (Win32 H-CREATE-11), and gives a run
of 1 MiB or more a region of its own, released with it. A fixed heap has one region, of its maximum rounded up to a
page: what the arena, which gives out 64 KiB at a time, reserves behind it is nobody's.

Decommit rule (Win32's two thresholds, joined by AND): when a give leaves more than `keep` spare committed pages,
the extent just given, coalesced, is decommitted. `keep` is 16 pages or 1/1024 of what is committed, the larger.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from heapd.arena import Arena, Extents
from heapd.errors import HeapFullError
from heapd.journal import NO_REGION, REGION
from heapd.layout import CHUNK_PAGES, KIND_RUN, KIND_SLAB, KIND_SPARE
from heapd.units import GRANULE_PAGES, MIB, PAGE_SIZE, align_up

__all__ = ["BIG_PAGES", "MAX_SERIAL", "Region", "Space"]

BIG_PAGES = MIB // PAGE_SIZE  # runs from here up have a region of their own in a growable heap
_SECOND_REGION = MIB // PAGE_SIZE
_LAST_REGION = 0xFD0000 // PAGE_SIZE  # Windows' cap, a multiple of 64 KiB
_KEEP_PAGES = 16
_KEEP_SHIFT = 10
_SLICE_PAGES = 8 * CHUNK_PAGES  # 16 MiB
MAX_SERIAL = (1 << 20) - 2  # what a walk's cursor has room for


@dataclass(slots=True)
class Region:
    """A run of pages reserved for the heap.

    Fields: serial (order of birth, 0 for the heap's first), first, page_count (of 64 KiB each, but for a fixed heap's),
    is_big (it holds one large run).
    """

    serial: int
    first: int
    page_count: int
    is_big: bool

    @property
    def end(self) -> int:
        return self.first + self.page_count

    @property
    def reserved(self) -> int:
        """Pages that the arena has reserved for it."""
        return align_up(self.page_count, GRANULE_PAGES)


class Space:
    """Regions and spare pages of the heap with control index `heap`.

    Fields: initial (pages committed at the start of the first region, kept when it empties).

    Invariant: every page of a region that is not big is in exactly one of: `spare`, a run or slab that took it.
    """

    def __init__(self, arena: Arena, heap: int, *, maximum: int) -> None:
        self.arena = arena
        self.heap = heap
        self.maximum = maximum  # bytes, 0: growable
        self.spare = Extents()
        self.regions: dict[int, Region] = {}  # by serial, in order of birth
        self.spare_committed = 0  # pages
        self.committed = 0  # pages
        self.reserved = 0  # pages
        self._next_serial = 0
        self._firsts: list[int] = []  # first pages of regions, sorted, to find one by page
        self._region_at: dict[int, Region] = {}
        self.is_closed = False
        self.initial = 0

    # -- regions -----------------------------------------------------------------------------------------------------
    def open(self, reserve: int, initial: int) -> Region:
        """Reserve the first region and commit its beginning. Args: pages both.

        Raises: HeapFullError; nothing is reserved.
        """
        region = self._add_region(reserve, is_big=False)
        try:
            self._commit(region.first, initial)
        except HeapFullError:
            self._drop_region(region)
            raise
        self.spare_committed += initial
        self.initial = initial
        if initial:
            self.arena.describe(region.first, initial, KIND_SPARE, self.heap, region.first)
        return region

    def restore(self, regions: list[Region], initial: int, taken: list[tuple[int, int]]) -> None:
        """Take over the regions of an earlier process. Args: regions (in order of birth), initial (pages), taken (by
        slabs and runs: first page, pages; sorted)."""
        self.initial = initial
        for region in regions:
            self.regions[region.serial] = self._region_at[region.first] = region
            self._next_serial = region.serial + 1
            self.reserved += region.page_count
            self.committed += self.arena.committed_in(region.first, region.page_count)
            if not region.is_big:
                self.spare.add_barrier(region.first)
                self.spare.add_barrier(region.end)
        self._firsts = sorted(self._region_at)
        at = 0
        for first in self._firsts:
            region, page = self._region_at[first], first
            while at < len(taken) and taken[at][0] < region.end:
                self._restore_spare(region, page, taken[at][0])
                page = sum(taken[at])
                at += 1
            self._restore_spare(region, page, region.end)
        if self.spare_committed > max(self._keep, self.initial) and self.largest_committed() > _SLICE_PAGES:
            self.arena.defer(self._trim)  # it was at that when it died

    def _restore_spare(self, region: Region, first: int, end: int) -> None:
        if first == end:
            return
        self.arena.describe(first, end - first, KIND_SPARE, self.heap, region.first)
        if not region.is_big:
            self.spare.give(first, end - first)
            self.spare_committed += self.arena.committed_in(first, end - first)

    def _add_region(self, page_count: int, *, is_big: bool) -> Region:
        first = self.arena.reserve(page_count, self.heap)
        if self._next_serial > MAX_SERIAL:
            self._count_again()
        region = Region(self._next_serial, first, page_count, is_big)
        self._next_serial += 1
        self.regions[region.serial] = region
        self._region_at[first] = region
        self._firsts.insert(bisect_right(self._firsts, first), first)
        self.reserved += page_count
        self._note(region)
        if not is_big:
            self.spare.add_barrier(first)
            self.spare.add_barrier(region.end)
            self.spare.give(first, page_count)
        return region

    def _note(self, region: Region) -> None:
        self.arena.journal.note((REGION, self.heap, region.serial, region.first, region.page_count, region.is_big))

    def _count_again(self) -> None:
        """Number the regions anew, in the same order."""
        for serial in self.regions:
            self.arena.journal.note((NO_REGION, self.heap, serial))
        for serial, region in enumerate(self.regions.values()):
            region.serial = serial
            self._note(region)
        self.regions = {region.serial: region for region in self.regions.values()}
        self._next_serial = len(self.regions)

    def _drop_region(self, region: Region) -> None:
        """Release a region whose pages are all spare, or a big one."""
        committed = self.arena.committed_in(region.first, region.page_count)
        if not region.is_big:
            self.spare.take_at(region.first, region.page_count)
            self.spare.remove_barrier(region.first)
            # The end stays a barrier while spare pages of another region may begin there, and no longer: inside a
            # later region it would keep neighbours apart.
            behind = self._region_at.get(region.end)
            if behind is None or behind.is_big:
                self.spare.remove_barrier(region.end)
            self.spare_committed -= committed
        self.arena.journal.note((NO_REGION, self.heap, region.serial))
        del self.regions[region.serial]
        del self._region_at[region.first]
        self._firsts.remove(region.first)
        self.committed -= committed
        self.reserved -= region.page_count
        self.arena.release(region.first, region.page_count)

    def find_region(self, page: int) -> Region | None:
        at = bisect_right(self._firsts, page) - 1
        if at < 0:
            return None
        region = self._region_at[self._firsts[at]]
        return region if page < region.end else None

    def locate_region(self, page: int) -> Region:
        region = self.find_region(page)
        assert region is not None, page
        return region

    def in_order(self) -> list[Region]:
        """Regions in the order of a walk: by birth, those of large runs last (Win32 H-WALK-06)."""
        return sorted(self.regions.values(), key=lambda region: (region.is_big, region.serial))

    def _grow(self, page_count: int) -> None:
        """Add a region that holds `page_count` pages at least."""
        if self.maximum:
            raise HeapFullError.of(
                "heap",
                requested=page_count * PAGE_SIZE,
                used=min((self.reserved - self.spare.total) * PAGE_SIZE, self.maximum),
                limit=self.maximum,
                advice="free blocks, have the sessions that cache free ones trim() the heap, or make it with a larger"
                " maximum; what is free may also lie scattered",
            )
        grown = sum(not region.is_big for region in self.regions.values()) - 1
        step = min(_SECOND_REGION << min(grown, 4), _LAST_REGION)
        self._add_region(max(step, align_up(page_count, GRANULE_PAGES)), is_big=False)

    # -- pages ---------------------------------------------------------------------------------------------------------
    def take(self, page_count: int) -> int:
        """Take spare pages, not committed yet, ready to be described; the first. Grows the heap if needed.

        Raises: HeapFullError, nothing changed.
        """
        first = self.spare.take(page_count)
        if first is None:
            self._grow(page_count)
            first = self.spare.take(page_count)
            assert first is not None
        self._make_ready(first, page_count)
        return first

    def take_at(self, first: int, page_count: int) -> bool:
        """Take the spare pages that follow a run, from `first` on; False if they are not spare. Raises: as take."""
        if first in self._region_at or not self.spare.take_at(first, page_count):
            return False  # where the run ends with its region, another may begin
        self._make_ready(first, page_count)
        return True

    def _make_ready(self, first: int, page_count: int) -> None:
        """Map the edges of what was taken from `spare`, or put it back."""
        self.spare_committed -= self.arena.committed_in(first, page_count)
        try:
            self.arena.pages.map_edges(first, page_count)
        except HeapFullError:
            self._put_back(first, page_count)
            raise

    def commit(self, first: int, page_count: int) -> bool:
        """Commit taken pages; True if all of them are fresh (read as zero). Raises: HeapFullError, nothing changed."""
        return self._commit(first, page_count) == page_count

    def _commit(self, first: int, page_count: int) -> int:
        if not page_count:
            return 0
        self.arena.pages.map_edges(first, page_count)
        fresh = self.arena.commit(first, page_count)
        self.committed += fresh
        return fresh

    def give(self, first: int, page_count: int) -> None:
        """Take pages back as spare, coalesce, and decommit or release what the rule says."""
        self.arena.describe(first, page_count, KIND_SPARE, self.heap, first)
        self._put_back(first, page_count)

    def _put_back(self, first: int, page_count: int) -> None:
        """As give, for pages that the page map calls spare."""
        self.spare_committed += self.arena.committed_in(first, page_count)
        start, count = self.spare.give(first, page_count)
        region = self.locate_region(start)
        if count == region.page_count:
            self._empty(region)
        elif self.spare_committed > self._keep:
            if self.arena.committed_in(start, count) > _SLICE_PAGES:
                self.arena.defer(self._trim)
                return
            floor = self._first_page() + self.initial
            if start < floor < start + count:
                start, count = floor, start + count - floor
            self._decommit(start, count)

    @property
    def _keep(self) -> int:
        """Spare pages that may stay committed."""
        return max(_KEEP_PAGES, self.committed >> _KEEP_SHIFT)

    def _trim(self) -> bool:
        """Decommit a slice of what is spare beyond measure; False when that is done."""
        return self.spare_committed > max(self._keep, self.initial) and self.decommit_spare()

    def _empty(self, region: Region) -> None:
        """A region without runs and slabs: the first goes back to its initial commit, any other is released."""
        if region.serial == 0 and self.arena.committed_in(region.first, region.page_count) > _SLICE_PAGES:
            self.arena.defer(self._trim)
        elif region.serial == 0:
            self._decommit(region.first + self.initial, region.page_count - self.initial)
        else:
            self._drop_region(region)

    def _decommit(self, first: int, page_count: int) -> int:
        done = 0
        if page_count > 0:  # the map has these edges already: they were runs', slabs' or slices' edges
            done = self.arena.decommit(first, page_count, self.heap)
            self.spare_committed -= done
            self.committed -= done
        return done

    def decommit_in_slab(self, first: int, page_count: int, slab: int) -> None:
        """Decommit pages of a slab that nothing in use lies on. Args: slab (its first page)."""
        self.committed -= self.arena.decommit(first, page_count, self.heap)
        self.arena.describe(first, page_count, KIND_SLAB, self.heap, slab)

    # -- large runs --------------------------------------------------------------------------------------------------
    def take_big(self, page_count: int) -> int:
        """Reserve a region for one large run; its first page. Nothing is committed yet. Raises: HeapFullError."""
        return self._add_region(align_up(page_count, GRANULE_PAGES), is_big=True).first

    def extend_big(self, first: int, page_count: int) -> bool:
        """Reserve what a large run needs to grow in place to `page_count` pages; False if its neighbour is taken."""
        region = self._region_at[first]
        more = align_up(page_count, GRANULE_PAGES) - region.page_count
        if more > 0:
            if not self.arena.reserve_at(region.end, more, self.heap):
                return False
            region.page_count += more
            self.reserved += more
            self._note(region)
        return True

    def trim_big(self, first: int, page_count: int) -> None:
        """Give back the pages of a large run's region beyond its first `page_count`."""
        region = self._region_at[first]
        keep = align_up(page_count, GRANULE_PAGES)
        self.arena.pages.map_edges(first, page_count)
        self.arena.pages.map_edges(first, keep)
        if page_count < keep:
            self.committed -= self.arena.decommit(first + page_count, keep - page_count, self.heap)
        if keep < region.page_count:
            surplus = region.page_count - keep
            self.committed -= self.arena.committed_in(first + keep, surplus)
            self.reserved -= surplus
            region.page_count = keep
            self._note(region)
            self.arena.release(first + keep, surplus)

    def give_big(self, first: int) -> None:
        """Release the region of a large run."""
        self._drop_region(self._region_at[first])

    def is_big(self, first: int) -> bool:
        region = self._region_at.get(first)
        return region is not None and region.is_big

    # -- whole heap --------------------------------------------------------------------------------------------------
    def decommit_spare(self) -> bool:
        """Decommit one slice of spare committed pages; False when there are none left."""
        for start, count in self.spare:
            keep = self.initial if start == self._first_page() else 0
            for at, length, is_committed in self.arena.stretches(start + keep, max(count - keep, 0)):
                if is_committed:
                    # End on a chunk boundary, so that the map of what is in between need not be split.
                    stop = min(at + length, (at + _SLICE_PAGES) // CHUNK_PAGES * CHUNK_PAGES)
                    self._decommit(at, stop - at)
                    return True
        self.arena.undefer(self._trim)
        return False

    def _first_page(self) -> int:
        return next(iter(self.regions.values())).first if self.regions else -1

    def largest_committed(self) -> int:
        """Pages in the largest stretch of spare pages that are committed."""
        largest = 0
        for start, count in self.spare:
            if count > largest:
                lengths = (n for _, n, is_committed in self.arena.stretches(start, count) if is_committed)
                largest = max(largest, *lengths, 0)
        return largest

    def close(self) -> None:
        """Release every region, whatever is in it."""
        self.is_closed = True
        self.arena.undefer(self._trim)
        for region in self.regions.values():
            self.arena.release(region.first, region.page_count)
        self.regions.clear()
        self._region_at.clear()
        self._firsts.clear()
        self.spare = Extents()
        self.committed = self.reserved = self.spare_committed = 0

    def describe_run(self, first: int, page_count: int, at: int) -> None:
        """Say in the page map that `page_count` pages from `at` on belong to the run that begins at `first`."""
        self.arena.describe(at, page_count, KIND_RUN, self.heap, first)
