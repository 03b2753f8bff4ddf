"""A recorded malloc trace replayed over a heap: once with every byte checked, once for the time alone."""

from __future__ import annotations

import os
import random
import time

import heapd_client as hc
from heapd.layout import H_COMMITTED
from scripts.benchmarks._traces import CALLOC, FREE, REALLOC, Trace, TraceError

__all__ = ["HeapReplay", "heap_cost"]


class Pattern:
    """What each block is filled with: random bytes from a place that its ID decides."""

    def __init__(self, largest: int) -> None:
        self._bytes = random.Random(1).randbytes(1 << 16) * ((largest >> 16) + 2)

    def of(self, block: int, size: int) -> bytes:
        start = block * 40503 & 0xFFFF
        return self._bytes[start : start + size]


class HeapReplay:
    """A trace over a heap: every block is filled and checked, and the arena's committed bytes are watched.

    Fields after `run`: committed and physical (peaks above what they were, bytes; the arena's own count, and the
    blocks that the file system has given its segment).
    """

    def __init__(self, session: hc.Session, heap: hc.Heap, trace: Trace) -> None:
        self._heap = heap
        self._trace = trace
        self._words = session.arena.words
        self._segment = f"/dev/shm/{session.arena.name}"
        self._pattern = Pattern(max(trace.events[2::4], default=0))
        self._blocks: list[hc.Block | None] = [None] * trace.blocks
        self._floor = self._words[H_COMMITTED], self._on_disk()
        self.committed = self.physical = 0

    def _on_disk(self) -> int:
        return os.stat(self._segment).st_blocks * 512

    def run(self) -> None:
        """Raises: TraceError at the first wrong byte."""
        words, peak = self._words, 0
        for kind, block, size, _ in self._trace:
            if kind == FREE:
                self._free(block)
            elif kind == REALLOC:
                self._realloc(block, size)
            else:
                self._alloc(block, size, zero=kind == CALLOC)
            if words[H_COMMITTED] > peak:
                peak = words[H_COMMITTED]
                self.physical = max(self.physical, self._on_disk() - self._floor[1])
        self.committed = peak - self._floor[0]
        for block, live in enumerate(self._blocks):
            if live is not None:
                self._free(block)

    def _alloc(self, block: int, size: int, *, zero: bool) -> None:
        live = self._blocks[block] = self._heap.alloc(size, zero=zero)
        view = live.view
        if zero and bytes(view) != bytes(size):
            raise TraceError(f"{self._trace.name}: block {block} of {size} zero bytes has others")
        view[:] = self._pattern.of(block, size)

    def _free(self, block: int) -> None:
        live = self._locate(block)
        self._check(block, live, live.size)
        self._blocks[block] = None
        live.free()

    def _realloc(self, block: int, size: int) -> None:
        live = self._locate(block)
        kept = min(live.size, size)
        self._check(block, live, live.size)
        live.realloc(size)
        self._check(block, live, kept)
        live.view[:] = self._pattern.of(block, size)

    def _locate(self, block: int) -> hc.Block:
        live = self._blocks[block]
        if live is None:
            raise TraceError(f"{self._trace.name}: block {block} is not live")
        return live

    def _check(self, block: int, live: hc.Block, size: int) -> None:
        if bytes(live.view[:size]) != self._pattern.of(block, size):
            raise TraceError(f"{self._trace.name}: the bytes of block {block} are not what was written")


def heap_cost(heap: hc.Heap, trace: Trace) -> int:
    """Nanoseconds of a whole trace, its blocks untouched."""
    blocks: list[hc.Block | None] = [None] * trace.blocks
    events = list(trace)
    before = time.perf_counter_ns()
    for kind, block, size, _ in events:
        if kind == FREE:
            blocks[block].free()  # type: ignore[union-attr]
            blocks[block] = None
        elif kind == REALLOC:
            blocks[block].realloc(size)  # type: ignore[union-attr]
        else:
            blocks[block] = heap.alloc(size, zero=True) if kind == CALLOC else heap.alloc(size)
    elapsed = time.perf_counter_ns() - before
    for live in blocks:
        if live is not None:
            live.free()
    return elapsed
