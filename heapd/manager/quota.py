"""What one session may have: of all heaps together (the daemon's quota), and of one heap (the heap's).

It has what the daemon lent it, allocated or cached, until it comes back, whoever brings it; and what a heap it made
committed at once, until its blocks there take more. When a request does not fit, the session's blocks are first counted
anew by whom they are with now (see heapd/heap/holdings.py). A quota guards against a program that takes too much by
mistake. It is asked for the extent of the size class; a block of the next class, lent for lack of another, may exceed
it by an eighth of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from heapd.errors import HeapDestroyedError, QuotaError, SessionLostError
from heapd.heap import recount
from heapd.manager.directory import Job
from heapd.manager.sessions import Session
from heapd.manager.shared import SharedHeap

__all__ = ["Quotas"]

_PLENTY = 1 << 63


class Quotas:
    """Asked before anything is lent, if there is any quota. `limit` is the daemon's, in bytes, 0 for none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def admits(self, session: Session, shared: SharedHeap, size: int) -> bool:
        """Whether the session may have `size` bytes more of the heap; if so, they are taken from its allowance."""
        if shared.quota and shared.heap.held.of(session.number) + size > shared.quota:
            return False
        if self.limit:
            more = max(size - self._unused(session, shared), 0)
            if more > session.allowance:
                session.allowance = self.limit - self.held(session)
                if more > session.allowance:
                    return False
            session.allowance -= more
        return True

    def room(self, session: Session, shared: SharedHeap) -> int:
        """Bytes of the heap that the session may still have."""
        room = _PLENTY
        if self.limit:
            room = self.limit - self.held(session) + self._unused(session, shared)
        if shared.quota:
            room = min(room, shared.quota - shared.heap.held.of(session.number))
        return max(room, 0)

    @classmethod
    def held(cls, session: Session) -> int:
        """Bytes that the session has of all heaps."""
        return sum(
            shared.heap.held.of(session.number) + cls._unused(session, shared)
            for shared in {*session.heaps.values(), *session.closed}
            if not shared.is_destroyed
        )

    @staticmethod
    def _unused(session: Session, shared: SharedHeap) -> int:
        """What a heap committed at once for its maker, and the maker's blocks do not take."""
        if not shared.initial or shared.creator != session.number:
            return 0
        return max(shared.initial - shared.heap.held.of(session.number), 0)

    def check_new_heap(self, session: Session, initial: int) -> None:
        """Raises: QuotaError if the session may not have a heap that commits `initial` bytes at once."""
        if self.limit:
            held = self.held(session)
            if held + initial > self.limit:
                raise self._error("quota", initial, held, self.limit)
            session.allowance = 0  # to be reckoned again

    def check(self, session: Session, shared: SharedHeap, size: int) -> None:
        """As `admits`. Raises: QuotaError."""
        if self.admits(session, shared, size):
            return
        held = shared.heap.held.of(session.number)
        if shared.quota and held + size > shared.quota:
            raise self._error("heap-quota", size, held, shared.quota)
        raise self._error("quota", size, self.held(session), self.limit)

    def when_recounted(self, session: Session, shared: SharedHeap, size: int, do: Callable[[], Any]) -> Job:
        """Count the session's blocks anew, and then `do` what did not fit before; its answer.

        Raises: QuotaError if it does not fit now; SessionLostError, HeapDestroyedError if one of them has gone.
        """
        for other in [*session.heaps.values(), *session.closed]:
            yield from recount(other.heap, session.number, other.openers, session.number)
        if not session.is_live:
            raise SessionLostError("the session ended while its blocks were counted")
        if shared.is_destroyed:
            raise HeapDestroyedError("the heap was destroyed while the session's blocks were counted")
        session.allowance = 0
        self.check(session, shared, size)
        outcome = do()
        return (yield from outcome) if isinstance(outcome, Generator) else outcome

    @staticmethod
    def _error(bound: str, size: int, held: int, limit: int) -> QuotaError:
        change = "start the daemon with a larger --session-quota"
        if bound == "heap-quota":
            change = "make the heap with a larger session_quota"
        advice = f"free blocks, trim() what is cached, or {change}"
        return QuotaError.of(bound, requested=size, used=held, limit=limit, advice=advice)
