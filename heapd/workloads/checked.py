"""Blocks that tell whether anybody else wrote into them: a header and a pattern, both under a CRC-32.

offset  size  field
0       4     CRC-32 of all that follows
4       4     magic
8       8     length of the block, bytes
16      8     sequence number, the writer's
24      4     owner: who wrote it, by number
28      4     zero
32      ...   bytes of the noise, from an offset that owner and sequence determine
"""

from __future__ import annotations

import random
import struct
import zlib
from typing import NamedTuple

from heapd.units import MIB

__all__ = [
    "HEADER_SIZE",
    "MAX_SIZE",
    "CheckError",
    "Stamp",
    "check",
    "check_prefix",
    "check_zero",
    "fill",
    "read_stamp",
]

_HEADER = struct.Struct("<IIQQII")
HEADER_SIZE = _HEADER.size
MAX_SIZE = MIB
_MAGIC = 0x48454150
_NOISE = random.Random(0x68656170).randbytes(2 * MAX_SIZE)  # made once, shared by forked clients


class CheckError(Exception):
    """A block does not hold what was written into it."""


class Stamp(NamedTuple):
    """Who wrote a block and which of its writes that was."""

    owner: int
    sequence: int


def _noise(stamp: Stamp, length: int) -> memoryview:
    start = (stamp.owner * 7919 + stamp.sequence * 104729) % MAX_SIZE
    return memoryview(_NOISE)[start : start + length]


def fill(view: memoryview, stamp: Stamp) -> None:
    """Write header and pattern over the whole block (HEADER_SIZE to MAX_SIZE bytes)."""
    view[HEADER_SIZE:] = _noise(stamp, len(view) - HEADER_SIZE)
    _HEADER.pack_into(view, 0, 0, _MAGIC, len(view), stamp.sequence, stamp.owner, 0)
    struct.pack_into("<I", view, 0, zlib.crc32(view[4:]))


def read_stamp(view: memoryview) -> Stamp:
    """Who says that they wrote the block; `check` with it finds whether the whole block agrees."""
    _, _, _, sequence, owner, _ = _HEADER.unpack_from(view)
    return Stamp(owner, sequence)


def check(view: memoryview, stamp: Stamp) -> None:
    """Raises: CheckError if the block is not exactly as `fill(view, stamp)` left it."""
    crc, magic, length, sequence, owner, _ = _HEADER.unpack_from(view)
    if (magic, length, sequence, owner) != (_MAGIC, len(view), stamp.sequence, stamp.owner):
        raise CheckError(
            f"the header says magic {magic:#x}, {length} bytes, write {sequence} of client {owner}; expected "
            f"{len(view)} bytes, write {stamp.sequence} of client {stamp.owner}"
        )
    found = zlib.crc32(view[4:])
    if found != crc:
        raise CheckError(f"CRC-32 is {found:#010x}, the header says {crc:#010x}; {_first_fault(view, stamp)}")


def _first_fault(view: memoryview, stamp: Stamp) -> str:
    expected = _noise(stamp, len(view) - HEADER_SIZE)
    body = view[HEADER_SIZE:]
    faults = [index for index in range(len(body)) if body[index] != expected[index]]
    return f"{len(faults)} bytes differ, the first at offset {HEADER_SIZE + faults[0]}" if faults else "body as written"


def check_prefix(view: memoryview, stamp: Stamp, length: int) -> None:
    """Raises: CheckError if the first bytes are not those of a block of `length` bytes that `stamp` filled."""
    kept = min(len(view), length) - HEADER_SIZE
    if view[HEADER_SIZE : HEADER_SIZE + kept] != _noise(stamp, kept):
        raise CheckError(f"resized from {length} to {len(view)} bytes, and what both hold is not the same")


def check_zero(view: memoryview) -> None:
    """Raises: CheckError if any byte is not zero."""
    dirty = len(view) - bytes(view).count(0)
    if dirty:
        raise CheckError(f"{dirty} of {len(view)} bytes of a zeroed block are not zero")
