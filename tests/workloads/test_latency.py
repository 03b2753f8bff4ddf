"""Histograms of latencies: percentiles close to the exact ones, in bounded memory."""

from __future__ import annotations

import random

import pytest

from heapd.workloads.latency import Histogram


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 99.9])
def test_percentiles_are_within_seven_percent(percent: float) -> None:
    """At least the exact percentile, and at most a bucket's width above it."""
    rng = random.Random(2)
    samples = sorted(int(10 ** rng.uniform(0, 9)) for _ in range(10_000))
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample)
    exact = samples[min(len(samples) - 1, int(len(samples) * percent / 100))]
    assert exact * 0.93 <= histogram.percentile(percent) <= exact * 1.07 + 1


def test_small_values_are_exact() -> None:
    """Below 32 each value has a bucket of its own."""
    for value in range(32):
        histogram = Histogram()
        histogram.add(value)
        assert histogram.percentile(50) == histogram.maximum == value


def test_buckets_are_few() -> None:
    """A day in nanoseconds needs fewer than 700 buckets."""
    histogram = Histogram()
    value = 1
    while value < 86_400 * 10**9:
        histogram.add(value)
        value += max(1, value // 50)
    assert len(histogram.counts) < 700


def test_merging_is_adding() -> None:
    """Two halves merged are the whole; the plain form brings back the same."""
    samples = [random.Random(3).randrange(10**6) for _ in range(1000)]
    whole, left, right = Histogram(), Histogram(), Histogram()
    for index, sample in enumerate(samples):
        whole.add(sample)
        (left if index % 3 else right).add(sample)
    left.merge(Histogram.from_plain(right.to_plain()))
    assert left == whole


def test_without_samples_everything_is_zero() -> None:
    """An operation nobody did has a line of zeros, not an error."""
    assert (Histogram().percentile(99), Histogram().maximum) == (0, 0)
