"""Recorded malloc traces. Imports nothing of heapd: the process that measures the C library's malloc stays small.

A trace is gzip of ASCII lines:

    a ID SIZE          malloc           m ID SIZE ALIGN    aligned allocation
    c ID SIZE          calloc           r ID SIZE          realloc of the live block ID, which may move
    f ID               free             t N                the next lines are thread N's (skipped: one thread replays)

IDs count up from 0 in order of birth and are never used again; what is live at the end, a replay frees.
"""

from __future__ import annotations

import gzip
from array import array
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ALIGNED", "CALLOC", "FREE", "MALLOC", "REALLOC", "Trace", "TraceError", "read_trace"]

MALLOC, CALLOC, ALIGNED, REALLOC, FREE = range(5)
_KINDS = {"a": MALLOC, "c": CALLOC, "m": ALIGNED, "r": REALLOC, "f": FREE}


class TraceError(Exception):
    """A file that is no trace, or a replay that found wrong bytes; the message says where."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Fields: name, events (four numbers each: kind, ID, size, alignment), blocks (IDs are below it)."""

    name: str
    events: array[int]
    blocks: int

    def __len__(self) -> int:
        return len(self.events) // 4

    @property
    def live_peak(self) -> int:
        """The most bytes that are live at once, as asked for."""
        sizes: dict[int, int] = {}
        live = peak = 0
        for kind, block, size, _ in self:
            live += (0 if kind == FREE else size) - sizes.pop(block, 0)
            if kind != FREE:
                sizes[block] = size
            peak = max(peak, live)
        return peak

    def __iter__(self) -> zip[tuple[int, int, int, int]]:
        events = self.events
        return zip(events[::4], events[1::4], events[2::4], events[3::4], strict=True)


def read_trace(path: Path) -> Trace:
    """Raises: TraceError, OSError."""
    events, blocks = array("q"), 0
    with gzip.open(path, "rt", encoding="ascii") as lines:
        for number, line in enumerate(lines, 1):
            kind, *rest = line.split() or ["#"]
            if kind in ("#", "t"):
                continue
            try:
                block, size, alignment = (int(part) for part in [*rest, "0", "0"][:3])
                events.extend((_KINDS[kind], block, size, alignment))
            except (KeyError, ValueError):
                raise TraceError(f"{path}, line {number}: {line.strip()!r} is no event of a trace") from None
            blocks = max(blocks, block + 1)
    return Trace(path.name.partition(".")[0], events, blocks)
