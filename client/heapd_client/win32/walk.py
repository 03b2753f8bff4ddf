"""HeapWalk: the elements of a heap one by one, all of the walk's state in the caller's PROCESS_HEAP_ENTRY.

Where the entry is the one that the calling thread was given last, the walk goes on from what was asked then; any
other is looked for from the start. What was asked then may be out of date: a block is told only if its state word
still says the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from ctypes import byref, memset, sizeof
from typing import Any, Final

from heapd.errors import HeapdError

from ..handles import locate_at
from ..mapping import Mapping
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
from .process import heap_of
from .structures import PROCESS_HEAP_ENTRY

__all__ = ["HeapWalk", "Walks"]

_FLAGS: Final = {
    Kind.REGION: int(PROCESS_HEAP_REGION),
    Kind.BUSY: int(PROCESS_HEAP_ENTRY_BUSY),
    Kind.FREE: 0,
    Kind.UNCOMMITTED: int(PROCESS_HEAP_UNCOMMITTED_RANGE),
}
_REGION: Final = int(PROCESS_HEAP_REGION)
_MAX_REGIONS: Final = 64  # on Windows; and the index of a block that is in none

Place = tuple[int, bool]  # of an element: its address, and whether it is a region
Ask = Callable[[], Iterator[Element]]


class _Walk:
    """Fields: heap (what it is a walk of), last (the place of the element told last)."""

    def __init__(self, heap: object, arena: Mapping, ask: Ask) -> None:
        self.heap = heap
        self.last: Place = 0, False
        self._arena = arena
        self._ask = ask
        self._found = ask()

    def go_to(self, last: Place) -> None:
        """Stand behind an element that was told once."""
        self.last = last
        self._found = after(self._ask(), *last)

    def next(self) -> Element | None:
        element = next(self._found, None)
        if element is not None and not self._is_current(element):
            self.go_to(self.last)
            element = next(self._found, None)
        if element is not None:
            self.last = element.address, element.kind == Kind.REGION
        return element

    def _is_current(self, element: Element) -> bool:
        if element.kind != Kind.BUSY:
            return True
        try:
            handle, _ = locate_at(self._arena, element.address)
        except HeapdError:
            return False
        return handle.generation == element.generation


class Walks(threading.local):
    """The walk that the calling thread is on, if any."""

    def __init__(self) -> None:
        self._current: _Walk | None = None

    def start(self, heap: object, arena: Mapping, ask: Ask) -> Element | None:
        """The first element of a heap; None if it has none."""
        self._current = _Walk(heap, arena, ask)
        return self._next()

    def go_on(self, last: Place, heap: object, arena: Mapping, ask: Ask) -> Element | None:
        """The element after the one at `last`; None at the end."""
        walk = self._current
        if walk is None or walk.heap != heap or walk.last != last:
            walk = self._current = _Walk(heap, arena, ask)
            walk.go_to(last)
        return self._next()

    def _next(self) -> Element | None:
        walk, self._current = self._current, None
        assert walk is not None
        element = walk.next()
        if element is not None:  # else, or after an exception, the walk is of no more use
            self._current = walk
        return element


_walks: Final = Walks()


@fails_with(False)
def HeapWalk(hHeap: int | None, lpEntry: Any) -> bool:
    """The next element of the heap. Start with lpData 0; False with ERROR_NO_MORE_ITEMS at the end.

    Regions first, each with its blocks and uncommitted ranges by address, then blocks with a mapping of their own in
    the order in which they were allocated. What this process caches is given back at the start. Hold HeapLock while
    others may change the heap.
    """
    entry = instance_of(lpEntry, PROCESS_HEAP_ENTRY)
    heap = heap_of(address(hHeap)).heap
    if entry is None:
        raise Failure(ERROR_INVALID_PARAMETER, "an entry is needed")

    def ask() -> Iterator[Element]:
        return elements(heap.walk(), tail_of(heap.info.flags))

    if entry.lpData:
        element = _walks.go_on((entry.lpData, bool(entry.wFlags & _REGION)), heap, heap.mapping, ask)
    else:
        heap.trim()
        element = _walks.start(heap, heap.mapping, ask)
    if element is None:
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
