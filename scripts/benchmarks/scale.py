"""Does it scale: `scripts/bench scale [--quick] [--strict]`.

1 to 32 processes allocate and free 64 bytes, each on a heap of its own or all on one shared heap, both without
serialization. Beside them malloc + free through ctypes, which shares nothing: what the machine itself gives to more
processes. Each round measures every number of processes on each kind once, so that all meet the same neighbours.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from statistics import median
from typing import Any

import heapd_client as hc
from heapd.workloads.crew import Crew, Duty, Start, pin, sleep_until
from scripts.benchmarks import _contenders as peers
from scripts.benchmarks._harness import Benchmark, daemon
from scripts.benchmarks._turns import Loop

_COUNTS = (1, 2, 4, 8, 16, 32)
_KINDS = {"own": "a heap each", "shared": "one shared heap", "malloc": "malloc + free through ctypes"}
_BATCH = 500  # pairs between two looks at the clock
_NO_FALL = 0.9  # of the rate of as many processes as there are CPUs; the rest is for noise


def _prepare(index: int, endpoint: str, shared: str) -> Duty:
    """A member, on a CPU of its own as far as there are enough: its session, its heaps, and what it does when ordered
    (kind, seconds)."""
    pin(index)
    session = hc.connect(endpoint, autostart=False)
    loops: dict[str, Loop] = {
        "own": peers.heapd(session.create_heap(serialize=False)),
        "shared": peers.heapd(session.open_heap(shared)),
        "malloc": peers.malloc_free,
    }

    def duty(order: Any, start: Start) -> int:
        """Pairs done in the time from the common beginning."""
        kind, seconds = order
        loop, done, clock = loops[kind], 0, time.monotonic_ns
        loop(_BATCH)
        begin = start()
        end = begin + int(seconds * 1e9)
        sleep_until(begin)
        while clock() < end:
            loop(_BATCH)
            done += _BATCH
        return done

    return duty


def _measure(crew: Crew, counts: list[int], rounds: int, seconds: float) -> dict[str, dict[int, list[float]]]:
    """Pairs a second of all processes together, by kind and number of processes, a value a round."""
    rates: dict[str, dict[int, list[float]]] = {kind: {count: [] for count in counts} for kind in _KINDS}
    for _ in range(rounds):
        for count in counts:
            for kind in _KINDS:
                rates[kind][count].append(sum(crew.run((kind, seconds), count, seconds)) / seconds)
    return rates


def _figures(bench: Benchmark, rates: dict[str, dict[int, list[float]]], counts: list[int]) -> None:
    bench.raw["pairs a second"] = rates
    for kind, label in _KINDS.items():
        for count in counts:
            bench.add(f"{label}: {count} processes", median(rates[kind][count]), "pairs a second")
    for kind, label in _KINDS.items():
        has_bar = kind != "malloc"
        if 2 in counts:
            speedup = _ratio(rates[kind], 2, 1)
            bench.add(f"{label}: 2 processes / 1", speedup, "x", at_least=1.8 if has_bar else None)
        peak = min(os.cpu_count() or 1, counts[-1])
        later = [count for count in counts if count > peak]
        if peak in counts and later:
            worst = min(_ratio(rates[kind], count, peak) for count in later)
            bench.add(f"{label}: worst of {later[0]} to {later[-1]} / {peak}", worst, "x", at_least=_NO_FALL if has_bar else None)  # fmt: skip  # noqa: E501


def _ratio(rates: dict[int, list[float]], count: int, base: int) -> float:
    """Of the rounds' ratios the median; a round in which nobody was let in tells nothing."""
    pairs = zip(rates[count], rates[base], strict=True)
    return median([many / few for many, few in pairs if few] or [0.0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--most", type=int, default=_COUNTS[-1], help="processes at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds (default: 9)")
    parser.add_argument("--seconds", type=float, help="seconds a measurement (default: 0.4)")
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 9)
    seconds = options.seconds or (0.2 if options.quick else 0.4)
    counts = [count for count in _COUNTS if count <= options.most]
    bench = Benchmark(
        "scale", f"{rounds} rounds of {seconds:g} s for each kind and number; ratios: median of the rounds'"
    )
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        shared = session.create_heap("scale", serialize=False)
        with Crew(counts[-1], _prepare, endpoint, shared.name) as crew:
            rates = _measure(crew, counts, rounds, seconds)
        faults = shared.validate()
        assert not faults, faults
    _figures(bench, rates, counts)
    bench.caveats.append(f"more than {os.cpu_count()} CPUs: further processes share them")
    return bench.report(strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
