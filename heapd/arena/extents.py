"""Free extents of a number line: best fit, lowest address among equals, coalesced on give.

Pure: the units are pages for a heap and 64 KiB granules for the arena. Invariants: extents are disjoint and never
adjacent (but for a barrier between them); `_sizes` holds each extent exactly once, as count << 40 | start.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

__all__ = ["Extents"]

_SHIFT = 40
_START_MASK = (1 << _SHIFT) - 1


class Extents:
    """A set of free extents (start, count)."""

    def __init__(self) -> None:
        self._count_of: dict[int, int] = {}  # start -> count
        self._start_of: dict[int, int] = {}  # end -> start
        self._sizes: list[int] = []  # sorted: best fit is one bisect
        self._barriers: set[int] = set()  # starts that never join what lies before them
        self.total = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Extents as (start, count), by start."""
        return iter(sorted(self._count_of.items()))

    @property
    def largest(self) -> int:
        """Units in the largest extent; 0 if there is none."""
        return self._sizes[-1] >> _SHIFT if self._sizes else 0

    def count_at(self, start: int) -> int:
        """Units of the extent that begins at `start`; 0 if none does."""
        return self._count_of.get(start, 0)

    def add_barrier(self, start: int) -> None:
        """Keep what begins at `start` apart from what ends there: two regions that happen to be neighbours."""
        self._barriers.add(start)

    def remove_barrier(self, start: int) -> None:
        self._barriers.discard(start)

    def take(self, count: int) -> int | None:
        """Take `count` units from the smallest extent that holds them; the start taken, None if there is none."""
        at = bisect_left(self._sizes, count << _SHIFT)
        if at == len(self._sizes):
            return None
        start = self._sizes[at] & _START_MASK
        self._cut(start, count)
        return start

    def take_at(self, start: int, count: int) -> bool:
        """Take `count` units that begin an extent at `start`; False, and no change, if they are not free."""
        if self._count_of.get(start, 0) < count:
            return False
        self._cut(start, count)
        return True

    def give(self, start: int, count: int) -> tuple[int, int]:
        """Give units back, coalesced with both neighbours; the extent (start, count) they are part of now."""
        self.total += count
        end = start + count
        if start not in self._barriers and (before := self._start_of.get(start)) is not None:
            self._remove(before)
            start = before
        if end not in self._barriers and (after := self._count_of.get(end)) is not None:
            self._remove(end)
            end += after
        self._insert(start, end - start)
        return start, end - start

    def _cut(self, start: int, count: int) -> None:
        rest = self._remove(start) - count
        if rest:
            self._insert(start + count, rest)
        self.total -= count

    def _insert(self, start: int, count: int) -> None:
        self._count_of[start] = count
        self._start_of[start + count] = start
        insort(self._sizes, count << _SHIFT | start)

    def _remove(self, start: int) -> int:
        count = self._count_of.pop(start)
        del self._start_of[start + count]
        del self._sizes[bisect_left(self._sizes, count << _SHIFT | start)]
        return count

    def violations(self) -> Iterator[str]:
        """What is wrong with the set itself, a sentence each."""
        if sorted(count << _SHIFT | start for start, count in self._count_of.items()) != self._sizes:
            yield "the list of sizes and the extents disagree"
        if self._start_of != {start + count: start for start, count in self._count_of.items()}:
            yield "the index by end and the extents disagree"
        if self.total != sum(self._count_of.values()):
            yield f"the total is {self.total}, the extents hold {sum(self._count_of.values())}"
        end = -1
        for start, count in self:
            if start < end:
                yield f"extents overlap at {start}"
            if start == end and start not in self._barriers:
                yield f"two free extents meet at {start} and were not joined"
            end = start + count
