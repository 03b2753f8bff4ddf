"""Who is connected: one Session a hello, known in state words by its number.

No clock, socket or process is touched here: times are passed in, and the server says when a process has died.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from heapd.errors import LimitError
from heapd.layout import SESSION_MASK
from heapd.records import SessionInfo

if TYPE_CHECKING:
    from heapd.manager.shared import SharedHeap

__all__ = ["Session", "Sessions"]

TOKEN_BYTES = 16


@dataclass(slots=True, eq=False)
class Session:
    """One client.

    Fields: number (in state words), token (16 random bytes, proves on the work socket who is calling), pid, uid,
    opened_ns, heaps (it has open, by id), closed (heaps it had open: blocks of it may lie there), default_heap,
    requests (so far), waiters (names it waits for now), is_live, allowance (bytes that it may be lent before its
    quota is reckoned again).
    """

    number: int
    token: bytes
    pid: int
    uid: int
    opened_ns: int
    heaps: dict[int, SharedHeap] = field(default_factory=dict)
    closed: set[SharedHeap] = field(default_factory=set)
    default_heap: SharedHeap | None = None
    requests: int = 0
    waiters: int = 0
    is_live: bool = True
    allowance: int = 0

    def info(self, now_ns: int) -> SessionInfo:
        return SessionInfo(
            number=self.number,
            pid=self.pid,
            uid=self.uid,
            age_ns=now_ns - self.opened_ns,
            heaps=len(self.heaps),
            requests=self.requests,
            is_live=self.is_live,
            held=sum(shared.heap.held.of(self.number) for shared in {*self.heaps.values(), *self.closed}),
        )


class Sessions:
    """All sessions. A number is used again only when no block names the session that had it, and oldest first."""

    def __init__(self, limit: int) -> None:
        self._limit = min(limit, SESSION_MASK)
        self._by_number: dict[int, Session] = {}
        self._ended: dict[int, Session] = {}  # left blocks behind
        self._unused = deque(range(1, SESSION_MASK + 1))

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Session]:
        """Live sessions, then those that ended and left blocks."""
        yield from list(self._by_number.values())
        yield from list(self._ended.values())

    def open(self, pid: int, uid: int, now_ns: int) -> Session:
        """Raises: LimitError if there are as many as may be."""
        if len(self._by_number) >= self._limit or not self._unused:
            raise LimitError(
                f"the daemon has {len(self._by_number)} sessions, its limit; close some", limit=self._limit
            )
        session = Session(self._unused.popleft(), os.urandom(TOKEN_BYTES), pid, uid, now_ns)
        self._by_number[session.number] = session
        return session

    def find(self, number: int) -> Session | None:
        """The session of that number, live or ended with blocks left."""
        return self._by_number.get(number) or self._ended.get(number)

    def is_live(self, number: int) -> bool:
        return number in self._by_number

    def is_known(self, number: int) -> bool:
        return number in self._by_number or number in self._ended

    def end(self, session: Session) -> None:
        """The session is not live from now on; its number stays taken until `retire`."""
        session.is_live = False
        self._by_number.pop(session.number, None)
        self._ended[session.number] = session

    def retire(self, named: set[int]) -> None:
        """Let the numbers of ended sessions be used again, except those `named` in state words."""
        for number in [number for number in self._ended if number not in named]:
            if not self._ended[number].heaps:  # else its end is still being worked on
                del self._ended[number]
                self._unused.append(number)
