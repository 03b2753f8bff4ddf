"""Shared memory heaps for processes: allocate by a daemon, read and write in place.

    import heapd_client as hc

    with hc.connect() as session:
        heap = session.create_heap("frames")
        block = heap.alloc(1 << 20)
        block.view[:5] = b"hello"
        send(block.handle)              # 40 bytes name it in any other process: session.open(handle)

All errors are below HeapdError; those not named here are in `heapd_client.errors`, or reached as attributes.
"""

from typing import TYPE_CHECKING

from heapd import __version__
from heapd.errors import (
    BlockInUseError,
    ClosedError,
    DaemonError,
    HeapdError,
    HeapDestroyedError,
    HeapFullError,
    InvalidArgumentError,
    LockTimeoutError,
    StaleHandleError,
)
from heapd.layout import Handle
from heapd.records import Entry, EntryKind, HeapInfo, HeapStatistics, Violation

from . import errors
from .block import Block
from .control import daemon_status, stop_daemon
from .heap import Heap
from .locking import HeldLock
from .session import Session, connect

__all__ = [
    "Block",
    "BlockInUseError",
    "ClosedError",
    "DaemonError",
    "Entry",
    "EntryKind",
    "Handle",
    "Heap",
    "HeapDestroyedError",
    "HeapFullError",
    "HeapInfo",
    "HeapStatistics",
    "HeapdError",
    "HeldLock",
    "InvalidArgumentError",
    "LockTimeoutError",
    "Session",
    "StaleHandleError",
    "Violation",
    "__version__",
    "connect",
    "daemon_status",
    "errors",
    "stop_daemon",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[HeapdError]:
        if name in errors.__all__:
            return getattr(errors, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
