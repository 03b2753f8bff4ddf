"""The death of the server as clients see it: `scripts/bench restart [--quick] [--strict]`.

The server is killed with SIGKILL at random times while a client asks it one thing after another; a gap is the time from
the kill to the client's next answer. Then the same with many blocks alive, which the next server has to know of. While
there is no server, the client's own allocations are counted: they go on from its cache.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time

import heapd_client as hc
from heapd.workloads.private import private_daemon, terminations_raise
from scripts.benchmarks._harness import Benchmark

_SIZE = 64  # bytes a block
_BATCH = 4096
_PAIRS = 1000
_RESTARTS = "1000000"  # as many as it takes


def _gap(session: hc.Session, delay_s: float) -> float:
    """Kill the server `delay_s` seconds from now, under requests. Returns: seconds to the next answer."""
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(session.daemon_pid, signal.SIGKILL)

    incarnation = session.incarnation
    timer = threading.Timer(delay_s, kill)
    timer.start()
    try:
        while session.incarnation == incarnation:
            session.statistics()
        return time.monotonic() - killed_at[0]
    finally:
        timer.join()


def _pairs_without_server(session: hc.Session, heap: hc.Heap) -> int:
    """Kill the server, and count pairs of alloc and free until another one is there, _PAIRS at least."""
    heap.alloc(_SIZE).free()
    incarnation, count = session.incarnation, 0
    os.kill(session.daemon_pid, signal.SIGKILL)
    while session.incarnation == incarnation or count < _PAIRS:
        heap.alloc(_SIZE).free()
        count += 1
    session.statistics()
    return count


def _fill(heap: hc.Heap, count: int) -> None:
    for at in range(0, count, _BATCH):
        heap.alloc_many(_SIZE, min(_BATCH, count - at))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50, help="kills with few blocks, and a tenth of it with many")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="live blocks")
    parser.add_argument("--age", type=float, default=1.0, help="seconds that a server lives at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer of everything: to see that it works")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if a bar is missed")
    options = parser.parse_args()
    kills, blocks = (10, 20_000) if options.quick else (options.kills, options.blocks)
    bench = Benchmark("restart", f"{kills} kills with few blocks alive, {max(kills // 10, 1)} with {blocks:,}")
    delays = random.Random(options.seed)
    with (
        terminations_raise(),
        private_daemon("bench", "--restarts", _RESTARTS, "--log-level", "warning") as endpoint,
        hc.connect(endpoint, autostart=False, timeout=60) as session,
    ):
        heap = session.create_heap(serialize=False)
        few = [_gap(session, options.age + delays.random()) for _ in range(kills)]
        pairs = _pairs_without_server(session, heap)
        _fill(heap, blocks)
        many = [_gap(session, options.age + delays.random()) for _ in range(max(kills // 10, 1))]
    bench.raw["gaps, s"], bench.raw[f"gaps with {blocks} blocks, s"] = few, many
    ordered = sorted(few)
    bench.add("gap, median", ordered[len(ordered) // 2] * 1e3, "ms", at_most=300)
    bench.add("gap, longest", ordered[-1] * 1e3, "ms", at_most=1000)
    bench.add(f"gap with {blocks:,} live blocks, longest", max(many) * 1e3, "ms", at_most=2000)
    bench.add("alloc + free while there was no server", pairs, "pairs", at_least=_PAIRS)
    bench.caveats.append("servers that die within a second of their start: before these the supervisor pauses")
    return bench.report(strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
