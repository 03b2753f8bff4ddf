"""Who allocates, frees, hands over and gives back at random until it is killed; and who does so and survives."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final

import heapd.mutex
import heapd_client as hc
from heapd.errors import BlockTooLargeError, CannotResizeInPlaceError, HeapFullError
from heapd.units import KIB, MIB, align_up

_LETTER = struct.Struct("<40sQ")  # less than PIPE_BUF: written whole or not at all
_LIBRARY: Final = {heapd.mutex.__file__, *map(str, Path(hc.__file__).parent.glob("*.py"))}
_HOT: Final = str(Path(hc.__file__).parent / "hotpath.py")  # traced, it would see references that are not there

# Shares of all sizes up to here, and the bounds in bytes: of slabs, of small runs, of runs that are cached by size and
# come home to who allocated them, and of runs that are committed in slices.
_SIZES: Final = (
    (0.6, 8, 300),
    (0.75, 300, 9000),
    (0.85, 9000, 64 * KIB),
    (0.995, 64 * KIB, 300 * KIB),
    (1, MIB, 17 * MIB),
)
_FRAMES: Final = ((1, 64 * KIB + 1, 300 * KIB),)


class Post:
    """Letters on their way to one process: a block's handle, and the stamp that its first bytes must be."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._in, fcntl.F_SETPIPE_SZ, 4096)

    def send(self, handle: bytes, stamp: int) -> bool:
        """False if the pipe is full."""
        try:
            return os.write(self._in, _LETTER.pack(handle, stamp)) == _LETTER.size
        except BlockingIOError:
            return False

    def receive(self) -> tuple[bytes, int] | None:
        """The next letter, None if there is none now."""
        try:
            handle, stamp = _LETTER.unpack(os.read(self._out, _LETTER.size))
        except BlockingIOError:
            return None
        return handle, stamp

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)


