"""What a stress client holds, written down where its death does not reach: a block of the control heap, one a client.

    guards     a word a work heap: how often this client has raised the heap's guard
    entries    PLACES of 48 bytes each: number (8 bytes, 0: empty), heap (4), owner of the stamp (4), address (8),
               sequence of the stamp (8), length (8), check (4), 4 unused

An entry says that the block at its address holds, whole, what its stamp says. So the client fills a block before it
writes the entry, and empties the entry before it changes the block or lets it go; the entry's number is stored last.
A client killed at any instant leaves an estate that is true, and at most one operation's blocks outside it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from heapd.workloads.checked import Stamp

__all__ = ["PLACES", "Asset", "Estate", "estate_name", "estate_size"]

PLACES = 256  # more than a client ever holds
_ENTRY = struct.Struct("<QIIQQQI4x")
_ENTRY_WORDS = _ENTRY.size // 8
_SEALED = struct.Struct("<QIIQQQ")


class Asset(NamedTuple):
    """A block of an estate. Fields: heap (a work heap's number), address, stamp, length (bytes)."""

    heap: int
    address: int
    stamp: Stamp
    length: int


def estate_name(client: int) -> str:
    """The name under which a client's estate is published."""
    return f"estate/{client}"


def estate_size(heaps: int) -> int:
    """Bytes of an estate."""
    return heaps * 8 + PLACES * _ENTRY.size


class Estate:
    """An estate in its block's view. One process writes it: the client's, or its successor's."""

    def __init__(self, view: memoryview, heaps: int) -> None:
        self._bytes = view
        self._words = view.cast("Q")
        self._heaps = heaps
        self._free = [place for place in range(PLACES) if not self._words[self._word(place)]]

    def _word(self, place: int) -> int:
        return self._heaps + place * _ENTRY_WORDS

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another block."""
        return not self._free

    def enter(self, asset: Asset) -> int:
        """Write an entry. Returns: its place."""
        place = self._free.pop()
        first = self._word(place)
        plain = (asset.heap, asset.stamp.owner, asset.address, asset.stamp.sequence, asset.length)
        packed = _ENTRY.pack(place + 1, *plain, _seal(place, *plain))
        self._bytes[(first + 1) * 8 : (first + _ENTRY_WORDS) * 8] = packed[8:]
        self._words[first] = place + 1
        return place

    def strike(self, place: int) -> None:
        """Empty an entry."""
        self._words[self._word(place)] = 0
        self._free.append(place)

    def assets(self) -> Iterator[tuple[int, Asset]]:
        """The entries, with their places."""
        for place in range(PLACES):
            number, *plain, check = _ENTRY.unpack_from(self._bytes, self._word(place) * 8)
            if number and (number != place + 1 or check != _seal(place, *plain)):
                raise ValueError(f"entry {place} of an estate was scribbled over")
            if number:
                heap, owner, address, sequence, length = plain
                yield place, Asset(heap, address, Stamp(owner, sequence), length)

    def guard(self, heap: int) -> int:
        """How often the client has raised a heap's guard."""
        value: int = self._words[heap]
        return value

    def count_guard(self, heap: int) -> None:
        """The client has raised the guard."""
        self._words[heap] += 1


def _seal(place: int, *plain: int) -> int:
    return zlib.crc32(_SEALED.pack(place, *plain))
