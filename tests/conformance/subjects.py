"""One heap, three ways to reach it: in this process, over a daemon with its mutex, over a daemon without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import heapd_client as hc
from heapd.arena import Arena
from heapd.heap import Heap, collect_statistics, validate_heap
from heapd.records import Entry, HeapStatistics
from tests.arenas import finish
from tests.invariants import everyone, walk_all

SESSION = 1  # number of the session that the in-process heap allocates for


@dataclass
class Piece:
    """A block as a subject gives it out: size and extent in bytes; what the subject itself needs of it is `own`."""

    address: int
    size: int
    extent: int
    generation: int
    own: hc.Block | None = None


class Subject(ABC):
    """The verbs that every way to a heap has."""

    @abstractmethod
    def alloc(self, size: int) -> Piece: ...

    @abstractmethod
    def free(self, piece: Piece) -> None: ...

    @abstractmethod
    def resize(self, piece: Piece, size: int) -> None:
        """In place, or CannotResizeInPlaceError."""

    @abstractmethod
    def read(self, piece: Piece) -> bytes: ...

    @abstractmethod
    def write(self, piece: Piece, text: bytes) -> None: ...

    @abstractmethod
    def entries(self) -> list[Entry]: ...

    @abstractmethod
    def statistics(self) -> HeapStatistics: ...

    @abstractmethod
    def violations(self) -> list[object]: ...

    @abstractmethod
    def compact(self) -> int: ...


class InProcess(Subject):
    """heapd.heap.Heap itself."""

    def __init__(self, arena: Arena, *, maximum: int = 0, max_block: int = 0) -> None:
        arena.prepare_control(0)
        self.arena = arena
        self.heap = Heap(arena, 0, maximum=maximum, max_block=max_block)

    def alloc(self, size: int) -> Piece:
        _, address, generation, extent, _ = self.heap.alloc(size, SESSION)
        return Piece(address, size, extent, generation)

    def free(self, piece: Piece) -> None:
        self.heap.free(piece.address, piece.generation)

    def resize(self, piece: Piece, size: int) -> None:
        _, _, piece.generation, piece.extent, _ = self.heap.resize(
            piece.address, piece.generation, size, in_place_only=True
        )
        piece.size = size

    def read(self, piece: Piece) -> bytes:
        return bytes(self.arena.segment.buffer[piece.address : piece.address + piece.size])

    def write(self, piece: Piece, text: bytes) -> None:
        self.arena.segment.buffer[piece.address : piece.address + piece.size] = text

    def entries(self) -> list[Entry]:
        return walk_all(self.heap)

    def statistics(self) -> HeapStatistics:
        found: HeapStatistics = finish(collect_statistics(self.heap, everyone))
        return found

    def violations(self) -> list[object]:
        return list(finish(validate_heap(self.heap, everyone)))

    def compact(self) -> int:
        largest: int = finish(self.heap.compact())
        return largest


class OverDaemon(Subject):
    """A client's heap."""

    def __init__(self, heap: hc.Heap) -> None:
        self.heap = heap

    def alloc(self, size: int) -> Piece:
        block = self.heap.alloc(size)
        return Piece(block.address, block.size, block.extent, block.generation, block)

    def free(self, piece: Piece) -> None:
        self._block(piece).free()

    def resize(self, piece: Piece, size: int) -> None:
        block = self._block(piece).realloc(size, in_place_only=True)
        piece.size, piece.extent, piece.generation = block.size, block.extent, block.generation

    def read(self, piece: Piece) -> bytes:
        return bytes(self._block(piece).view)

    def write(self, piece: Piece, text: bytes) -> None:
        self._block(piece).view[:] = text

    def entries(self) -> list[Entry]:
        return list(self.heap.walk())

    def statistics(self) -> HeapStatistics:
        return self.heap.statistics()

    def violations(self) -> list[object]:
        return list(self.heap.validate())

    def compact(self) -> int:
        return self.heap.compact()

    @staticmethod
    def _block(piece: Piece) -> hc.Block:
        assert piece.own is not None
        return piece.own
