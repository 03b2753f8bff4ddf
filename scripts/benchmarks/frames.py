"""Frames from a producer process to a consumer process: `scripts/bench frames [--quick] [--strict]`.

6 MiB and 64 KiB, handles over a pipe, beside what one would write without heapd: a ring of SharedMemory frames that
are used again (indices over a pipe, returned over another), a SharedMemory for each frame, bytes pickled through
a multiprocessing.Queue. And in one process: allocate, fill and free 6 MiB, beside the bare fill of a mapped buffer.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from statistics import median
from typing import Any

import heapd_client as hc
from heapd.units import KIB, MIB, format_size
from scripts.benchmarks._harness import Benchmark, daemon, percentiles
from scripts.benchmarks._lanes import LANES, Setup, open_lane
from scripts.benchmarks._turns import Contender, Loop, take_turns

_IN_FLIGHT = 8
_NAMES = {
    "heapd": "heapd",
    "ring": "ring of SharedMemory frames",
    "segment": "a SharedMemory a frame",
    "queue": "pickled through a Queue",
}
_LARGE, _SMALL = 6 * MIB, 64 * KIB
_REPLY_S = 60.0


# -- two processes ---------------------------------------------------------------------------------------------------
def _produce(setup: Setup, orders: Connection) -> None:
    """Put as many frames as told, again and again; answers when it began (ns)."""
    end = LANES[setup.kind][0](setup)
    number = 0
    orders.send(None)
    while (count := orders.recv()) is not None:
        began = time.monotonic_ns()
        for _ in range(count):
            number += 1
            end.put(number)
        orders.send(began)
    end.close()


def _consume(setup: Setup, orders: Connection) -> None:
    """Take as many frames as told; answers when it was done (ns) and how long each frame was on its way."""
    end = LANES[setup.kind][1](setup)
    number = 0
    orders.send(None)
    while (count := orders.recv()) is not None:
        hops = []
        for _ in range(count):
            number += 1
            filled = end.take(number)
            hops.append(time.monotonic_ns() - filled)
        orders.send((time.monotonic_ns(), hops))
    end.close()


class Pair:
    """A producer and a consumer of one lane, waiting for orders."""

    def __init__(self, producer: Connection, consumer: Connection) -> None:
        self._ends = (consumer, producer)

    def run(self, count: int) -> tuple[float, list[int]]:
        """Hand over `count` frames. Returns: frames a second, and the nanoseconds each was on its way."""
        for end in self._ends:
            end.send(count)
        done, hops = _reply(self._ends[0])
        return count / (done - _reply(self._ends[1])) * 1e9, hops

    def hops(self, count: int) -> list[int]:
        """As `run`, one frame at a time: nothing waits in line."""
        return [hop for _ in range(count) for hop in self.run(1)[1]]


def _reply(line: Connection) -> Any:
    if not line.poll(_REPLY_S):
        raise RuntimeError(f"a producer or consumer did not answer within {_REPLY_S:g} s")
    return line.recv()


@contextmanager
def _pairs(size: int, context: SpawnContext, endpoint: str) -> Iterator[dict[str, Pair]]:
    """A pair of processes for each lane."""
    with ExitStack() as stack:
        pairs = {}
        for kind in LANES:
            setup = stack.enter_context(open_lane(kind, size, _IN_FLIGHT, context, endpoint))
            ends = [stack.enter_context(_process(context, main, setup)) for main in (_produce, _consume)]
            pairs[kind] = Pair(*ends)
        yield pairs


@contextmanager
def _process(context: SpawnContext, main: Any, setup: Setup) -> Iterator[Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(setup, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        _reply(ours)
        yield ours
    finally:
        ours.send(None)
        process.join(5)
        process.kill()
        process.join()


def _between(bench: Benchmark, endpoint: str, size: int, rounds: int, count: int) -> None:
    label = format_size(size)
    rates: dict[str, list[float]] = {kind: [] for kind in LANES}
    hops: dict[str, list[int]] = {kind: [] for kind in LANES}
    with _pairs(size, get_context("spawn"), endpoint) as pairs:
        for pair in pairs.values():
            pair.run(max(count // 10, 2 * _IN_FLIGHT))  # warm up
        for _ in range(rounds):
            for kind, pair in pairs.items():
                rates[kind].append(pair.run(count if kind in ("heapd", "ring") else max(count // 10, 1))[0])
        for kind, pair in pairs.items():
            hops[kind] = pair.hops(min(count, 300))
    bench.raw[f"{label}, frames a second"], bench.raw[f"{label}, hops, ns"] = rates, hops
    for kind in LANES:
        bench.add(f"{label}: {_NAMES[kind]}", median(rates[kind]), "frames a second")
    for kind in LANES:
        share = percentiles(hops[kind])
        bench.add(f"{label}: {_NAMES[kind]}, hop, median", share["median"] / 1e3, "us")
        bench.add(f"{label}: {_NAMES[kind]}, hop, p99", share["p99"] / 1e3, "us")
    for kind in list(LANES)[1:]:
        ratio = median(ours / theirs for ours, theirs in zip(rates["heapd"], rates[kind], strict=True))
        bench.add(f"{label}: heapd / {_NAMES[kind]}", ratio, "x", at_least=1.0 if kind == "ring" else None)


# -- one process -----------------------------------------------------------------------------------------------------
def _bare_fill(view: memoryview, source: bytes) -> Loop:
    def run(count: int) -> int:
        before = time.perf_counter_ns()
        for _ in range(count):
            view[:] = source
        return time.perf_counter_ns() - before

    return run


def _frame(heap: hc.Heap, source: bytes) -> Loop:
    size = len(source)

    def run(count: int) -> int:
        before = time.perf_counter_ns()
        for _ in range(count):
            block = heap.alloc(size)
            block.view[:] = source
            block.free()
        return time.perf_counter_ns() - before

    return run


def _within(bench: Benchmark, endpoint: str, rounds: int, count: int) -> None:
    source = os.urandom(_LARGE)
    with mmap.mmap(-1, _LARGE) as mapped, hc.connect(endpoint, autostart=False) as session:
        view = memoryview(mapped)
        heap = session.create_heap(serialize=False)
        bare = Contender(_bare_fill(view, source), count)
        base, turns = take_turns(bare, {"heapd": Contender(_frame(heap, source), count)}, rounds)
        view.release()
    bench.raw["6 MiB in one process, ns"] = {"bare": base.cost, "heapd": turns["heapd"].cost}
    bench.add("6 MiB, one process: bare fill of a mapped buffer", base.median_cost / 1e3, "us")
    bench.add("6 MiB, one process: alloc + fill + free", turns["heapd"].median_cost / 1e3, "us")
    bench.add("6 MiB, one process: alloc + fill + free / bare fill", turns["heapd"].median_ratio, "x", at_most=1.1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench frames", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (default: 15)")
    parser.add_argument("--frames", type=int, help="of 6 MiB a round, and 10 x as many of 64 KiB (default: 1000)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 15)
    large = options.frames or (100 if options.quick else 1000)
    small = 10 * large
    runs = f"{rounds} rounds of {large} frames of 6 MiB and {small:,} of 64 KiB, a tenth of that for Queue and segment"
    bench = Benchmark("frames", f"{runs}; {_IN_FLIGHT} in flight; hops one at a time; ratios: median of the rounds'")
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        _within(bench, endpoint, rounds, max(large // 10, 5))
        heap = session.create_heap("frames", serialize=False)
        _between(bench, endpoint, _LARGE, rounds, large)
        _between(bench, endpoint, _SMALL, rounds, small)
        heap.destroy()
    bench.caveats.append("a consumer that reads all of a frame: it looks at the first and last bytes")
    return bench.report(strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
