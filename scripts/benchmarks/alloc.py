"""What an allocation costs, beside who else gives out memory: `scripts/bench alloc [--quick] [--strict]`.

First 64 bytes, allocated and freed at once, in turn with malloc + free through ctypes; then a mix: sizes log-uniform
from 16 B to 64 KiB, 20,000 blocks live, each step frees a random one and allocates another, the same sequence for
both sides. The mix is also what `payload / physical` and the requests an allocation are counted on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.managers import SharedMemoryManager
from statistics import median
from typing import Any

import heapd_client as hc
from heapd.units import KIB, MIB
from scripts.benchmarks import _contenders as peers
from scripts.benchmarks._harness import Benchmark, daemon, percentiles
from scripts.benchmarks._turns import Contender, Turns, each, take_turns

_LIVE = 20_000
_SMALLEST, _LARGEST = 16, 64 * KIB
_SEED = 7
_WARM_UP = 3  # times that the live blocks are replaced before anything is measured


# -- 64 bytes --------------------------------------------------------------------------------------------------------
def _small(bench: Benchmark, session: hc.Session, rounds: int, count: int) -> None:
    plain, locked = session.create_heap(serialize=False), session.create_heap()
    with SharedMemoryManager() as manager, peers.iceoryx_publisher() as publisher:
        managed = peers.managed_segment(manager)
        contenders = {
            "heapd": Contender(peers.heapd(plain), count),
            "heapd, view taken, byte written": Contender(peers.heapd_view(plain), count),
            "heapd, serialized": Contender(peers.heapd(locked), count),
            "multiprocessing.heap": Contender(peers.pairs(peers.buffer_wrapper), count // 10),
            "SharedMemory": Contender(peers.pairs(peers.segment), max(count // 100, 10)),
            "SharedMemoryManager": Contender(peers.pairs(managed), max(count // 1000, 5)),
        }
        if publisher is not None:
            contenders["iceoryx2"] = Contender(peers.iceoryx(publisher), count)
            contenders["iceoryx2, byte written"] = Contender(peers.iceoryx_view(publisher), count // 4)
        base, turns = take_turns(Contender(peers.malloc_free, count), contenders, rounds)
        _small_figures(bench, base, turns, publisher is not None)
        _small_latencies(bench, plain, locked, managed, count)


def _small_figures(bench: Benchmark, base: Turns, turns: dict[str, Turns], has_iceoryx: bool) -> None:
    bench.raw["ns a pair"] = {"malloc": base.cost} | {name: turn.cost for name, turn in turns.items()}
    bench.add("64 B: malloc + free through ctypes", base.median_cost, "ns")
    bars = {"heapd": 1.0, "heapd, view taken, byte written": 2.0, "heapd, serialized": 2.8}
    for name, turn in turns.items():
        bench.add(f"64 B: {name}", turn.median_cost, "ns")
    for name, turn in turns.items():
        bench.add(f"64 B: {name} / malloc", turn.median_ratio, "x", at_most=bars.get(name))
    faster = median(theirs / ours for theirs, ours in zip(turns["SharedMemory"].cost, turns["heapd"].cost, strict=True))
    bench.add("64 B: SharedMemory / heapd", faster, "x", at_least=80)
    if has_iceoryx:
        bench.conditions["versions"] += f", iceoryx2 {importlib.metadata.version('iceoryx2')}"
    else:
        bench.caveats.append("iceoryx2, which is not installed: pip install iceoryx2")


def _small_latencies(
    bench: Benchmark, plain: hc.Heap, locked: hc.Heap, managed: Callable[[], None], count: int
) -> None:
    """Each pair timed by itself: what a mean over a loop hides."""

    def malloc_pair() -> None:
        peers.free(peers.malloc(peers.SIZE))

    kinds: list[tuple[str, Callable[[], Any], int]] = [
        ("malloc", malloc_pair, count),
        ("heapd", lambda: plain.alloc(peers.SIZE).free(), count),
        ("heapd, serialized", lambda: locked.alloc(peers.SIZE).free(), count),
        ("multiprocessing.heap", peers.buffer_wrapper, count // 10),
        ("SharedMemory", peers.segment, max(count // 100, 10)),
        ("SharedMemoryManager", managed, max(count // 1000, 5)),
    ]
    for name, pair, times in kinds:
        samples = each(pair, times)
        bench.raw[f"{name}, each pair, ns"] = {str(key): value for key, value in percentiles(samples).items()}
        bench.add(f"64 B: {name}, each pair timed, p99", percentiles(samples)["p99"] / 1e3, "us")


# -- the mix ---------------------------------------------------------------------------------------------------------
class Steps:
    """The sequence that both sides go through: whom to free, how large the next one is."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def sizes(self, count: int) -> list[int]:
        """So many sizes in bytes, log-uniform."""
        ratio, draw = _LARGEST / _SMALLEST, self._random.random
        return [int(_SMALLEST * ratio ** draw()) for _ in range(count)]

    def part(self, live: int, count: int) -> list[tuple[int, int]]:
        """So many steps as (index of the block that goes, size of the one that comes)."""
        victims = [self._random.randrange(live) for _ in range(count)]
        return list(zip(victims, self.sizes(count), strict=True))


