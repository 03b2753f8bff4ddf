"""Latencies in buckets: constant memory for any number of samples, percentiles within 5 %."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Histogram"]

_SUB_BITS = 4  # 16 buckets a doubling, so a bucket is at most 1/16 wide
_SUB = 1 << _SUB_BITS


def _bucket(value: int) -> int:
    shift = max(0, value.bit_length() - _SUB_BITS - 1)
    return (shift << _SUB_BITS) + (value >> shift)


def _upper(bucket: int) -> int:
    """The largest value that falls into the bucket."""
    shift = max(0, (bucket >> _SUB_BITS) - 1)
    return ((bucket - (shift << _SUB_BITS) + 1) << shift) - 1


@dataclass(slots=True)
class Histogram:
    """Counts by bucket. Fields: counts (bucket to samples), count (samples), maximum (the largest, exact)."""

    counts: dict[int, int] = field(default_factory=dict)
    count: int = 0
    maximum: int = 0

    def add(self, value: int) -> None:
        """Count one sample, >= 0, any unit."""
        bucket = _bucket(value)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1
        self.count += 1
        self.maximum = max(self.maximum, value)

    def merge(self, other: Histogram) -> None:
        """Count the other's samples too."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.count += other.count
        self.maximum = max(self.maximum, other.maximum)

    def percentile(self, percent: float) -> int:
        """A value that `percent` of the samples do not exceed; 0 without samples."""
        wanted = self.count * percent / 100
        passed = 0
        for bucket in sorted(self.counts):
            passed += self.counts[bucket]
            if passed >= wanted:
                return min(_upper(bucket), self.maximum)
        return self.maximum

    def to_plain(self) -> list[int]:
        """As integers: maximum, then bucket and count in turn."""
        return [self.maximum, *(value for pair in self.counts.items() for value in pair)]

    @classmethod
    def from_plain(cls, plain: list[int]) -> Histogram:
        """The inverse of `to_plain`."""
        counts = dict(zip(plain[1::2], plain[2::2], strict=True))
        return cls(counts, sum(counts.values()), plain[0])
