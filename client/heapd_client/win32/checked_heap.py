"""A heap with debug checking: known bytes behind blocks, in freed ones and in new ones, and HeapValidate to miss them.

Windows takes HEAP_TAIL_CHECKING_ENABLED and HEAP_FREE_CHECKING_ENABLED from the process's debug flags alone; here
HeapCreate does. The fillers are Windows':

    tail checking    16 bytes of 0xAB follow a block's last byte; underneath, the block is so much larger
    free checking    a freed block is filled with EE FE EE FE from its 17th byte on; a new one, in whole DWORDs, with
                     0D F0 AD BA

The first 16 bytes of a freed block say that it was filled, and as which block: so every process that validates the
heap knows what to expect, and expects nothing of free memory that was something else since.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from struct import Struct
from typing import Final

from heapd.layout import F_FREE_CHECK, F_TAIL_CHECK, TAIL
from heapd.records import Entry, EntryKind
from heapd.units import MIB, align_down, align_up

from ..block import Block
from ..heap import Heap
from .constants import HEAP_NO_SERIALIZE, SIZE_T_MAX
from .open_heap import OpenHeap

__all__ = ["CheckedHeap", "tail_of"]

_FREED: Final = (0xFEEEFEEE).to_bytes(4, "little")
_NEW: Final = (0xBAADF00D).to_bytes(4, "little")
_MARK: Final = Struct("<QQ")
_MAGIC: Final = int.from_bytes(b"heapdfre", "little")
_EXTENT_BITS: Final = 36
_STEP: Final = MIB  # bytes filled or compared at once


def tail_of(flags: int) -> int:
    """Bytes of filler behind each block of a heap with these flags (layout.F_*)."""
    return len(TAIL) if flags & F_TAIL_CHECK else 0


def _mark(address: int, extent: int, generation: int) -> bytes:
    """The first 16 bytes of a freed block: which block it was."""
    return _MARK.pack(_MAGIC ^ address, (generation << _EXTENT_BITS | extent) & SIZE_T_MAX)


class CheckedHeap(OpenHeap):
    """An OpenHeap with one kind of checking, or both. Its functions take no front end's short way."""

    def __init__(self, heap: Heap) -> None:
        super().__init__(heap)
        self._tail = tail_of(heap.info.flags)
        self._fills = bool(heap.info.flags & F_FREE_CHECK)
        self._bytes = heap.mapping.base

    def _whole(self, flags: int) -> AbstractContextManager[object]:
        """The heap's lock round a function and its fillers, so that nobody validates in between."""
        if self.is_serialized and not flags & int(HEAP_NO_SERIALIZE):
            return self.heap.lock()
        return nullcontext()

    def alloc(self, flags: int, size: int, zero: bool) -> int:
        with self._whole(flags):
            address = super().alloc(flags, min(size + self._tail, SIZE_T_MAX), zero)
            if self._fills and not zero:
                self._fill(address, address + align_down(size, 4), _NEW)
            self._write_tail(address + size)
        return address

    def realloc(self, flags: int, address: int, size: int, *, zero: bool, in_place: bool) -> int:
        return super().realloc(flags, address, min(size + self._tail, SIZE_T_MAX), zero=zero, in_place=in_place)

    def _resize(self, flags: int, block: Block, size: int, zero: bool) -> None:
        old_size = block.size
        with self._whole(flags):
            try:
                super()._resize(flags, block, size, False)
                self._fill_grown(block.address, old_size, size, zero)
            except BaseException:  # has it the new size, or the old one?
                self._write_tail(block.address + self.find(block.address).size - self._tail)
                raise

    def _fill_grown(self, address: int, old_size: int, size: int, zero: bool) -> None:
        old_size, size = old_size - self._tail, size - self._tail
        if zero:
            self.heap.mapping.zero(address + old_size, max(size - old_size, 0))
        elif self._fills:
            self._fill(address + align_up(old_size, 4), address + align_down(size, 4), _NEW)
        self._write_tail(address + size)

    def free(self, flags: int, address: int) -> None:
        with self._whole(flags):
            block = self.find(address)
            if self._fills:
                self._fill(address + _MARK.size, address + block.extent, _FREED)
                form = block.heap.mapping.shape.word_format(block.slot)
                self._bytes[address : address + _MARK.size] = _mark(address, block.extent, form.generation(block.word))
            super().free(flags, address)

    def size_of(self, address: int) -> int:
        return super().size_of(address) - self._tail

    def validate(self, flags: int, address: int) -> bool:
        with self._whole(flags):
            if not super().validate(flags, address):
                return False
            if address:
                return self._has_tail(address + self.size_of(address))
            return not any(self._damaged(self.heap.walk()))

    # -- fillers -----------------------------------------------------------------------------------------------------
    def _fill(self, start: int, end: int, pattern: bytes) -> None:
        while start < end:
            size = min(_STEP, end - start)
            self._bytes[start : start + size] = pattern * (size // len(pattern))
            start += size

    def _write_tail(self, end: int) -> None:
        if self._tail:
            self._bytes[end : end + self._tail] = TAIL

    def _has_tail(self, end: int) -> bool:
        return self._bytes[end : end + self._tail] == TAIL[: self._tail]

    def _damaged(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        """Entries whose fillers are not as they were written."""
        for entry in entries:
            if entry.kind is EntryKind.BUSY:
                if not self._has_tail(entry.address + entry.size - self._tail):
                    yield entry
            elif self._was_filled(entry) and not self._is_filled(entry):
                yield entry

    def _was_filled(self, entry: Entry) -> bool:
        """A free block that nobody was given since it was filled. Freeing may have counted its generation up."""
        if not self._fills or entry.kind not in (EntryKind.FREE, EntryKind.CACHED) or not entry.generation:
            return False
        found = self._bytes[entry.address : entry.address + _MARK.size]
        return any(found == _mark(entry.address, entry.extent, entry.generation - back) for back in (0, 1))

    def _is_filled(self, entry: Entry) -> bool:
        end = entry.address + entry.extent
        for start in range(entry.address + _MARK.size, end, _STEP):
            size = min(_STEP, end - start)
            if self._bytes[start : start + size] != _FREED * (size // 4):
                return False
        return True
