"""Blocks published under names, and sessions that wait for a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heapd.errors import HeapdError, HeapDestroyedError, WaitTimeoutError
from heapd.records import Publication, as_tuple

if TYPE_CHECKING:
    from heapd.manager.sessions import Session

__all__ = ["Waiter", "WaitingRoom"]


@dataclass(slots=True, eq=False)
class Waiter:
    """An answer that is not there yet.

    Fields: session, heap_id, name, deadline_ns, result (a Publication's tuple once published) or error, ready.
    """

    session: Session
    heap_id: int
    name: str
    deadline_ns: int
    result: tuple[Any, ...] | None = None
    error: HeapdError | None = None

    @property
    def ready(self) -> bool:
        return self.result is not None or self.error is not None


class WaitingRoom:
    """Everyone who waits for a name."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str], list[Waiter]] = {}
        self._ready: list[Waiter] = []
        self.count = 0

    def add(self, waiter: Waiter) -> None:
        self._waiting.setdefault((waiter.heap_id, waiter.name), []).append(waiter)
        waiter.session.waiters += 1
        self.count += 1

    def _settle(self, waiter: Waiter) -> None:
        waiter.session.waiters -= 1
        self.count -= 1
        self._ready.append(waiter)

    def publish(self, heap_id: int, name: str, publication: Publication) -> None:
        """Tell everyone who waits for the name."""
        for waiter in self._waiting.pop((heap_id, name), ()):
            waiter.result = as_tuple(publication)
            self._settle(waiter)

    def heap_gone(self, heap_id: int) -> None:
        for key in [key for key in self._waiting if key[0] == heap_id]:
            for waiter in self._waiting.pop(key):
                waiter.error = HeapDestroyedError("the heap was destroyed while a name in it was waited for")
                self._settle(waiter)

    def session_gone(self, session: Session) -> None:
        """Nobody is there to be told."""
        for key, waiters in list(self._waiting.items()):
            rest = [waiter for waiter in waiters if waiter.session is not session]
            self.count -= len(waiters) - len(rest)
            if rest:
                self._waiting[key] = rest
            else:
                del self._waiting[key]

    def expire(self, now_ns: int) -> None:
        """Tell those whose time is up."""
        for key, waiters in list(self._waiting.items()):
            late = [waiter for waiter in waiters if waiter.deadline_ns <= now_ns]
            if not late:
                continue
            self._waiting[key] = [waiter for waiter in waiters if waiter.deadline_ns > now_ns]
            if not self._waiting[key]:
                del self._waiting[key]
            for waiter in late:
                waiter.error = WaitTimeoutError(f"nothing was published as {waiter.name!r} in time")
                self._settle(waiter)

    def next_deadline_ns(self) -> int | None:
        return min((w.deadline_ns for waiters in self._waiting.values() for w in waiters), default=None)

    def drain_ready(self) -> list[Waiter]:
        """Waiters that became ready since the last call."""
        ready, self._ready = self._ready, []
        return ready
