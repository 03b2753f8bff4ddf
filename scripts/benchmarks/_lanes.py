"""Ways to hand frames from a producer process to a consumer process: heapd, and what one would write without it.

A lane is two ends. `put(number)` fills a frame and sends it; `take()` receives one, checks it, drops it and returns
the producer's clock. Every lane fills the same way (one copy of as many bytes, then the number and the clock in the
first bytes and the number in the last), checks the same way (the number in the first and last bytes), and has the same
number of frames in flight. What the two ends need is made by `open_lane` in the process that starts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.context import SpawnContext
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple, Protocol

import heapd_client as hc

__all__ = ["LANES", "Consumer", "Producer", "Setup", "open_lane"]

_WORD = 8  # bytes of a number in a frame
_IN_FLIGHT_LOST = "the consumer found a frame that is not the next one"


class Setup(NamedTuple):
    """What both ends of a lane get: kind, size (bytes a frame), parts (of its kind's making)."""

    kind: str
    size: int
    parts: Any


class Producer(Protocol):
    """The end that fills."""

    def put(self, number: int) -> None: ...

    def close(self) -> None: ...


class Consumer(Protocol):
    """The end that checks."""

    def take(self, number: int) -> int: ...

    def close(self) -> None: ...


def _fill(view: memoryview, source: bytes, number: int) -> None:
    """Write a frame: all of its bytes, and what identifies it."""
    view[:] = source
    view[:_WORD] = number.to_bytes(_WORD, "little")
    view[-_WORD:] = number.to_bytes(_WORD, "little")
    view[_WORD : 2 * _WORD] = time.monotonic_ns().to_bytes(_WORD, "little")


def _check(view: memoryview | bytes, number: int) -> int:
    """Look at a frame; when it was filled (ns, the monotonic clock that processes share)."""
    wanted = number.to_bytes(_WORD, "little")
    if view[:_WORD] != wanted or view[-_WORD:] != wanted:
        raise RuntimeError(_IN_FLIGHT_LOST)
    return int.from_bytes(view[_WORD : 2 * _WORD], "little")


def _bytes(segment: SharedMemory, size: int) -> memoryview:
    """The frame in a segment: it may be larger, by a part of a page."""
    assert segment.buf is not None
    return segment.buf[:size]


# -- heapd -----------------------------------------------------------------------------------------------------------
class _HeapdProducer:
    """Allocates, fills, sends the handle."""

    def __init__(self, setup: Setup) -> None:
        endpoint, self._line, _, self._slots = setup.parts
        self._size, self._source = setup.size, b"\x5a" * setup.size
        self._session = hc.connect(endpoint, autostart=False)
        self._heap = self._session.open_heap("frames")

    def close(self) -> None:
        self._session.close()

    def put(self, number: int) -> None:
        self._slots.acquire()
        block = self._heap.alloc(self._size)
        _fill(block.view, self._source, number)
        self._line.send_bytes(block.handle.encode())


class _HeapdConsumer:
    """Opens the handle, checks, frees."""

    def __init__(self, setup: Setup) -> None:
        endpoint, _, self._line, self._slots = setup.parts
        self._session = hc.connect(endpoint, autostart=False)
        self._heap = self._session.open_heap("frames")

    def close(self) -> None:
        self._session.close()

    def take(self, number: int) -> int:
        block = self._session.open(self._line.recv_bytes())
        filled = _check(block.view, number)
        block.free()
        self._slots.release()
        return filled


# -- a ring of segments that are used again --------------------------------------------------------------------------
class _Ring:
    """The segments of a ring, as either end has them."""

    def __init__(self, names: list[str], size: int) -> None:
        self._segments = [SharedMemory(name) for name in names]
        self.views = [_bytes(segment, size) for segment in self._segments]

    def close(self) -> None:
        for view in self.views:
            view.release()
        for segment in self._segments:
            segment.close()


class _RingProducer:
    """Takes a frame that came back, fills it, sends its index."""

    def __init__(self, setup: Setup) -> None:
        names, self._line, _, _, self._returned = setup.parts
        self._source = b"\x5a" * setup.size
        self._ring = _Ring(names, setup.size)
        self._views = self._ring.views
        self.close = self._ring.close

    def put(self, number: int) -> None:
        index = self._returned.recv_bytes()
        _fill(self._views[index[0]], self._source, number)
        self._line.send_bytes(index)


class _RingConsumer:
    """Receives an index, checks the frame, sends the index back."""

    def __init__(self, setup: Setup) -> None:
        names, _, self._line, self._back, _ = setup.parts
        self._ring = _Ring(names, setup.size)
        self._views = self._ring.views
        self.close = self._ring.close
        for index in range(len(names)):
            self._back.send_bytes(bytes([index]))

    def take(self, number: int) -> int:
        index = self._line.recv_bytes()
        filled = _check(self._views[index[0]], number)
        self._back.send_bytes(index)
        return filled


class _NothingToClose:
    def close(self) -> None:
        pass


# -- a segment for each frame ----------------------------------------------------------------------------------------
class _SegmentProducer(_NothingToClose):
    """Creates a segment, fills it, sends its name."""

    def __init__(self, setup: Setup) -> None:
        self._line, _, self._slots = setup.parts
        self._size, self._source = setup.size, b"\x5a" * setup.size

    def put(self, number: int) -> None:
        self._slots.acquire()
        segment = SharedMemory(create=True, size=self._size)
        _fill(_bytes(segment, self._size), self._source, number)
        self._line.send_bytes(segment.name.encode())
        segment.close()


class _SegmentConsumer(_NothingToClose):
    """Attaches, checks, unlinks."""

    def __init__(self, setup: Setup) -> None:
        _, self._line, self._slots = setup.parts
        self._size = setup.size

    def take(self, number: int) -> int:
        segment = SharedMemory(self._line.recv_bytes().decode())
        filled = _check(_bytes(segment, self._size), number)
        segment.close()
        segment.unlink()
        self._slots.release()
        return filled


# -- pickled ---------------------------------------------------------------------------------------------------------
class _QueueProducer(_NothingToClose):
    """Fills a buffer of its own and puts a copy of it through a multiprocessing.Queue."""

    def __init__(self, setup: Setup) -> None:
        self._queue, self._slots = setup.parts
        self._source, self._frame = b"\x5a" * setup.size, bytearray(setup.size)

    def put(self, number: int) -> None:
        self._slots.acquire()
        _fill(memoryview(self._frame), self._source, number)
        self._queue.put(bytes(self._frame))


class _QueueConsumer(_NothingToClose):
    """Gets and checks."""

    def __init__(self, setup: Setup) -> None:
        self._queue, self._slots = setup.parts

    def take(self, number: int) -> int:
        filled = _check(self._queue.get(), number)
        self._slots.release()
        return filled


# -- making them -----------------------------------------------------------------------------------------------------
LANES: dict[str, tuple[Callable[[Setup], Producer], Callable[[Setup], Consumer]]] = {
    "heapd": (_HeapdProducer, _HeapdConsumer),
    "ring": (_RingProducer, _RingConsumer),
    "segment": (_SegmentProducer, _SegmentConsumer),
    "queue": (_QueueProducer, _QueueConsumer),
}


@contextmanager
def open_lane(kind: str, size: int, in_flight: int, context: SpawnContext, endpoint: str) -> Iterator[Setup]:
    """What the two ends of a lane share, taken away again at the end."""
    with ExitStack() as stack:
        receiver, sender = context.Pipe(duplex=False)
        stack.callback(receiver.close)
        stack.callback(sender.close)
        slots = context.BoundedSemaphore(in_flight)
        parts: dict[str, Callable[[], Any]] = {
            "heapd": lambda: (endpoint, sender, receiver, slots),
            "ring": lambda: (_ring(stack, size, in_flight), sender, receiver, *_way_back(stack, context)),
            "segment": lambda: (sender, receiver, slots),
            "queue": lambda: (context.Queue(), slots),
        }
        yield Setup(kind, size, parts[kind]())


def _ring(stack: ExitStack, size: int, in_flight: int) -> list[str]:
    """Segments of a ring; their names."""
    segments = [SharedMemory(create=True, size=size) for _ in range(in_flight)]
    for segment in segments:
        stack.callback(segment.unlink)
        stack.callback(segment.close)
    return [segment.name for segment in segments]


def _way_back(stack: ExitStack, context: SpawnContext) -> tuple[Any, Any]:
    receiver, sender = context.Pipe(duplex=False)
    stack.callback(receiver.close)
    stack.callback(sender.close)
    return sender, receiver
