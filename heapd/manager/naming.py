"""Operations on names: publish, look up, wait, unpublish, list."""

from __future__ import annotations

from itertools import islice
from typing import Any

from heapd.errors import HeapdError, LimitError, NoSuchNameError, NotABlockError, StaleHandleError
from heapd.journal import NAME, NO_NAME
from heapd.manager.directory import Directory
from heapd.manager.names import Waiter
from heapd.manager.sessions import Session
from heapd.manager.shared import SharedHeap
from heapd.records import Publication, as_tuple
from heapd.wire import messages as m

__all__ = ["NameOperations"]

_LOOK_AT = 1_000  # arbitrary: about 1 ms


class NameOperations:
    """Each public method is one request's handler."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._note = directory.arena.journal.note

    def publish(self, session: Session, request: m.NamePublish) -> None:
        shared = self._directory.locate(session, request.heap)
        try:
            shared.heap.check_free(request.address, request.generation)
        except NotABlockError as error:
            raise self._directory.explain(shared, request.address, error) from None
        if len(shared.names) >= self._directory.limits.names and request.block_name not in shared.names:
            self._forget_some(shared)
        if len(shared.names) >= self._directory.limits.names and request.block_name not in shared.names:
            raise LimitError(f"the heap has {len(shared.names)} names, the limit", limit=self._directory.limits.names)
        _, _, slot = shared.heap.locate(request.address)
        shared.names[request.block_name] = slot, request.address, request.generation
        self._note((NAME, shared.index, request.block_name, slot, request.address, request.generation))
        publication = self._publication(shared, request.block_name)
        if publication is None:  # its word has changed since it was checked: clients write it
            raise StaleHandleError(f"the block at {request.address:#x} was freed while it was published")
        self._directory.room.publish(shared.heap_id, request.block_name, publication)

    def _forget_some(self, shared: SharedHeap) -> None:
        """Forget names whose block was freed, among the oldest; those that stay count as new, so that the next call
        looks at others."""
        for name in list(islice(shared.names, _LOOK_AT)):
            if self._publication(shared, name) is not None:
                shared.names[name] = shared.names.pop(name)

    def _publication(self, shared: SharedHeap, name: str) -> Publication | None:
        """What a name stands for; None, and the name is forgotten, if its block was freed."""
        entry = shared.names.get(name)
        if entry is None:
            return None
        slot, address, generation = entry
        form = self._directory.arena.shape.word_format(slot)
        try:
            shared.heap.check_free(address, generation)
        except HeapdError:
            del shared.names[name]
            self._note((NO_NAME, shared.index, name))
            return None
        return Publication(name, slot, address, generation, form.size(self._directory.arena.words[slot]))

    def lookup(self, session: Session, request: m.NameLookup) -> tuple[Any, ...] | Waiter:
        shared = self._directory.locate(session, request.heap)
        publication = self._publication(shared, request.block_name)
        if publication is not None:
            return as_tuple(publication)
        if not request.timeout_ms:
            raise NoSuchNameError(f"nothing is published as {request.block_name!r} in this heap")
        if session.waiters >= self._directory.limits.waiters:
            raise LimitError(
                f"the session waits for {session.waiters} names, the limit", limit=self._directory.limits.waiters
            )
        waiter = Waiter(
            session, shared.heap_id, request.block_name, self._directory.clock() + request.timeout_ms * 1_000_000
        )
        self._directory.room.add(waiter)
        return waiter

    def unpublish(self, session: Session, request: m.NameUnpublish) -> None:
        shared = self._directory.locate(session, request.heap)
        if shared.names.pop(request.block_name, None) is None:
            raise NoSuchNameError(f"nothing is published as {request.block_name!r} in this heap")
        self._note((NO_NAME, shared.index, request.block_name))

    def list_names(self, session: Session, request: m.NameList) -> list[tuple[Any, ...]]:
        shared = self._directory.locate(session, request.heap)
        found: list[tuple[Any, ...]] = []
        for name in sorted(shared.names):
            if request.after is not None and name <= request.after:
                continue
            publication = self._publication(shared, name)
            if publication is not None:
                found.append(as_tuple(publication))
            if len(found) == request.limit:
                break
        return found
