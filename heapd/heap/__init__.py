"""One heap over its regions: alloc, resize and free blocks; walk, validate, sum up, compact."""

from heapd.heap.heap import SLICE_BYTES, Heap
from heapd.heap.holdings import NOBODY, recount
from heapd.heap.restore import drop_unfinished, restore_heap
from heapd.heap.slab import Slab
from heapd.heap.space import Region
from heapd.heap.statistics import collect_statistics
from heapd.heap.validate import validate_block, validate_heap
from heapd.heap.walk import walk

__all__ = [
    "NOBODY",
    "SLICE_BYTES",
    "Heap",
    "Region",
    "Slab",
    "collect_statistics",
    "drop_unfinished",
    "recount",
    "restore_heap",
    "validate_block",
    "validate_heap",
    "walk",
]
