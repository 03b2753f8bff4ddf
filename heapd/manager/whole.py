"""Operations on a whole heap: walk, validate, sum up, compact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from heapd.heap import collect_statistics, validate_block, validate_heap, walk
from heapd.layout import F_TAIL_CHECK, TAIL, WORD
from heapd.manager.directory import Directory, Job
from heapd.manager.sessions import Session
from heapd.manager.shared import SharedHeap
from heapd.records import Violation, as_tuple
from heapd.wire import messages as m

__all__ = ["WholeHeapOperations"]


class WholeHeapOperations:
    """Each public method is one request's handler."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._sessions = directory.sessions

    def walk(self, session: Session, request: m.HeapWalk) -> list[Any]:
        shared = self._directory.find(request.heap)
        entries, cursor = walk(shared.heap, request.cursor, request.limit, self._sessions.is_live)
        return [entries, cursor]

    def validate(self, session: Session, request: m.HeapValidate) -> list[tuple[Any, ...]] | Job:
        shared = self._directory.find(request.heap)
        if request.address:
            found = validate_block(shared.heap, request.address, self._sessions.is_known)
            return [as_tuple(violation) for violation in found]
        return self._validate_all(shared)

    def _validate_all(self, shared: SharedHeap) -> Job:
        directory = self._directory
        found = [*directory.arena.violations(), *self._session_words()]
        found += directory.controls.violations(shared.heap_id, shared.flags)
        tail = TAIL if shared.flags & F_TAIL_CHECK else b""
        found += yield from validate_heap(shared.heap, self._sessions.is_known, tail)
        return [as_tuple(violation) for violation in found]

    def _session_words(self) -> Iterator[Violation]:
        """What the arena says wrong of sessions that live."""
        arena = self._directory.arena
        for session in self._sessions:
            slot = arena.shape.session_slot(session.number)
            if session.is_live and arena.words[slot] != session.word:
                detail = f"the session's word is {arena.words[slot]:#x}, and was written as {session.word:#x}"
                yield Violation("session-word", slot * WORD, session.number, detail)

    def compact(self, session: Session, request: m.HeapCompact) -> Job:
        shared = self._directory.locate(session, request.heap)
        self._directory.controls.bump(shared.heap_id)
        return shared.heap.compact()

    def statistics(self, session: Session, request: m.HeapStatisticsGet) -> Job:
        shared = self._directory.find(request.heap)
        return self._collect(shared)

    def _collect(self, shared: SharedHeap) -> Job:
        statistics = yield from collect_statistics(shared.heap, self._sessions.is_live)
        return as_tuple(statistics)
