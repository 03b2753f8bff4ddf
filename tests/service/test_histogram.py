"""How long requests take: counts that are exact at the doublings, quantiles that are at most an eighth too large."""

from __future__ import annotations

import random

import pytest

from heapd.service import Histogram


@pytest.fixture
def durations() -> list[int]:
    """Log-uniform, from nothing to above the largest bucket, and the edges."""
    generator = random.Random(1)
    edges = [edge + step for edge in (0, 8, 1 << 12, 1 << 30, 1 << 40) for step in (-1, 0, 1) if edge + step >= 0]
    return [int(2 ** (generator.random() * 42)) for _ in range(5_000)] + edges


def test_doublings_are_exact(durations: list[int]) -> None:
    """Each says how many durations were below it, as Prometheus wants buckets; none is guessed."""
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    found = histogram.doublings()
    assert [bound for bound, _ in found] == [1 << bits for bits in range(12, 31)]
    for bound, count in found:
        assert count == sum(duration < bound for duration in durations), bound


def test_sum_count_and_maximum_are_exact(durations: list[int]) -> None:
    """Averages and rates are made of them."""
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    assert (histogram.count, histogram.total_ns) == (len(durations), sum(durations))
    assert histogram.max_ns == max(durations)


def test_a_quantile_is_at_most_an_eighth_too_large(durations: list[int]) -> None:
    """And never too small."""
    histogram = Histogram()
    below = sorted(duration for duration in durations if duration < 1 << 40)
    for duration in below:
        histogram.record(duration)
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        true = below[max(1, round(share * len(below))) - 1]
        assert true <= histogram.quantile_ns(share) <= max(true * 9 / 8, true + 1)


def test_nothing_recorded_is_nothing_found() -> None:
    """Zeros, not errors."""
    histogram = Histogram()
    assert histogram.quantile_ns(0.5) == histogram.max_ns == histogram.total_ns == 0
    assert {count for _, count in histogram.doublings()} == {0}
