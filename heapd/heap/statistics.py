"""The statistics of a heap: one pass over its pieces, each read whole, so that the parts add up at every moment."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, fields

from heapd.heap.heap import Heap
from heapd.heap.slab import Slab
from heapd.heap.walk import IsLive, hollow_parts, slab_rest
from heapd.layout import (
    BUSY,
    C_ACQUIRED,
    C_CONTENDED,
    C_RECOVERED,
    C_WAITED_NS,
    CACHED,
    RUN_WORD,
    SLAB_WORD,
)
from heapd.records import EntryKind, HeapStatistics
from heapd.units import PAGE_SHIFT

__all__ = ["collect_statistics"]

_BLOCKS_A_SLICE = 10_000  # about 2 ms


@dataclass(slots=True)
class _Sums:
    """Bytes and counts summed so far; fields as in HeapStatistics."""

    committed: int = 0
    uncommitted: int = 0
    busy: int = 0
    padding: int = 0
    cached: int = 0
    free: int = 0
    overhead: int = 0
    largest_free: int = 0
    orphaned: int = 0
    busy_blocks: int = 0
    cached_blocks: int = 0
    free_blocks: int = 0
    orphaned_blocks: int = 0

    def add_busy(self, size: int, extent: int, is_live: bool) -> None:
        self.busy += size
        self.padding += extent - size
        self.busy_blocks += 1
        if not is_live:
            self.orphaned += size
            self.orphaned_blocks += 1

    def add_free(self, size: int) -> None:
        self.free += size
        self.free_blocks += 1
        self.largest_free = max(self.largest_free, size)

    def add_hollow(self, sizes: Iterable[int]) -> None:
        """A free block of which only parts of so many bytes are committed."""
        self.free_blocks += 1
        for size in sizes:
            self.free += size
            self.largest_free = max(self.largest_free, size)

    def add_cached(self, extent: int) -> None:
        self.cached += extent
        self.cached_blocks += 1


def collect_statistics(heap: Heap, is_live: IsLive) -> Generator[None, None, HeapStatistics]:
    """Sum up a heap, yielding between slices of a few ms; the generator's return value is the result.

    A piece (slab, run, region's spare pages) that comes or goes meanwhile is counted wholly or not at all.
    """
    heap.tidy()
    sums = _Sums()
    seen = 0
    for slab in list(heap.slabs.values()):
        if heap.slabs.get(slab.first_page) is slab:
            _add_slab(sums, heap, slab, is_live)
            seen += slab.carved
            if seen >= _BLOCKS_A_SLICE:
                seen = 0
                yield
    for first in list(heap.runs):
        if first in heap.runs:
            _add_run(sums, heap, first, is_live)
            seen += 1
            if seen >= _BLOCKS_A_SLICE:
                seen = 0
                yield
    _add_spare(sums, heap)
    control = heap.arena.shape.control_slot(heap.index)
    words = heap.arena.words
    return HeapStatistics(
        reserved=sums.committed + sums.uncommitted,
        regions=len(heap.space.regions),
        slabs=len(heap.slabs),
        runs=len(heap.runs),
        allocations=heap.allocations,
        releases=heap.releases,
        acquisitions=words[control + C_ACQUIRED],
        contended=words[control + C_CONTENDED],
        waited_ns=words[control + C_WAITED_NS],
        recoveries=words[control + C_RECOVERED],
        **{field.name: getattr(sums, field.name) for field in fields(_Sums)},
    )


def _add_slab(sums: _Sums, heap: Heap, slab: Slab, is_live: IsLive) -> None:
    kind, lent = slab.kind, slab.lent
    for index, word in enumerate(heap.arena.words[slab.slot : slab.slot + slab.carved].tolist()):
        state = SLAB_WORD.state(word)
        if index in slab.hollow:
            sums.add_hollow(size for part, _, size in hollow_parts(slab, index) if part is EntryKind.FREE)
        elif not lent[index] or state not in (BUSY, CACHED):
            sums.add_free(kind.extent)
        elif state == CACHED:
            sums.add_cached(kind.extent)
        else:
            sums.add_busy(min(SLAB_WORD.size(word), kind.extent), kind.extent, is_live(SLAB_WORD.session(word)))
    committed = heap.arena.committed_in(slab.first_page, slab.page_count)
    sums.committed += committed << PAGE_SHIFT
    sums.uncommitted += (slab.page_count - committed) << PAGE_SHIFT
    sums.overhead += kind.first_offset
    for part, _, size in slab_rest(heap, slab):
        if part is EntryKind.FREE:
            sums.free += size
        elif part is EntryKind.OVERHEAD:
            sums.overhead += size


def _add_run(sums: _Sums, heap: Heap, first: int, is_live: IsLive) -> None:
    word = heap.arena.words[heap.arena.shape.run_slot(first)]
    extent = heap.runs[first] << PAGE_SHIFT
    state = RUN_WORD.state(word)
    committed = heap.arena.committed_in(first, heap.runs[first]) << PAGE_SHIFT
    sums.committed += committed
    sums.uncommitted += extent - committed
    if state == BUSY:
        sums.add_busy(min(RUN_WORD.size(word), committed), committed, is_live(RUN_WORD.session(word)))
    elif state == CACHED:
        sums.add_cached(committed)
    else:
        sums.add_free(committed)
    region = heap.space.locate_region(first)
    if region.is_big:
        sums.uncommitted += (region.page_count << PAGE_SHIFT) - extent


def _add_spare(sums: _Sums, heap: Heap) -> None:
    for start, count in heap.space.spare:
        for _, length, is_committed in heap.arena.stretches(start, count):
            size = length << PAGE_SHIFT
            if is_committed:
                sums.committed += size
                sums.free += size
                sums.largest_free = max(sums.largest_free, size)
            else:
                sums.uncommitted += size
