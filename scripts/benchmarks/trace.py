"""Recorded malloc traces replayed over a heap and over the C library's malloc: `scripts/bench trace FILE...`.

Every block is filled with a pattern and checked before it is freed or moved, calloc's zeros too. What counts is the
peak of committed bytes: above what an idle daemon commits, and with the front end's caches, beside the peak of
resident bytes that glibc needs for the same trace, measured here in a process of its own. The time an event is taken
over the same trace with its blocks untouched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import heapd_client as hc
from scripts.benchmarks._glibc import glibc_cost, glibc_peak
from scripts.benchmarks._harness import Benchmark, daemon
from scripts.benchmarks._replay import HeapReplay, heap_cost
from scripts.benchmarks._traces import Trace, TraceError, read_trace

_SMALL = 2_000_000  # live bytes; a trace below that has no bar of its own, pages and slabs decide it
_MB = 1e6


def _peaks(bench: Benchmark, trace: Trace, serialize: bool) -> int:
    """Replay and check a trace on a fresh daemon. Returns: the peak of committed bytes."""
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=serialize)
        replay = HeapReplay(session, heap, trace)
        replay.run()
        faults = heap.validate()
        if faults:
            raise TraceError(f"{trace.name}: validate finds {faults[0]}")
    bench.add(f"{trace.name}: peak committed", replay.committed / _MB, "MB")
    bench.add(f"{trace.name}: peak st_blocks of the segment", replay.physical / _MB, "MB")
    return replay.committed


def _times(bench: Benchmark, trace: Trace, serialize: bool, runs: int) -> None:
    costs: dict[str, list[float]] = {"heapd": [], "glibc": []}
    with daemon() as endpoint, hc.connect(endpoint, autostart=False) as session:
        for _ in range(runs):
            heap = session.create_heap(serialize=serialize)
            costs["heapd"].append(heap_cost(heap, trace) / len(trace) / 1e3)
            heap.destroy()
            costs["glibc"].append(glibc_cost(trace) / len(trace) / 1e3)
    bench.raw[f"{trace.name}, us an event"] = costs
    bench.add(f"{trace.name}: an event", median(costs["heapd"]), "us")
    bench.add(f"{trace.name}: an event, glibc through ctypes", median(costs["glibc"]), "us")
    ratio = median(ours / theirs for ours, theirs in zip(costs["heapd"], costs["glibc"], strict=True))
    bench.add(f"{trace.name}: an event, heapd / glibc", ratio, "x")


def _replay(bench: Benchmark, trace: Trace, reference: float | None, serialize: bool, runs: int) -> tuple[int, int]:
    """All of one trace. Returns: heapd's and glibc's peak, bytes."""
    bench.add(f"{trace.name}: events", len(trace), "")
    live = trace.live_peak
    bench.add(f"{trace.name}: peak live", live / _MB, "MB")
    ours, theirs = _peaks(bench, trace, serialize), glibc_peak(trace)
    bench.add(f"{trace.name}: peak resident, glibc", theirs / _MB, "MB")
    bar = 1.2 if live > _SMALL else None
    bench.add(f"{trace.name}: peak, heapd / glibc", ours / theirs, "x", at_most=bar)
    if reference is not None:
        bench.add(f"{trace.name}: peak, heapd / reference", ours / _MB / reference, "x", at_most=bar)
    _times(bench, trace, serialize, runs)
    return (ours, theirs) if live > _SMALL else (0, 0)


def _references(texts: list[str]) -> dict[str, float]:
    """NAME=MB, as given."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        found[name] = float(value)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench trace", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a trace, gzip of lines")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--runs", type=int, default=5, help="how often the time is taken (default: %(default)s)")
    parser.add_argument("--serialize", action="store_true", help="use a serialized heap")
    parser.add_argument("--reference", action="append", default=[], metavar="NAME=MB", help="glibc's peak as known")
    options = parser.parse_args()
    try:
        references = _references(options.reference)
        traces = [read_trace(path) for path in options.files]
    except (TraceError, OSError, ValueError) as error:
        parser.error(str(error))
    bench = Benchmark("trace", f"each trace once checked on a fresh daemon, {options.runs} times timed on fresh heaps")
    total = [_replay(bench, trace, references.get(trace.name), options.serialize, options.runs) for trace in traces]
    ours, theirs = (sum(column) for column in zip(*total, strict=True))
    if theirs:
        bench.add("all traces over 2 MB live: peak, heapd / glibc", ours / theirs, "x", at_most=1.05)
    bench.caveats.append("the traces' threads (one replays them all); page tables; what an idle daemon commits")
    return bench.report(strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
