"""How long requests take in the daemon, as counts in buckets: bounded memory, a fraction of a microsecond a record."""

from __future__ import annotations

from typing import Final

__all__ = ["Histogram"]

_SUB_BITS: Final = 3  # each doubling is cut in eight, so that a figure is at most 1/8 too large
_SUBS: Final = 1 << _SUB_BITS
_FIRST_DOUBLING: Final = 12
_LAST_DOUBLING: Final = 30
_MAX_BITS: Final = 40  # 2**40 ns are 18 minutes; what takes longer is in the last bucket


class Histogram:
    """Durations in ns. Fields: count (recorded), total_ns (their sum), max_ns, counts (how many in each bucket)."""

    __slots__ = ("count", "counts", "max_ns", "total_ns")

    def __init__(self) -> None:
        self.count = self.total_ns = self.max_ns = 0
        self.counts = [0] * ((_MAX_BITS + 1) * _SUBS)

    def record(self, duration_ns: int) -> None:
        """Count one duration of `duration_ns` >= 0."""
        bits = duration_ns.bit_length()
        if bits > _MAX_BITS:
            index = -1
        elif bits > _SUB_BITS:
            # The leading bit says which doubling, the three after it which eighth of it.
            index = (bits << _SUB_BITS) | (duration_ns >> (bits - 1 - _SUB_BITS)) & (_SUBS - 1)
        else:
            index = duration_ns
        self.counts[index] += 1
        self.count += 1
        self.total_ns += duration_ns
        if duration_ns > self.max_ns:
            self.max_ns = duration_ns

    def quantile_ns(self, share: float) -> int:
        """A bound, in ns, that `share` (0..1) of the durations do not pass; 0 if there are none."""
        if self.count == 0:
            return 0
        wanted = max(1, round(share * self.count))
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if seen >= wanted:
                return min(_upper_bound(index), self.max_ns)
        return self.max_ns

    def doublings(self) -> list[tuple[int, int]]:
        """(2**n ns, durations below it) for n from 12 to 30, 4 us to 1 s: exact, for whoever adds several up."""
        found, seen = [], sum(self.counts[: _FIRST_DOUBLING << _SUB_BITS])
        for bits in range(_FIRST_DOUBLING, _LAST_DOUBLING + 1):
            seen += sum(self.counts[bits << _SUB_BITS : bits + 1 << _SUB_BITS])
            found.append((1 << bits, seen))
        return found


def _upper_bound(index: int) -> int:
    bits, sub = index >> _SUB_BITS, index & (_SUBS - 1)
    if bits <= _SUB_BITS:
        return index
    return (_SUBS + sub + 1 << (bits - 1 - _SUB_BITS)) - 1
