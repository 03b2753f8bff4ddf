"""Where stress clients meet: one block of the control heap with a row a client and mailboxes between neighbours.

    rows       one a client, 64 bytes: phase, operations, errors, live blocks, blocks checked, bytes lost, process
               id, lives
    guards     one a work heap, 64 bytes: a count that every client raises while it holds that heap's lock
    mailboxes  LANES a client, 64 bytes each: number (8 bytes), letter (41), check (4), 3 unused, taken (8)

Each word has one writer (the guards: the lock's holder), so plain aligned stores are enough: the client writes its row
and the number, letter and check of its outgoing mailboxes; the receiver of a mailbox writes `taken`. A mailbox is
full while number differs from taken. The check covers number and letter, so that a reader never believes half of
them. A letter is a work heap's number (one byte) and a handle.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum

__all__ = ["LANES", "Board", "Phase", "Row", "board_size", "neighbours"]

LANES = 4
_ROW_SIZE = 64
_ROW_WORDS = _ROW_SIZE // 8
_LETTER = struct.Struct("<Q41sI3x")
_TAKEN = 7  # word of a mailbox


class Phase(IntEnum):
    """How far a client is; only ever goes up."""

    STARTING = 0
    READY = 1
    RUNNING = 2
    SENT = 3  # hands over no more blocks
    FREED = 4  # holds no more blocks
    ENDED = 5  # also what the parent writes for one that died


class Row(IntEnum):
    """Words of a client's row."""

    PHASE = 0
    OPERATIONS = 1
    ERRORS = 2
    LIVE = 3
    CHECKED = 4  # times that a block was compared with what was written into it
    LOST = 5  # bytes of blocks that had changed
    PID = 6  # of the client's process
    LIVES = 7  # processes that it has been so far


def board_size(clients: int, heaps: int) -> int:
    """Bytes of the board."""
    return (clients + heaps + clients * LANES) * _ROW_SIZE


def neighbours(client: int, clients: int) -> list[int]:
    """To whom the lanes of a client lead: at most LANES others, each once."""
    distances = dict.fromkeys(distance % clients for distance in (1, 2, clients // 3, clients // 2))
    return [(client + distance) % clients for distance in distances if distance]


class Board:
    """The board in its block's view."""

    def __init__(self, view: memoryview, clients: int, heaps: int) -> None:
        self._bytes = view
        self._words = view.cast("Q")
        self._clients = clients
        self._heaps = heaps

    def get(self, client: int, word: Row) -> int:
        """A word of a client's row."""
        value: int = self._words[client * _ROW_WORDS + word]
        return value

    def put(self, client: int, word: Row, value: int) -> None:
        """Store a word of a client's row: its own, or that of a client that has died."""
        self._words[client * _ROW_WORDS + word] = value

    def add(self, client: int, word: Row, count: int = 1) -> None:
        """Add to a word of a client's row, which only that client writes."""
        self._words[client * _ROW_WORDS + word] += count

    def column(self, word: Row) -> Sequence[int]:
        """That word of every client."""
        return self._words[word : self._clients * _ROW_WORDS : _ROW_WORDS]

    def all_reached(self, phase: Phase, clients: Sequence[int] | None = None) -> bool:
        """Whether all (or those) clients are in that phase or a later one."""
        if clients is None:
            return min(self.column(Row.PHASE)) >= phase
        return all(self.get(client, Row.PHASE) >= phase for client in clients)

    def guard(self, heap: int) -> int:
        """The count of a heap's guard."""
        value: int = self._words[(self._clients + heap) * _ROW_WORDS]
        return value

    def raise_guard(self, heap: int) -> None:
        """Add one; two at the same time would lose one, so the caller holds the heap's lock."""
        self._words[(self._clients + heap) * _ROW_WORDS] += 1

    def _mailbox(self, sender: int, lane: int) -> int:
        return (self._clients + self._heaps + sender * LANES + lane) * _ROW_WORDS

    def is_empty(self, sender: int, lane: int) -> bool:
        """Whether the sender may use the lane again."""
        first = self._mailbox(sender, lane)
        return bool(self._words[first] == self._words[first + _TAKEN])

    def send(self, sender: int, lane: int, letter: bytes) -> None:
        """Put a letter into an empty mailbox; its number is stored last."""
        first = self._mailbox(sender, lane)
        number = self._words[first] + 1
        packed = _LETTER.pack(number, letter, _seal(number, letter))
        self._bytes[(first + 1) * 8 : first * 8 + _LETTER.size] = packed[8:]
        self._words[first] = number

    def receive(self, sender: int, lane: int) -> bytes | None:
        """Take the letter out of a mailbox; None while it is empty."""
        first = self._mailbox(sender, lane)
        if self.is_empty(sender, lane):
            return None
        number, letter, seal = _LETTER.unpack_from(self._bytes, first * 8)
        if seal != _seal(number, letter):
            return None  # seen before all of it was written; next time
        self._words[first + _TAKEN] = number
        taken: bytes = letter
        return taken


def _seal(number: int, letter: bytes) -> int:
    return zlib.crc32(letter, number & 0xFFFFFFFF)
