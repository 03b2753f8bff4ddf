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
    """The live blocks and what they cost. `is_batched`: by alloc_many and free_many, else one by one."""

    def __init__(self, session: hc.Session, *, is_batched: bool) -> None:
        self._session = session
        self.heap = session.create_heap(serialize=False)
        self.is_batched = is_batched
        self._random = random.Random(_SEED)
        self._segment = f"/dev/shm/{session.arena.name}"
        self._blocks: list[hc.Block] = []

    def fill(self) -> None:
        """Allocate until as many are live as should be."""
        while len(self._blocks) < _LIVE:
            self._alloc(min(_STEP, _LIVE - len(self._blocks)))

    def _alloc(self, count: int) -> None:
        sizes = [_size(self._random) for _ in range(count)]
        self._blocks += self.heap.alloc_many(sizes) if self.is_batched else [self.heap.alloc(size) for size in sizes]

    def _free(self, blocks: list[hc.Block]) -> None:
        if self.is_batched:
            self.heap.free_many(blocks)
            return
        for block in blocks:
            block.free()

    def turn_over(self, steps: int) -> None:
        """Replace random blocks by new ones, `steps` times."""
        for _ in range(steps):
            self._random.shuffle(self._blocks)
            self._free(self._blocks[-_STEP:])
            del self._blocks[-_STEP:]
            self._alloc(_STEP)

    def shares(self) -> tuple[float, float]:
        """Payload over committed bytes of the heap, and over what the segment really takes, tables included."""
        payload = sum(block.size for block in self._blocks)
        physical = os.stat(self._segment).st_blocks * 512
        return payload / self.heap.statistics().committed, payload / physical


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a fifth of the turnover")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    options = parser.parse_args()
    looks = 10 if options.quick else 50
    bench = Benchmark("memory", f"{_LIVE:,} live blocks, {looks / 5:g} times replaced, seed {_SEED}, {looks} looks")
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        for label, is_batched in (("one by one", False), ("in batches", True)):
            mix = Mix(session, is_batched=is_batched)
            _measure(bench, label, mix, looks)
            mix.heap.destroy()
    bench.caveats.append("the physical memory of page tables in each process, and of the daemon itself")
    return bench.report(strict=options.strict)


def _measure(bench: Benchmark, label: str, mix: Mix, looks: int) -> None:
    mix.fill()
    bench.add(f"{label}: payload / committed, filled", mix.shares()[0], "x")
    samples = []
    for _ in range(looks):
        mix.turn_over(_LIVE // _STEP // 5)  # a fifth of the blocks between two looks
        samples.append(mix.shares())
    of_heap, of_segment = ([share[column] for share in samples] for column in (0, 1))
    bench.raw[label] = {"payload / committed": of_heap, "payload / st_blocks": of_segment}
    bench.add(f"{label}: payload / committed, median look", median(of_heap), "x")
    bench.add(f"{label}: payload / committed, worst look", min(of_heap), "x", at_least=0.85)
    bench.add(f"{label}: payload / st_blocks of the segment, worst look", min(of_segment), "x", at_least=0.85)
    statistics = mix.heap.statistics()
    for part in ("committed", "busy", "padding", "cached", "free", "overhead"):
        bench.add(f"{label}: {part} at the end", getattr(statistics, part) / MIB, "MiB")


if __name__ == "__main__":
    sys.exit(main())
