"""heapd.arena.extents by itself: against a plain set of free units, op by op."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from heapd.arena import Extents

UNITS = 64


def runs_of(free: set[int], barriers: set[int]) -> list[tuple[int, int]]:
    """The maximal runs (start, count) of consecutive free units; a barrier begins a new one."""
    runs: list[tuple[int, int]] = []
    for unit in sorted(free):
        if runs and sum(runs[-1]) == unit and unit not in barriers:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((unit, 1))
    return runs


def best_fit(runs: list[tuple[int, int]], count: int) -> int | None:
    """Where a best fit takes `count` units: in the smallest run that holds them, the lowest among equals."""
    fitting = [(length, start) for start, length in runs if length >= count]
    return min(fitting)[1] if fitting else None


class ExtentsAgainstASet(RuleBasedStateMachine):
    """Takes and gives in any order; what is free is a set of units, what Extents holds are the runs of that set."""

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents()
        self.free: set[int] = set()
        self.barriers: set[int] = set()
        self.taken: list[tuple[int, int]] = []

    @initialize(walls=st.sets(st.integers(1, UNITS - 1), max_size=4))
    def begin(self, walls: set[int]) -> None:
        """Some barriers, then everything is given, region by region."""
        for wall in walls:
            self.extents.add_barrier(wall)
        self.barriers = walls
        edges = [0, *sorted(walls), UNITS]
        for start, end in itertools.pairwise(edges):
            assert self.extents.give(start, end - start) == (start, end - start)
        self.free = set(range(UNITS))

    @rule(count=st.integers(1, 20))
    def take(self, count: int) -> None:
        """The start is that of the best fit, and None exactly when no run is long enough."""
        expected = best_fit(runs_of(self.free, self.barriers), count)
        assert self.extents.take(count) == expected
        if expected is not None:
            self.keep(expected, count)

    @rule(start=st.integers(0, UNITS - 1), count=st.integers(1, 20))
    def take_at(self, start: int, count: int) -> None:
        """Succeeds exactly when a run begins there and is long enough."""
        fits = any(start == run_start and count <= length for run_start, length in runs_of(self.free, self.barriers))
        assert self.extents.take_at(start, count) is fits
        if fits:
            self.keep(start, count)

    def keep(self, start: int, count: int) -> None:
        self.free -= set(range(start, start + count))
        self.taken.append((start, count))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """The answer is the run that the units are part of from now on."""
        index = data.draw(st.integers(0, len(self.taken) - 1))
        start, count = self.taken.pop(index)
        self.free |= set(range(start, start + count))
        given = self.extents.give(start, count)
        assert given in runs_of(self.free, self.barriers)
        assert given[0] <= start
        assert start + count <= sum(given)

    @invariant()
    def holds_the_runs_of_the_set(self) -> None:
        """Iteration, totals, lookups by start and the self-check agree with the model."""
        runs = runs_of(self.free, self.barriers)
        assert list(self.extents) == runs
        assert len(self.extents) == len(runs)
        assert self.extents.total == len(self.free)
        assert self.extents.largest == max((count for _, count in runs), default=0)
        starts = dict(runs)
        assert [self.extents.count_at(unit) for unit in range(UNITS)] == [starts.get(unit, 0) for unit in range(UNITS)]
        assert list(self.extents.violations()) == []


TestExtentsAgainstASet = ExtentsAgainstASet.TestCase
TestExtentsAgainstASet.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)


def extents_of(*parts: tuple[int, int]) -> Extents:
    extents = Extents()
    for start, count in parts:
        extents.give(start, count)
    return extents


def test_among_extents_of_one_size_the_lowest_is_taken() -> None:
    """Blocks gather at low addresses, so that high regions empty."""
    assert extents_of((50, 4), (10, 4), (30, 4)).take(3) == 10


def test_the_smallest_extent_that_fits_is_taken_even_if_it_lies_higher() -> None:
    """Best fit: a large extent is not cut while a smaller one will do."""
    assert extents_of((0, 100), (200, 5), (300, 6)).take(5) == 200


def test_what_is_too_large_is_not_taken_and_nothing_changes() -> None:
    """None is the answer, and the extents are as they were."""
    extents = extents_of((0, 5), (10, 5))
    assert extents.take(6) is None
    assert list(extents) == [(0, 5), (10, 5)]


def test_a_gift_between_two_extents_joins_all_three() -> None:
    """Coalescing goes both ways at once."""
    extents = extents_of((0, 5), (10, 5))
    assert extents.give(5, 5) == (0, 15)
    assert list(extents) == [(0, 15)]


def test_a_barrier_keeps_neighbours_apart_until_it_is_removed() -> None:
    """Two regions that happen to touch are never one extent: each is released on its own."""
    extents = Extents()
    extents.add_barrier(8)
    extents.give(0, 8)
    assert extents.give(8, 8) == (8, 8)
    assert extents.take(9) is None
    assert extents.take_at(8, 8)
    extents.remove_barrier(8)
    assert extents.give(8, 8) == (0, 16)


def test_removing_a_barrier_that_is_not_there_does_nothing() -> None:
    """A region's end may have lost its barrier with the neighbour."""
    extents_of((0, 4)).remove_barrier(99)


def test_starts_beyond_a_terabyte_of_pages_keep_their_order() -> None:
    """The packed size and start hold 40 bits of start: 4 PiB of pages."""
    high = (1 << 40) - 100
    assert extents_of((high, 7), (0, 8)).take(7) == high


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda extents: extents._sizes.pop(), "sizes"),
        (lambda extents: extents._start_of.clear(), "index by end"),
        (lambda extents: setattr(extents, "total", 1), "total"),
        (lambda extents: extents._insert(4, 3), "overlap"),
        (lambda extents: extents._insert(5, 3), "joined"),
    ],
    ids=["sizes", "index", "total", "overlap", "unjoined"],
)
def test_a_damaged_set_says_what_is_wrong_with_it(harm: object, expected: str) -> None:
    """Each of its own invariants has a sentence of its own."""
    extents = extents_of((0, 5), (10, 5))
    assert callable(harm)
    harm(extents)
    assert any(expected in sentence for sentence in extents.violations())