class Actor:
    """Random operations on heaps that others use at the same time; each block is stamped, and checked before it goes.

    Fields: live (the blocks it holds, with their stamps), handed (stamps of blocks it handed over).
    """

    def __init__(
        self, session: hc.Session, heaps: Sequence[str], inbox: Post, outboxes: Sequence[Post], seed: int
    ) -> None:
        self.live: list[tuple[hc.Block, int]] = []
        self.handed: set[int] = set()
        self._session = session
        self._heaps = [session.open_heap(name) for name in heaps]
        self._random = random.Random(seed)
        self._inbox = inbox
        self._outboxes = outboxes
        self._stamp = seed << 32
        self._sizes, self._most_live = self._random.choice(((_SIZES, 150), (_SIZES, 150), (_FRAMES, 40)))
        self._own: hc.Heap | None = None
        self._closed: str | None = None
        actions: tuple[tuple[Callable[[], None], int], ...] = (
            (self._alloc, 40), (self._free, 20), (self._burst, 4), (self._alloc_many, 3), (self._free_many, 3),
            (self._resize, 8), (self._hand_over, 12), (self._receive, 12), (self._lock, 3), (self._trim, 1),
            (self._compact, 1), (self._close_or_open, 2), (self._private, 1),
        )  # fmt: skip
        self._actions = [action for action, _ in actions]
        self._weights = [weight for _, weight in actions]

    def step(self) -> None:
        """One operation. A heap that is full, or too small for ever, is no error."""
        try:
            self._random.choices(self._actions, self._weights)[0]()
        except (HeapFullError, BlockTooLargeError):
            self._free()

    def check(self) -> None:
        """Every block that is held has its stamp, and none is held twice."""
        for block, stamp in self.live:
            _check(block, stamp)
        assert len({block.address for block, _ in self.live}) == len(self.live)

    def free_all(self) -> None:
        """Hold nothing any more, and cache nothing."""
        self.check()
        for block, _ in self.live:
            block.free()
        self.live.clear()
        if self._own is not None:
            self._own.destroy()
            self._own = None
        if self._closed is not None:
            self._close_or_open()
        for heap in self._heaps:
            heap.trim()

    # -- operations ------------------------------------------------------------------------------------------------
    def _size(self) -> int:
        roll = self._random.random()
        low, high = next(bounds for share, *bounds in self._sizes if roll <= share)
        size = int(low * (high / low) ** self._random.random())
        return size if size < 64 * KIB else align_up(size, 64 * KIB)  # few sizes: what came home is wanted again

    def _heap(self) -> hc.Heap:
        return self._random.choice(self._heaps)

    def _keep(self, block: hc.Block) -> None:
        self._stamp += 1
        block.view[:8] = self._stamp.to_bytes(8, "little")
        self.live.append((block, self._stamp))

    def _alloc(self) -> None:
        if len(self.live) < self._most_live:
            self._keep(self._heap().alloc(self._size()))
        else:
            self._free()

    def _free(self) -> None:
        if self.live:
            block, stamp = self.live.pop(self._random.randrange(len(self.live)))
            _check(block, stamp)
            block.free()

    def _burst(self) -> None:
        """Many of a size, so that batches are leased, and half are given back."""
        heap, size = self._heap(), self._random.choice((16, 64, 200, 4096))
        blocks: list[hc.Block] = []
        try:
            for _ in range(self._random.randrange(200)):
                blocks.append(heap.alloc(size))
        finally:  # the heap may be full
            for block in blocks:
                block.free()

    def _alloc_many(self) -> None:
        for block in self._heap().alloc_many([self._size() % (64 * KIB) + 8 for _ in range(10)]):
            self._keep(block)

    def _free_many(self) -> None:
        for heap in self._heaps:
            doomed = [pair for pair in self.live if pair[0].heap is heap][:8]
            self.live = [pair for pair in self.live if pair not in doomed]
            heap.free_many([block for block, _ in doomed])

    def _resize(self) -> None:
        if self.live:
            block, stamp = self._random.choice(self.live)
            with suppress(CannotResizeInPlaceError):
                block.heap.realloc(block, self._size(), in_place_only=self._random.random() < 0.2)
            _check(block, stamp)

    def _hand_over(self) -> None:
        for pair in self.live[-3:]:
            block, stamp = pair
            # In a heap that frees orphans a block goes when its allocator dies, whoever uses it.
            if block.heap.name != "freeing" and self._random.choice(self._outboxes).send(block.handle.encode(), stamp):
                self.live.remove(pair)
                self.handed.add(stamp)

    def _receive(self) -> None:
        letter = self._inbox.receive()
        while letter is not None:
            handle, stamp = letter
            block = self._session.open(handle)
            _check(block, stamp)
            if len(self.live) < self._most_live and self._random.random() < 0.3:
                self.live.append((block, stamp))
            else:
                block.free()
            letter = self._inbox.receive()

    def _lock(self) -> None:
        heap = self._heap()
        with heap.lock():
            self._keep(heap.alloc(64))

    def _trim(self) -> None:
        self._heap().trim()

    def _compact(self) -> None:
        self._heap().compact()

    def _close_or_open(self) -> None:
        """Have one heap less open, or all again. Blocks that were handed over may be left in it."""
        if self._closed is not None:
            self._heaps.append(self._session.open_heap(self._closed))
            self._closed = None
            return
        heap = self._heap()
        if not any(block.heap is heap for block, _ in self.live):
            self._heaps.remove(heap)
            self._closed = heap.name
            heap.close()

    def _private(self) -> None:
        """Make an anonymous heap, in place of the one before."""
        if self._own is not None:
            self._own.destroy()
        self._own = self._session.create_heap(serialize=self._random.random() < 0.5)
        for block in [self._own.alloc(100) for _ in range(20)][:10]:
            block.free()


def _check(block: hc.Block, stamp: int) -> None:
    found = int.from_bytes(block.view[:8], "little")
    assert found == stamp, f"{block!r} holds the bytes of {found:#x}, not of {stamp:#x}"


def die_at(count: int) -> None:
    """Kill this process before its `count`-th bytecode in the library, counted from now on, outside the hot path."""

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        file = frame.f_code.co_filename
        if file not in _LIBRARY or file == _HOT:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count -= 1
            if count <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
