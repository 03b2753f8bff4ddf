"""Who else gives out 64 bytes: each as its careful user would call it, in a loop of its own that does nothing else."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.heap import BufferWrapper
from multiprocessing.managers import SharedMemoryManager
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import heapd_client as hc
from scripts.benchmarks._turns import Loop

__all__ = [
    "SIZE",
    "buffer_wrapper",
    "free",
    "heapd",
    "heapd_view",
    "iceoryx",
    "iceoryx_publisher",
    "iceoryx_view",
    "malloc",
    "malloc_free",
    "managed_segment",
    "pairs",
    "segment",
]

SIZE = 64  # bytes
_clock = time.perf_counter_ns

libc = ctypes.CDLL(None)
malloc: Callable[[int], int] = libc.malloc
free: Callable[[int], None] = libc.free
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]


def pairs(pair: Callable[[], object]) -> Loop:
    """A loop over anything that takes so long that the call does not matter."""

    def run(count: int) -> int:
        before = _clock()
        for _ in range(count):
            pair()
        return _clock() - before

    return run


# -- below a microsecond: the loop is written out --------------------------------------------------------------------
def malloc_free(count: int) -> int:
    """malloc + free through ctypes, with argument and result types set."""
    take, give = malloc, free
    before = _clock()
    for _ in range(count):
        pointer = take(SIZE)
        give(pointer)
    return _clock() - before


def heapd(heap: hc.Heap) -> Loop:
    """`block = heap.alloc(64); block.free()`."""

    def run(count: int) -> int:
        before = _clock()
        for _ in range(count):
            block = heap.alloc(SIZE)
            block.free()
        return _clock() - before

    return run


def heapd_view(heap: hc.Heap) -> Loop:
    """The same with a view taken and a byte written."""

    def run(count: int) -> int:
        before = _clock()
        for _ in range(count):
            block = heap.alloc(SIZE)
            block.view[0] = 1
            block.free()
        return _clock() - before

    return run


def iceoryx(publisher: Any) -> Loop:
    """Loan a sample and drop it."""

    def run(count: int) -> int:
        before = _clock()
        for _ in range(count):
            sample = publisher.loan_slice_uninit(SIZE)
            del sample  # 30 ns less than sample.delete()
        return _clock() - before

    return run


def iceoryx_view(publisher: Any) -> Loop:
    """Loan a sample, write a byte through its payload, drop it."""

    def run(count: int) -> int:
        before = _clock()
        for _ in range(count):
            sample = publisher.loan_slice_uninit(SIZE)
            sample.payload()[0] = 1
            del sample
        return _clock() - before

    return run


# -- above -----------------------------------------------------------------------------------------------------------
def segment() -> None:
    """Create a SharedMemory, close and unlink it."""
    shared = SharedMemory(create=True, size=SIZE)
    shared.close()
    shared.unlink()


def managed_segment(manager: SharedMemoryManager) -> Callable[[], None]:
    """As `segment`, through a SharedMemoryManager."""

    def pair() -> None:
        shared = manager.SharedMemory(SIZE)
        shared.close()
        shared.unlink()

    return pair


def buffer_wrapper() -> None:
    """A block of multiprocessing.heap, dropped at once."""
    BufferWrapper(SIZE)


@contextmanager
def iceoryx_publisher() -> Iterator[Any]:
    """A publisher of iceoryx2 that loans slices of bytes; None where iceoryx2 is not installed."""
    try:
        import iceoryx2 as iox2  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        yield None
        return
    iox2.set_log_level(iox2.LogLevel.Error)
    node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
    name = iox2.ServiceName.new("heapd/bench")
    service = node.service_builder(name).publish_subscribe(iox2.Slice[ctypes.c_uint8]).open_or_create()
    publisher = service.publisher_builder().initial_max_slice_len(SIZE).create()
    yield publisher
    publisher.delete()
