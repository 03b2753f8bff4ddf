"""What HeapAlloc and HeapFree cost, beside the heap's own alloc and free: `scripts/bench win32 [--quick] [--strict]`.

Pairs of 64 bytes, in turn through `heapd_client.win32` and through a Heap: in a serialized heap and in one with
HEAP_NO_SERIALIZE. And what a flag, or a heap with debug checking, adds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import heapd_client as hc
from heapd_client import win32
from scripts.benchmarks import _contenders as peers
from scripts.benchmarks._harness import Benchmark, daemon
from scripts.benchmarks._turns import Contender, take_turns

_SIZE = 64
_AT_MOST = 2.5  # times the Pythonic pair


def _pairs(handle: int, flags: int = 0) -> Callable[[int], int]:
    """So many pairs of HeapAlloc, with flags, and HeapFree: nanoseconds, all together."""

    def run(count: int) -> int:
        alloc, free = win32.HeapAlloc, win32.HeapFree
        before = time.perf_counter_ns()
        for _ in range(count):
            free(handle, 0, alloc(handle, flags, _SIZE))
        return time.perf_counter_ns() - before

    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench win32", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, help="rounds (default: 25)")
    parser.add_argument("--pairs", type=int, help="pairs a round (default: 20,000)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 25)
    count = options.pairs or (5_000 if options.quick else 20_000)
    bench = Benchmark("win32", f"{rounds} rounds of {count:,} pairs of {_SIZE} bytes; each ratio is the rounds' median")
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        win32.attach(session)
        _measure(bench, session, rounds, count)
        win32.detach()
    bench.caveats.append("no byte of a block is written; one thread, one process, no contention")
    return bench.report(strict=options.strict)


def _measure(bench: Benchmark, session: hc.Session, rounds: int, count: int) -> None:
    for name, options in (("serialized", 0), ("HEAP_NO_SERIALIZE", win32.HEAP_NO_SERIALIZE)):
        own = session.create_heap(serialize=not options)
        handle = win32.HeapCreate(options, 0, 0)
        base, turns = take_turns(Contender(peers.heapd(own), count), {name: Contender(_pairs(handle), count)}, rounds)
        bench.raw[f"{name}, ns a pair"] = {"heap": base.cost, "win32": turns[name].cost}
        bench.add(f"{name}: heap.alloc + block.free", base.median_cost, "ns")
        bench.add(f"{name}: HeapAlloc + HeapFree", turns[name].median_cost, "ns")
        bench.add(f"{name}: win32 / heap", turns[name].median_ratio, "x", at_most=_AT_MOST)
    slow = {
        "with HEAP_ZERO_MEMORY": Contender(_pairs(win32.HeapCreate(0, 0, 0), int(win32.HEAP_ZERO_MEMORY)), count // 10),
        "with tail and free checking": Contender(
            _pairs(win32.HeapCreate(win32.HEAP_TAIL_CHECKING_ENABLED | win32.HEAP_FREE_CHECKING_ENABLED, 0, 0)),
            count // 10,
        ),
    }
    _, turns = take_turns(Contender(_pairs(win32.HeapCreate(0, 0, 0)), count // 10), slow, max(rounds // 5, 1))
    for name, turn in turns.items():
        bench.add(f"{name}: a pair", turn.median_cost, "ns")


if __name__ == "__main__":
    sys.exit(main())
