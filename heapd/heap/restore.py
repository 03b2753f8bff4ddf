"""A heap taken over from an earlier process, as its records have it."""

from __future__ import annotations

from heapd.arena import Arena
from heapd.heap.heap import Heap
from heapd.heap.holdings import NOBODY
from heapd.heap.slab import Slab
from heapd.heap.space import Region
from heapd.layout import KIND_SLAB
from heapd.units import PAGE_SHIFT

__all__ = ["drop_unfinished", "restore_heap"]


def restore_heap(
    arena: Arena,
    index: int,
    *,
    maximum: int,
    max_block: int,
    initial: int,
    regions: list[Region],
    slabs: list[Slab],
    runs: dict[int, int],
    unfinished: set[int],
    allocations: int,
    releases: int,
) -> Heap:
    """The heap that an earlier process had; page map, slab heads and free blocks' words are written anew.

    Args: initial (pages), regions (in order of birth), slabs, runs (first page -> pages; kept), unfinished (first
          pages of runs that nobody was given: `drop_unfinished`).
    """
    heap = Heap.__new__(Heap)
    heap._set_up(arena, index, maximum, max_block)
    heap.allocations, heap.releases, heap.runs, heap.unfinished = allocations, releases, runs, unfinished
    heap.borrowers = dict.fromkeys(runs, NOBODY)
    heap.held.charge(NOBODY, sum(runs.values()) << PAGE_SHIFT)
    slabs.sort()
    for slab in slabs:
        _restore_slab(heap, slab)
    taken = [(slab.first_page, slab.page_count) for slab in slabs] + list(runs.items())
    heap.space.restore(regions, initial, sorted(taken))
    for first, page_count in runs.items():
        heap.space.describe_run(first, page_count, first)
    return heap


def _restore_slab(heap: Heap, slab: Slab) -> None:
    heap.pool.add(slab)
    heap.held.charge(NOBODY, slab.lent_count * slab.kind.extent)
    heap.arena.describe(slab.first_page, slab.page_count, KIND_SLAB, heap.index, slab.first_page)
    slab.rewrite_head(heap.arena.words)
    slab.hollow = [index for index in slab.free if not _is_committed(heap, *slab.own_pages(index))]
    slab.free = [index for index in slab.free if index not in slab.hollow]


def _is_committed(heap: Heap, first: int, page_count: int) -> bool:
    return heap.arena.committed_in(first, page_count) == page_count


def drop_unfinished(heap: Heap) -> None:
    """Free the runs that an earlier process was committing when it died."""
    for first in list(heap.unfinished):
        heap.unfinished.discard(first)
        heap.take_back(None, first, heap.arena.shape.run_slot(first))
