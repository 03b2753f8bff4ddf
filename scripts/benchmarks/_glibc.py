"""The C library's malloc on a recorded trace, through ctypes: its time, and its peak of resident bytes.

As a program (`python -m scripts.benchmarks._glibc FILE`) it replays a file of events, writes every block,
and prints the peak. A process of its own, because malloc is Python's too: what that had free before is
used up first, and what the replay needs of its own is mapped, not allocated.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.benchmarks._traces import ALIGNED, CALLOC, FREE, MALLOC, REALLOC, Trace

__all__ = ["glibc_cost", "glibc_peak"]

_LOOK_EVERY = 128  # events between two looks at the resident bytes; and after each event over _LARGE bytes
_LARGE = 1 << 16


class Glibc:
    """malloc and its family through ctypes."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        for name, result, arguments in (
            ("malloc", pointer, [size]),
            ("calloc", pointer, [size, size]),
            ("realloc", pointer, [pointer, size]),
            ("aligned_alloc", pointer, [size, size]),
            ("free", None, [pointer]),
            ("memset", pointer, [pointer, ctypes.c_int, size]),
            ("sbrk", pointer, [ctypes.c_ssize_t]),
        ):
            function = getattr(libc, name)
            function.restype, function.argtypes = result, arguments
        self.malloc, self.calloc, self.realloc = libc.malloc, libc.calloc, libc.realloc
        self.aligned_alloc, self.free, self.memset, self.sbrk = libc.aligned_alloc, libc.free, libc.memset, libc.sbrk

    def use_up(self) -> None:
        """Take what this process has free in its heap, so that a replay finds nothing to hide in."""
        for size in (4096, 512, 64, 24):
            end = self.sbrk(0)
            while self.sbrk(0) == end:
                self.malloc(size)


def glibc_cost(trace: Trace) -> int:
    """Nanoseconds of a whole trace, its blocks untouched."""
    glibc = Glibc()
    malloc, calloc, realloc, aligned, free = glibc.malloc, glibc.calloc, glibc.realloc, glibc.aligned_alloc, glibc.free
    blocks: list[int | None] = [None] * trace.blocks
    events = list(trace)
    before = time.perf_counter_ns()
    for kind, block, size, alignment in events:
        if kind == FREE:
            free(blocks[block])
            blocks[block] = None
        elif kind == MALLOC:
            blocks[block] = malloc(size)
        elif kind == REALLOC:
            blocks[block] = realloc(blocks[block], size)
        else:
            blocks[block] = calloc(1, size) if kind == CALLOC else aligned(alignment, size)
    elapsed = time.perf_counter_ns() - before
    for pointer in blocks:
        free(pointer)
    return elapsed


# -- the peak --------------------------------------------------------------------------------------------------------
def glibc_peak(trace: Trace) -> int:
    """The most resident bytes that malloc needs for a trace with every block written, above what was there before."""
    with tempfile.NamedTemporaryFile() as file:
        trace.events.tofile(file)
        file.flush()
        command = [sys.executable, "-m", "scripts.benchmarks._glibc", file.name, str(trace.blocks)]
        root = Path(__file__).parents[2]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=root).stdout)


def _resident() -> int:
    """Resident bytes of this process, counted page by page."""
    fd = os.open("/proc/self/smaps_rollup", os.O_RDONLY)
    try:
        text = os.read(fd, 400)
    finally:
        os.close(fd)
    return int(text[text.index(b"Rss:") + 4 :].split(None, 1)[0]) * 1024


def _peak(events: memoryview, blocks: memoryview) -> int:
    """Replay events over pointers, all of them in mapped memory."""
    glibc = Glibc()
    memset = glibc.memset
    for slot in range(len(blocks)):
        blocks[slot] = 0  # touch it now
    sum(events)
    glibc.use_up()
    floor = peak = _resident()
    for at in range(0, len(events), 4):
        kind, block, size = events[at], events[at + 1], events[at + 2]
        if kind == FREE:
            glibc.free(blocks[block])
        else:
            if kind == REALLOC:
                pointer = glibc.realloc(blocks[block], size)
            elif kind == ALIGNED:
                pointer = glibc.aligned_alloc(events[at + 3], size)
            else:
                pointer = glibc.calloc(1, size) if kind == CALLOC else glibc.malloc(size)
            blocks[block] = pointer or 0
            memset(pointer, 0x5A, size)
        if at % (4 * _LOOK_EVERY) == 0 or size >= _LARGE:
            peak = max(peak, _resident())
    return peak - floor


def main() -> int:
    path, count = Path(sys.argv[1]), int(sys.argv[2])
    size = path.stat().st_size
    if not size:
        print(0)
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as events:
        blocks = mmap.mmap(-1, 8 * max(count, 1))
        print(_peak(memoryview(events).cast("q"), memoryview(blocks).cast("Q")))
        sys.stdout.flush()
        os._exit(0)  # the views are alive, and there is nothing else to end


if __name__ == "__main__":
    sys.exit(main())
