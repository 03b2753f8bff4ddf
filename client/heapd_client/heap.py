"""A heap as its clients use it: the Win32 heap functions over one session.

It is built in layers, each a class on top of the one before: what a heap is (heapcore.py), blocks allocated and freed
(allocating.py), blocks resized (resizing.py), and here the rest: what there is to look at, names, and the end.

Every heap function of a serialized heap runs with the heap's mutex held, across the round trip that it needs; with
`serialize=False` none takes it. What the daemon knows it is asked; what lies in the mapping (is the heap alive, what
does a state word say) is read there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Final

from heapd.errors import NoSuchNameError, StaleHandleError, WaitTimeoutError
from heapd.layout import Handle
from heapd.records import Entry, HeapStatistics, Publication, Violation
from heapd.wire import messages as ask

from .arguments import as_timeout
from .block import Block
from .resizing import ResizingHeap

__all__ = ["Heap"]

_LOOKUP_SLICE_S: Final = 10.0  # longest wait that one request asks of the daemon
_LOOKUP_RETRIES: Final = 100  # arbitrary: a name replaced as often between question and look is not looked up
_NAMES_PAGE: Final = 500


class Heap(ResizingHeap):
    """One heap; made by `Session.create_heap`, `open_heap` and `default_heap`.

    Attributes: session; mapping (the arena); id (never used again); is_executable; info (HeapInfo, of when it
    was opened).
    Locks: each method says nothing of its own; a serialized heap's functions take the heap's mutex, and wait for it
    at most the session's timeout (LockTimeoutError names the holder).
    """

    # -- looking -----------------------------------------------------------------------------------------------------
    def walk(self) -> Iterator[Entry]:
        """The heap's entries: each region, oldest first and those of large runs last, then what tiles it, in address
        order. Asked for page by page: a heap that changes meanwhile may show a change in part."""
        cursor = 0
        while True:
            self.check()
            with self._hold():
                self._count()
                entries, cursor = self.session.walk_page(self.id, cursor)
            yield from entries
            if not cursor:
                return

    def validate(self, block: Block | None = None) -> list[Violation]:
        """The broken invariants of the heap, or of one block of it; an empty list if there is none."""
        self.check()
        if block is not None:
            self._check_own(block)
        with self._hold():
            self._count()
            if block is not None:
                try:
                    self.word_of(block)
                except LookupError as error:  # its memory may be another block's by now, and that one in order
                    return [Violation("stale-block", block.address, 0, str(error))]
                except ValueError:
                    pass  # free: the daemon says so
            found = self.session.call(ask.HeapValidate(self.id, 0 if block is None else block.address))
        return [Violation(*fields) for fields in found]

    def compact(self) -> int:
        """Coalesce what is free and give its memory back to the system; no block moves.

        Returns: bytes of the largest committed free extent, before it was given back.
        """
        self.check()
        with self._hold():
            self._count()
            self.release_cache(thorough=True)
            largest: int = self.session.call(ask.HeapCompact(self.id))
        return largest

    def trim(self) -> None:
        """Give the free blocks that this session caches back to the heap. Raises: DaemonError."""
        self.check()
        self._free_deferred()
        with self._hold():
            self._count()
            self.release_cache(thorough=True)

    def statistics(self) -> HeapStatistics:
        """Bytes and counts of the heap; the parts add up."""
        self.check()
        if self._front is not None:
            with self._hold(), self._enter():
                if self._front is not None:
                    self.count_acquisitions(self._front.take_count())
        return HeapStatistics(*self.session.call(ask.HeapStatisticsGet(self.id)))

    # -- names -------------------------------------------------------------------------------------------------------
    def publish(self, name: str, block: Block) -> None:
        """Let `name` stand for a block, at once in place of what it stood for. Whoever waits for it is told.

        Raises: WrongHeapError, StaleHandleError, ClosedError, InvalidArgumentError, LimitError.
        """
        self.check()
        self._check_own(block)
        self.session.call(ask.NamePublish(self.id, name, block.address, block.generation))

    def lookup(self, name: str, timeout: float | None = None) -> Block:
        """The block that `name` stands for.

        Args:   timeout (seconds to wait for somebody to publish it; None or 0: do not wait).
        Raises: NoSuchNameError if it stands for nothing and no wait was asked for; WaitTimeoutError past the timeout;
                DaemonLostError if the daemon has died, then at the latest.
        """
        timeout = as_timeout(timeout)
        deadline = monotonic() + (timeout or 0.0)
        for _ in range(_LOOKUP_RETRIES):
            publication = self._look_up(name, deadline, timeout)
            handle = Handle(self.mapping.instance, publication.slot, publication.address, publication.generation)
            try:
                return self.session.open(handle)
            except StaleHandleError:
                continue  # replaced, and the old block freed, between the answer and the look
        raise StaleHandleError(f"the block published as {name!r} is freed as often as it is looked up")

    def _look_up(self, name: str, deadline: float, timeout: float | None) -> Publication:
        while True:
            self.check()
            wait_s = min(max(deadline - monotonic(), 0.0), _LOOKUP_SLICE_S)
            try:
                request = ask.NameLookup(self.id, name, int(wait_s * 1000))
                found = self.session.call(request, wait_s, deadline if timeout else inf)
            except (WaitTimeoutError, NoSuchNameError):
                if not timeout:
                    raise NoSuchNameError(f"nothing is published as {name!r}", name=name) from None
                if monotonic() < deadline:
                    continue
                raise WaitTimeoutError(f"nothing was published as {name!r} within {timeout:g} s", name=name) from None
            return Publication(*found)

    def unpublish(self, name: str) -> None:
        """Let `name` stand for nothing. Raises: NoSuchNameError if it does."""
        self.check()
        self.session.call(ask.NameUnpublish(self.id, name))

    def names(self) -> Iterator[Publication]:
        """What is published in the heap, by name."""
        after: str | None = None
        while True:
            self.check()
            found = self.session.call(ask.NameList(self.id, after, _NAMES_PAGE))
            for fields in found:
                yield Publication(*fields)
            if len(found) < _NAMES_PAGE:
                return
            after = found[-1][0]

    # -- the end -----------------------------------------------------------------------------------------------------
    def destroy(self) -> None:
        """Give every page of the heap back, for all who have it open and whatever is allocated in it.

        Raises: NotPermittedError for a default heap; HeapDestroyedError if it is gone already.
        """
        self.check()
        self.session.call(ask.HeapDestroy(self.id))
        with self._enter():
            self._drop_front()
        self.session.forget(self)

    def close(self) -> None:
        """Use the heap no longer; a named one that nobody has open goes, unless it is persistent. Twice is harmless."""
        if self._is_closed:
            return
        with suppress(LookupError):  # gone already
            self.check()
            self._free_deferred()
            if self.has_had_front_end:  # else there is nothing to give back, and no need to wait for the lock
                with self._hold():
                    self.release_cache(thorough=True)
            self.session.call(ask.HeapClose(self.id))
        self.session.forget(self)
        self.mark_closed()
