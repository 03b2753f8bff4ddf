"""What the ledger costs: `scripts/bench ledger [--quick] [--strict]`.

Two daemons, one with its ledger and one without, are asked the same by one client, turn by turn; the bar is on the
median of the rounds' ratios. The RPC is the wire protocol by hand. Then the restart: a manager of 1,000,000 live
blocks is dropped as a kill drops it and made again from its two segments, in a process of its own; and how long the
loop stands still while such a ledger is compacted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from heapd.arena import Arena, remove_segment
from heapd.manager import HeapManager
from heapd.units import GIB
from heapd.wire.messages import HeapAlloc, HeapCreate, HeapFree, HeapGiveBack, HeapLease
from scripts.benchmarks._harness import Benchmark, daemon
from scripts.benchmarks._turns import each
from scripts.benchmarks.rpc import RawClient

_SIZE = 64  # bytes a block
_BATCH = 256


class _Side:
    """One daemon and its client. Fields: samples (ns, by kind)."""

    def __init__(self, endpoint: str, count: int) -> None:
        self._client = RawClient(endpoint)
        self._count = count
        self.samples: dict[str, list[int]] = {"alloc": [], "free": [], f"lease and give back of {_BATCH}": []}

    def round(self) -> dict[str, float]:
        """One turn of each kind; the medians."""
        client, heap = self._client, self._client.heap
        grants: list[Any] = []
        alloc, lease = HeapAlloc(heap, _SIZE), HeapLease(heap, _SIZE, _BATCH)
        allocs = each(lambda: grants.append(client.call(alloc)), self._count)
        queue = iter([HeapFree(heap, address, generation) for _, address, generation, *_ in grants])
        frees = each(lambda: client.call(next(queue)), self._count)
        batches = each(lambda: self._give_back(client.call(lease)), max(self._count // 20, 5))
        medians = {}
        for kind, samples in zip(self.samples, (allocs, frees, batches), strict=True):
            self.samples[kind] += samples
            medians[kind] = median(samples)
        return medians

    def _give_back(self, grants: list[Any]) -> None:
        self._client.call(HeapGiveBack(self._client.heap, [address for _, address, *_ in grants]))


def _compare(bench: Benchmark, rounds: int, count: int) -> None:
    with daemon() as kept, daemon("--no-ledger", "--restarts", "0") as bare:
        with_ledger, without = _Side(kept, count), _Side(bare, count)
        ratios: dict[str, list[float]] = {}
        for number in range(rounds + 1):
            # Who goes first changes: what drifts hits both alike.
            first, second = (with_ledger, without) if number % 2 else (without, with_ledger)
            found = {side: side.round() for side in (first, second)}
            if number:  # the first warms up
                for kind, value in found[with_ledger].items():
                    ratios.setdefault(kind, []).append(value / found[without][kind])
    for kind, samples in with_ledger.samples.items():
        bench.add_samples(f"{kind}, with", samples)
        bench.add_samples(f"{kind}, without", without.samples[kind])
    bench.raw["ratios"] = ratios
    for kind, values in ratios.items():
        bench.add(f"{kind}: with / without", median(values), "x", at_most=1.15 if kind in ("alloc", "free") else None)


def _in_child(work: Callable[..., None], *arguments: Any) -> Any:
    """What `work` sends back, done in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _fill(line: Connection, name: str, blocks: int) -> None:
    """Make a manager with so many live blocks, and end as a kill does."""
    manager = HeapManager.create(Arena.create(name, reserve=64 * GIB), f"{name}-ledger")
    session = manager.open_session(os.getpid(), os.getuid())
    heap = manager.handle(session, HeapCreate("blocks", 0, 0, 0))[0]
    for _ in range(-(-blocks // _BATCH)):
        manager.handle(session, HeapLease(heap, _SIZE, _BATCH))
        manager.commit(session, 0, b"")
    line.send(None)
    os._exit(0)


def _recover(line: Connection, name: str) -> None:
    """Make the manager again; send the seconds it took, and each slice of a compaction."""
    started = time.perf_counter()
    manager = HeapManager.recover(name, f"{name}-ledger")
    took = time.perf_counter() - started
    job = manager.compaction()
    slices = []
    while True:
        before = time.perf_counter()
        try:
            next(job)
        except StopIteration:
            break
        finally:
            slices.append(time.perf_counter() - before)
    line.send((took, slices))
    os._exit(0)


def _restart(bench: Benchmark, blocks: int, times: int) -> None:
    name = f"heapd-bench-{os.getpid()}"
    try:
        _in_child(_fill, name, blocks)
        found = [_in_child(_recover, name) for _ in range(times)]
    finally:
        remove_segment(name)
        remove_segment(f"{name}-ledger")
    bench.raw["restarts, s"] = [took for took, _ in found]
    bench.raw["slices of compactions, s"] = [slices for _, slices in found]
    # The first reads the log of a million leases, the others what a compaction made of it.
    bench.add(f"restart with {blocks:,} live blocks, longest", max(took for took, _ in found), "s", at_most=2)
    bench.add("the same from a compacted ledger, median", median(took for took, _ in found[1:]), "s")
    bench.add("longest slice of a compaction", max(max(slices) for _, slices in found) * 1e3, "ms")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench ledger", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    parser.add_argument("--rounds", type=int, help="of the comparison; 40 if not told")
    parser.add_argument("--blocks", type=int, help="live at the restart; 1,000,000 if not told")
    options = parser.parse_args()
    rounds, count, blocks = (3, 200, 100_000) if options.quick else (40, 400, 1_000_000)
    rounds, blocks = options.rounds or rounds, options.blocks or blocks
    bench = Benchmark("ledger", f"{rounds} rounds of {count} calls a kind and side, in turn; 4 restarts")
    _compare(bench, rounds, count)
    _restart(bench, blocks, 4)
    bench.caveats.append("the start of Python and its sockets, 0.2 s of a restart; a disk, there is none in it")
    return bench.report(strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
