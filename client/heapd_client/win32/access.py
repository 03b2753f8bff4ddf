"""The bytes behind an address: as a memoryview, or as a pointer of this process for ctypes."""

from __future__ import annotations

from heapd.errors import InvalidArgumentError
from heapd.layout import PAGE_COMMITTED
from heapd.units import PAGE_SHIFT, pages_for

from .arguments import address as as_address
from .arguments import size_t
from .process import process

__all__ = ["memory", "pointer"]


def memory(address: int, size: int) -> memoryview:
    """The arena's bytes from `address` on, writable, whatever lies there; it keeps no block from being freed.

    Raises: InvalidArgumentError if some of them are not committed.
    """
    start, length = as_address(address), size_t(size)
    arena = process().session.arena
    if start + length > arena.size:
        raise InvalidArgumentError(f"{length} bytes from {start:#x} reach beyond the arena ({arena.size:#x} bytes)")
    first = start >> PAGE_SHIFT
    for page, _, info in arena.spans(first, pages_for(start + length) - first):
        if info.state != PAGE_COMMITTED:
            raise InvalidArgumentError(f"the memory at {page << PAGE_SHIFT:#x} is not committed")
    return arena.base[start : start + length]


def pointer(address: int) -> int:
    """Where in this process the byte at `address` is mapped; 0 for NULL.

    Raises: InvalidArgumentError beyond the arena.
    """
    where, arena = as_address(address), process().session.arena
    if where >= arena.size:
        raise InvalidArgumentError(f"{where:#x} is beyond the arena ({arena.size:#x} bytes)")
    return arena.pointer + where if where else 0
