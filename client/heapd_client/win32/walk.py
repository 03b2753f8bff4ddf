"""HeapWalk: the elements of a heap one by one, all of the walk's state in the caller's PROCESS_HEAP_ENTRY.

Where the entry is the one that the calling thread was given last, the walk goes on from what was asked then; any
other is looked for from the start. What was asked then may be out of date: a block is told only if its state word
still says the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from ctypes import byref, memset, sizeof
from typing import Any, Final

from heapd.errors import HeapdError

from ..handles import locate_at
from .arguments import address, instance_of
from .checked_heap import tail_of
from .constants import (
    DWORD_MAX,
    ERROR_INVALID_PARAMETER,
    ERROR_NO_MORE_ITEMS,
    PROCESS_HEAP_ENTRY_BUSY,
    PROCESS_HEAP_REGION,
    PROCESS_HEAP_UNCOMMITTED_RANGE,
)
from .elements import NO_REGION, Element, Kind, after, elements
from .last_error import Failure, fails_with
from .open_heap import OpenHeap
from .process import heap_of
from .structures import PROCESS_HEAP_ENTRY

__all__ = ["HeapWalk"]

_FLAGS: Final = {
    Kind.REGION: int(PROCESS_HEAP_REGION),
    Kind.BUSY: int(PROCESS_HEAP_ENTRY_BUSY),
    Kind.FREE: 0,
    Kind.UNCOMMITTED: int(PROCESS_HEAP_UNCOMMITTED_RANGE),
}
_REGION: Final = int(PROCESS_HEAP_REGION)
_MAX_REGIONS: Final = 64  # on Windows; and the index of a block that is in none


class _Walk:
    """Fields: open_heap, found (elements to come), last (address and being a region, of the element told last)."""

    def __init__(self, open_heap: OpenHeap) -> None:
        self.open_heap = open_heap
        self.last = 0, False
        self.found = self._ask()

    def _ask(self) -> Iterator[Element]:
        heap = self.open_heap.heap
        return elements(heap.walk(), tail_of(heap.info.flags))

    def go_to(self, last: tuple[int, bool]) -> None:
        """Stand behind the element that was told last."""
        self.last = last
        self.found = after(self._ask(), *last)

    def next(self) -> Element | None:
        element = next(self.found, None)
        if element is not None and not self._is_current(element):
            self.go_to(self.last)
            element = next(self.found, None)
        if element is not None:
            self.last = element.address, element.kind == Kind.REGION
        return element

    def _is_current(self, element: Element) -> bool:
        if element.kind != Kind.BUSY:
            return True
        try:
            handle, _ = locate_at(self.open_heap.heap.mapping, element.address)
        except HeapdError:
            return False
        return handle.generation == element.generation


class _Walks(threading.local):
    """The walk that the calling thread is on, if any."""

    current: _Walk | None = None


_walks: Final = _Walks()


@fails_with(False)
def HeapWalk(hHeap: int | None, lpEntry: Any) -> bool:
    """The next element of the heap. Start with lpData 0; False with ERROR_NO_MORE_ITEMS at the end.

    Regions first, each with its blocks and uncommitted ranges by address, then blocks with a mapping of their own in
    the order in which they were allocated. What this process caches is given back at the start. Hold HeapLock while
    others may change the heap.
    """
    entry = instance_of(lpEntry, PROCESS_HEAP_ENTRY)
    found = heap_of(address(hHeap))
    if entry is None:
        raise Failure(ERROR_INVALID_PARAMETER, "an entry is needed")
    walk = _walks.current
    if not entry.lpData:
        found.heap.trim()
        walk = _walks.current = _Walk(found)
    else:
        last = entry.lpData, bool(entry.wFlags & _REGION)
        if walk is None or walk.open_heap is not found or walk.last != last:
            walk = _walks.current = _Walk(found)
            walk.go_to(last)
    element = walk.next()
    if element is None:
        _walks.current = None
        raise Failure(ERROR_NO_MORE_ITEMS, "the walk is at its end")
    _fill(entry, element)
    return True


def _fill(entry: PROCESS_HEAP_ENTRY, element: Element) -> None:
    memset(byref(entry), 0, sizeof(entry))
    entry.lpData = element.address
    entry.cbData = min(element.size, DWORD_MAX)
    entry.cbOverhead = element.overhead
    entry.iRegionIndex = _MAX_REGIONS if element.region == NO_REGION else min(element.region, _MAX_REGIONS - 1)
    entry.wFlags = _FLAGS[element.kind]
    if element.kind == Kind.REGION:
        entry.Region.dwCommittedSize = min(element.committed, DWORD_MAX)
        entry.Region.dwUnCommittedSize = min(element.extent - element.committed, DWORD_MAX)
        entry.Region.lpFirstBlock = element.address
        entry.Region.lpLastBlock = element.end
