"""The journal that writes down: changes of one request together with its answer, as one record.

`commit` comes after a request was executed and before its answer is sent. Until then nothing is recorded of it, and
after it everything: whoever died in between asks again, and is either new or answered from memory. Only then the
stores that take blocks back and the removals of memory, which had to wait, are carried out; `applied` says so.

Compaction retells all records to the other log, in slices of the loop, while new records go to both, and then makes
that one count. So there is no snapshot format: a snapshot is a log that begins by retelling.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Final

import msgpack

from heapd.arena import SHM_ADVICE, shm_left
from heapd.errors import HeapFullError, SegmentError
from heapd.journal import WORD, Change, Journal
from heapd.manager.ledger.volume import Log, Volume
from heapd.units import MIB, format_size

if TYPE_CHECKING:
    from heapd.manager.sessions import Session

__all__ = ["Ledger", "Telling"]

log = logging.getLogger("heapd.manager")

# What a retelling is made of: session number, requests, request id, answer, changes; as a record, but its sequence.
Telling = tuple[int, int, int, bytes, list[Change]]

_SMALL: Final = 4 * MIB  # a log up to here is never compacted; arbitrary: 40,000 requests
_LAST_ROOM: Final = 1 * MIB  # arbitrary: no record is longer; see volume.py
_SLICE_NS: Final = 1_000_000  # of a compaction; arbitrary, a few requests' worth


class Ledger(Journal):
    """Writes records to a volume. Args: words (the arena as "Q"), sequence (of the last record in the volume)."""

    def __init__(self, volume: Volume, words: memoryview, sequence: int = 0) -> None:
        super().__init__(words)
        self.volume = volume
        self.sequence = sequence
        self._log = volume.active
        self._next: Log | None = None  # being compacted to
        self._is_compacting = False
        self._threshold = _SMALL
        self._pack = msgpack.Packer().pack
        self._changes: list[Change] = []
        self._stores: list[tuple[int, int]] = []
        self._actions: list[Callable[[], object]] = []
        self.note = self._changes.append

    # -- the journal ---------------------------------------------------------------------------------------------------
    def store(self, slot: int, word: int) -> None:
        self._stores.append((slot, word))

    def restate(self, slot: int, word: int) -> None:
        self.note((WORD, slot, word))
        self._stores.append((slot, word))

    def withdraw(self, first: int, end: int) -> None:
        if self._stores:
            self._stores[:] = [store for store in self._stores if not first <= store[0] < end]

    def later(self, action: Callable[[], object]) -> None:
        self._actions.append(action)

    def hasten(self) -> None:
        if self._stores:  # first: they may go where memory is about to be removed
            words = self._words
            for slot, word in self._stores:
                words[slot] = word
            self._stores.clear()
        while self._actions:
            self._actions.pop(0)()

    # -- records -------------------------------------------------------------------------------------------------------
    def commit(self, session: Session | None, request_id: int, answer: bytes) -> None:
        """Write down what changed since the last call, and what it answers, if anything (0, b""); then carry it out."""
        changes = self._changes
        if not changes:
            return
        self.sequence += 1
        number, requests = (0, 0) if session is None else (session.number, session.requests)
        record = self._pack((self.sequence, number, requests, request_id, answer, changes))
        self._log.append(record)
        if self._next is not None:
            self._append_next(record)
        changes.clear()
        if self._stores or self._actions:
            self.hasten()
        self.volume.applied = self.sequence

    def check_room(self, *, is_taking: bool) -> None:
        """Whether a request may begin: there must be memory to write its changes down. Where it runs out, requests that
        give back may go on for longer than those that take.

        Raises: HeapFullError.
        """
        log = self._log
        if not log.is_short:
            return
        log.make_room()
        if log.is_short and (is_taking or log.room < _LAST_ROOM):
            raise self._refusal()

    def _refusal(self) -> HeapFullError:
        """What the request met is not its own size, but what the records lack."""
        used, lacking, left = self._log.end + self._log.room, self._log.lacking, shm_left()
        text = (
            f"the daemon's own records, which have {format_size(used)}, need {format_size(lacking)} more before "
            f"anything else may be taken, and /dev/shm has {format_size(left)} left; {SHM_ADVICE}"
        )
        return HeapFullError(text, bound="memory", requested=lacking, used=used, limit=used + left, advice=SHM_ADVICE)

    # -- compaction ----------------------------------------------------------------------------------------------------
    def begin(self, tellings: Iterator[Telling]) -> None:
        """Write the first records of a new ledger, which then counts. Raises: SegmentError."""
        for telling in tellings:
            self._log.append(self._pack((0, *telling)))
        self._changes.clear()
        self.hasten()
        self.volume.seal()

    @property
    def is_large(self) -> bool:
        """Whether it is time to compact."""
        return not self._is_compacting and self._log.end > self._threshold

    def compact(self, tellings: Iterator[Telling]) -> Generator[None, None, None]:
        """Make the log small again; a job. Where there is no memory for that, it ends without, and is due again."""
        self._is_compacting = True
        try:
            yield from self.volume.spare.wipe()  # of what a compaction wrote that was given up
            started, before = time.monotonic(), self._log.end
            self._next = self.volume.spare
            yield from self._retell(tellings)
            if self._has_next:
                self._switch()
                took = time.monotonic() - started
                log.debug("the ledger was compacted from %d to %d bytes in %.3f s", before, self._log.end, took)
            yield from self.volume.spare.wipe()
        finally:
            self._next = None
            self._is_compacting = False

    def _retell(self, tellings: Iterator[Telling]) -> Generator[None, None, None]:
        deadline = time.monotonic_ns() + _SLICE_NS
        for telling in tellings:
            if not self._has_next:
                return
            self._append_next(self._pack((0, *telling)))
            if time.monotonic_ns() > deadline:
                yield
                deadline = time.monotonic_ns() + _SLICE_NS

    @property
    def _has_next(self) -> bool:
        return self._next is not None

    def _switch(self) -> None:
        assert self._next is not None
        self.volume.switch()
        self._log, self._next = self._next, None
        self._threshold = max(_SMALL, 2 * self._log.end)

    def _append_next(self, record: bytes) -> None:
        assert self._next is not None
        try:
            self._next.append(record)
        except SegmentError as error:
            log.warning("the ledger cannot be compacted now: %s", error)
            self._next = None
            self._threshold *= 2
