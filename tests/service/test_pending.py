"""The memory of answers, and the figures of the latency histogram."""

from __future__ import annotations

import random

import pytest

from heapd.service import Histogram, ReplyMemory


def test_the_latest_answers_are_remembered() -> None:
    """The oldest goes when there are more than 64."""
    memory = ReplyMemory()
    for request_id in range(1, 101):
        memory.keep(request_id, b"%d" % request_id)
    assert len(memory) == 64
    assert memory.find(100) == b"100"
    assert memory.find(37) == b"37"
    assert memory.find(36) is None


def test_answers_are_bounded_in_bytes() -> None:
    """Large answers push small ones out sooner."""
    memory = ReplyMemory()
    for request_id in range(1, 11):
        memory.keep(request_id, b"x" * 100_000)
    assert len(memory) == 2


def test_the_latest_answer_is_kept_whatever_its_size() -> None:
    """It is the one that is asked for again."""
    memory = ReplyMemory()
    memory.keep(1, b"small")
    memory.keep(2, b"x" * 3_000_000)
    assert len(memory) == 1
    assert memory.find(2) is not None


def test_of_a_request_that_is_not_unfinished_nothing_is_settled() -> None:
    """A job that ended in its first slice was never unfinished."""
    memory = ReplyMemory()
    memory.settle(5, b"answer")
    assert memory.find(5) is None


def test_an_empty_histogram_says_0() -> None:
    """There is no median of nothing."""
    assert Histogram().quantile_ns(0.5) == 0


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_quantile_is_at_most_an_eighth_too_large(share: float) -> None:
    """Whatever the durations, from nanoseconds to minutes."""
    generator = random.Random(5)
    durations = sorted(int(10 ** generator.uniform(0, 10.5)) for _ in range(2000))
    histogram = Histogram()
    for duration in durations:
        histogram.record(duration)
    exact = durations[max(1, round(share * len(durations))) - 1]
    assert exact <= histogram.quantile_ns(share) <= exact * 9 / 8 + 1


def test_every_small_duration_has_a_bucket_of_its_own_value() -> None:
    """From 0 to the largest, no duration falls outside, and none is understated."""
    for duration in [*range(2000), 2**39, 2**40 - 1]:
        histogram = Histogram()
        histogram.record(duration)
        assert duration <= histogram.quantile_ns(1.0) <= duration * 9 / 8 + 1


def test_a_duration_beyond_the_last_bucket_is_counted() -> None:
    """As the longest there is."""
    histogram = Histogram()
    histogram.record(2**60)
    assert histogram.count == 1
    assert histogram.quantile_ns(0.5) >= 2**40 - 1
