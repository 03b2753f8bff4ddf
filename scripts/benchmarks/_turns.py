"""Two sides of a comparison in turn, A B A B: what the machine does meanwhile then hits both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

__all__ = ["Contender", "Turns", "each", "take_turns"]

Loop = Callable[[int], int]  # runs so many operations; the nanoseconds that they took


class Contender(NamedTuple):
    """One side. Fields: loop, size (operations a turn)."""

    loop: Loop
    size: int


class Turns(NamedTuple):
    """What came of a contender. Fields, one value a round: cost (ns an operation), ratio (to the baseline around)."""

    cost: list[float]
    ratio: list[float]

    @property
    def median_cost(self) -> float:
        return median(self.cost)

    @property
    def median_ratio(self) -> float:
        return median(self.ratio)


def take_turns(baseline: Contender, contenders: Mapping[str, Contender], rounds: int) -> tuple[Turns, dict[str, Turns]]:
    """Run each contender between two turns of the baseline, round after round.

    Returns: the baseline's turns (its ratios are all 1) and each contender's.
    """
    for side in (baseline, *contenders.values()):
        side.loop(max(side.size // 10, 1))  # warm up
    base = Turns([], [])
    found = {name: Turns([], []) for name in contenders}
    for _ in range(rounds):
        before = _cost(baseline)
        for name, side in contenders.items():
            cost, after = _cost(side), _cost(baseline)
            found[name].cost.append(cost)
            found[name].ratio.append(cost / ((before + after) / 2))
            base.cost.append(after)
            base.ratio.append(1.0)
            before = after
    return base, found


def _cost(side: Contender) -> float:
    return side.loop(side.size) / side.size


def each(operation: Callable[[], object], count: int) -> list[int]:
    """The nanoseconds of each of `count` operations, one clock reading (about 50 ns) and one call included."""
    clock = time.perf_counter_ns
    samples = []
    for _ in range(count):
        before = clock()
        operation()
        samples.append(clock() - before)
    return samples
