"""What a random mix of live blocks costs in committed memory: `scripts/bench memory [--quick] [--strict]`.

Sizes are log-uniform from 16 B to 64 KiB. 20,000 blocks live at any time; each step frees random ones and allocates
as many anew, so that lifetimes are random too. Payload is what was asked for, not what the classes round it to.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from statistics import median

import heapd_client as hc
from heapd.units import KIB, MIB
from scripts.benchmarks._harness import Benchmark, daemon

_LIVE = 20_000
_SMALLEST, _LARGEST = 16, 64 * KIB
_STEP = 256  # blocks replaced between two looks
_SEED = 1


def _size(rng: random.Random) -> int:
    return int(_SMALLEST * (_LARGEST / _SMALLEST) ** rng.random())


class Mix:
    """The live blocks and what they cost."""

    def __init__(self, session: hc.Session, heap: hc.Heap, seed: int) -> None:
        self._session = session
        self._heap = heap
        self._random = random.Random(seed)
        self._segment = f"/dev/shm/{session.arena.name}"
        self._blocks: list[hc.Block] = []

    def fill(self) -> None:
        """Allocate until as many are live as should be."""
        while len(self._blocks) < _LIVE:
            self._alloc(min(_STEP, _LIVE - len(self._blocks)))

    def _alloc(self, count: int) -> None:
        self._blocks += self._heap.alloc_many([_size(self._random) for _ in range(count)])

    def turn_over(self, steps: int) -> None:
        """Replace random blocks by new ones, `steps` times."""
        for _ in range(steps):
            self._random.shuffle(self._blocks)
            self._heap.free_many(self._blocks[-_STEP:])
            del self._blocks[-_STEP:]
            self._alloc(_STEP)

    def shares(self) -> tuple[float, float, float]:
        """Payload over: committed bytes of the heap, bytes of the segment with its tables, bytes less the tables."""
        payload = sum(block.size for block in self._blocks)
        arena = self._session.statistics()
        physical = os.stat(self._segment).st_blocks * 512
        return (
            payload / self._heap.statistics().committed,
            payload / physical,
            payload / (physical - arena.tables),
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the turnover")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    options = parser.parse_args()
    looks = 10 if options.quick else 50
    steps = _LIVE // _STEP // 5  # a fifth of the blocks between two looks
    bench = Benchmark("memory", f"{_LIVE:,} live blocks, {looks / 5:g} times replaced, seed {_SEED}, {looks} looks")
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=False)
        mix = Mix(session, heap, _SEED)
        mix.fill()
        filled = mix.shares()
        samples = []
        for _ in range(looks):
            mix.turn_over(steps)
            samples.append(mix.shares())
        _figures(bench, filled, samples, heap)
    bench.caveats.append("the physical memory of page tables in each process, and of the daemon itself")
    return bench.report(strict=options.strict)


def _figures(
    bench: Benchmark, filled: tuple[float, float, float], samples: list[tuple[float, float, float]], heap: hc.Heap
) -> None:
    heap_share, segment_share, block_share = (list(column) for column in zip(*samples, strict=True))
    bench.raw["payload / committed"] = heap_share
    bench.raw["payload / st_blocks"] = segment_share
    bench.add("payload / committed, filled", filled[0], "x")
    bench.add("payload / committed, median look", median(heap_share), "x")
    bench.add("payload / committed, worst look", min(heap_share), "x", at_least=0.85)
    bench.add("payload / st_blocks of the segment, worst look", min(segment_share), "x", at_least=0.85)
    bench.add("payload / st_blocks less tables, worst look", min(block_share), "x")
    statistics = heap.statistics()
    for part in ("committed", "busy", "padding", "free", "overhead"):
        bench.add(f"{part} at the end", getattr(statistics, part) / MIB, "MiB")


if __name__ == "__main__":
    sys.exit(main())