def _step_heapd(heap: hc.Heap, live: list[hc.Block], steps: Sequence[tuple[int, int]]) -> int:
    before = time.perf_counter_ns()
    for victim, size in steps:
        live[victim].free()
        live[victim] = heap.alloc(size)
    return time.perf_counter_ns() - before


def _step_malloc(live: list[int], steps: Sequence[tuple[int, int]]) -> int:
    take, give = peers.malloc, peers.free
    before = time.perf_counter_ns()
    for victim, size in steps:
        give(live[victim])
        live[victim] = take(size)
    return time.perf_counter_ns() - before


def _step_each(heap: hc.Heap, live: list[hc.Block], steps: Sequence[tuple[int, int]]) -> list[int]:
    clock, samples = time.perf_counter_ns, []
    for victim, size in steps:
        before = clock()
        live[victim].free()
        live[victim] = heap.alloc(size)
        samples.append(clock() - before)
    return samples


def _mixed(bench: Benchmark, session: hc.Session, live_count: int, parts: int, part: int) -> None:
    heap = session.create_heap(serialize=False)
    steps = Steps(_SEED)
    sizes = steps.sizes(live_count)
    ours, theirs = [heap.alloc(size) for size in sizes], [peers.malloc(size) for size in sizes]
    for _ in range(_WARM_UP):
        warm_up = steps.part(live_count, live_count)
        _step_heapd(heap, ours, warm_up)
        _step_malloc(theirs, warm_up)
    costs: dict[str, list[float]] = {"malloc": [], "heapd": [], "ratio": []}
    shares: list[tuple[float, float]] = []
    requests, spent = _requests(session), 0
    for _ in range(parts):
        batch = steps.part(live_count, part)
        mine = _step_heapd(heap, ours, batch) / part
        bare = _step_malloc(theirs, batch) / part
        for name, value in (("malloc", bare), ("heapd", mine), ("ratio", mine / bare)):
            costs[name].append(value)
        spent = _requests(session) - requests - 2 * len(shares)
        shares.append(_share(session, heap))
    samples = _step_each(heap, ours, steps.part(live_count, part))
    for pointer in theirs:
        peers.free(pointer)
    bench.raw["mixed, ns a step"], bench.raw["mixed, payload / committed, payload / st_blocks"] = costs, shares
    bench.add("mixed: malloc + free through ctypes", median(costs["malloc"]), "ns")
    bench.add("mixed: heapd", median(costs["heapd"]), "ns")
    bench.add("mixed: heapd, each step timed, p99", percentiles(samples)["p99"] / 1e3, "us")
    bench.add("mixed: heapd / malloc", median(costs["ratio"]), "x", at_most=2.0)
    bench.add("mixed: requests an allocation", spent / (parts * part), "", at_most=round(1 / 30, 4))
    bench.add("mixed: payload / committed of the arena, worst look", min(arena for arena, _ in shares), "x", at_least=0.90)  # fmt: skip  # noqa: E501
    bench.add("mixed: payload / st_blocks of the segment, worst look", min(disk for _, disk in shares), "x", at_least=0.90)  # fmt: skip  # noqa: E501
    _mixed_parts(bench, heap)


def _mixed_parts(bench: Benchmark, heap: hc.Heap) -> None:
    statistics = heap.statistics()
    for name in ("busy", "padding", "cached", "free", "overhead"):
        value = getattr(statistics, name)
        bench.add(f"mixed: {name} at the end, of {statistics.committed / MIB:.1f} MiB committed", value / statistics.committed, "x")  # fmt: skip  # noqa: E501


def _share(session: hc.Session, heap: hc.Heap) -> tuple[float, float]:
    """Payload over what the arena has committed, and over the blocks of its segment."""
    busy = heap.statistics().busy
    physical = os.stat(f"/dev/shm/{session.arena.name}").st_blocks * 512
    return busy / session.statistics().committed, busy / physical


def _requests(session: hc.Session) -> int:
    """Requests of this session so far, as the daemon counts them; this one asks too."""
    return next(info.requests for info in session.sessions() if info.number == session.number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench alloc", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, help="rounds of the 64 byte part (default: 25)")
    parser.add_argument("--pairs", type=int, help="pairs a round of it (default: 40,000)")
    parser.add_argument("--live", type=int, default=_LIVE, help="live blocks of the mix (default: %(default)s)")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 25)
    count = options.pairs or (5_000 if options.quick else 40_000)
    parts, part = (3, options.live // 4) if options.quick else (20, options.live)
    runs = f"64 B: {rounds} rounds of {count:,} pairs; mix: {options.live:,} live, {parts} parts of {part:,} steps"
    bench = Benchmark("alloc", f"{runs}, seed {_SEED}; each ratio is the median of the rounds' ratios")
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        _small(bench, session, rounds, count)
        _mixed(bench, session, options.live, parts, part)
    bench.caveats.append("first touch of a block's pages: of the mix no byte is written, by either side")
    return bench.report(strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
