"""Who is connected: one Session a hello, known in state words by its number.

No clock, socket or process is touched here: times are passed in, and the server says when a process has died.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from heapd.errors import LimitError
from heapd.journal import ENDED, ENDING, RETIRED, SESSION, Journal
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
    start_time (of the process, clock ticks after boot), opened_ns, heaps (it has open, by id; of an ended one: those
    that its end has still to go through), closed (heaps it had open: blocks of it may lie there), default_heap,
    requests (so far), waiters (names it waits for now), replies (its last answers by request id, oldest first),
    is_live, is_ending (its end has begun and is not done), allowance (bytes that it may be lent before its quota is
    reckoned again), sweeps (number of the newest of each heap, by id; see HeapGiveBack).
    """

    number: int
    token: bytes
    pid: int
    uid: int
    start_time: int
    opened_ns: int
    heaps: dict[int, SharedHeap] = field(default_factory=dict)
    closed: set[SharedHeap] = field(default_factory=set)
    default_heap: SharedHeap | None = None
    requests: int = 0
    waiters: int = 0
    replies: dict[int, bytes] = field(default_factory=dict)
    is_live: bool = True
    is_ending: bool = False
    allowance: int = 0
    sweeps: dict[int, int] = field(default_factory=dict)

    @property
    def word(self) -> int:
        """What the arena says of it while it lives; another one than of any session that had the number before."""
        return self.opened_ns << 1 | 1

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
    """All sessions. A number is used again only when no block names the session that had it, and oldest first.

    Where no other is left, one that blocks do name: they count as the new session's then, as if it had allocated them.
    """

    def __init__(self, limit: int, journal: Journal) -> None:
        self._journal = journal
        self._limit = min(limit, SESSION_MASK)
        self._by_number: dict[int, Session] = {}
        self._ended: dict[int, Session] = {}  # left blocks behind
        self._unused = deque(range(1, SESSION_MASK + 1))
        self.last_number = 0  # given out

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Session]:
        """Live sessions, then those that ended and left blocks."""
        yield from list(self._by_number.values())
        yield from list(self._ended.values())

    def open(self, pid: int, uid: int, start_time: int, now_ns: int) -> Session:
        """Raises: LimitError if there are as many as may be."""
        if not self._unused:
            self._reuse_oldest()
        if len(self._by_number) >= self._limit or not self._unused:
            raise LimitError(
                f"the daemon has {len(self._by_number)} sessions, its limit; close some", limit=self._limit
            )
        self.last_number = self._unused.popleft()
        session = Session(self.last_number, os.urandom(TOKEN_BYTES), pid, uid, start_time, now_ns)
        self._by_number[session.number] = session
        self._journal.note((SESSION, session.number, session.token, pid, uid, start_time, now_ns))
        return session

    def _reuse_oldest(self) -> None:
        """Give up the number of the session that ended first, whoever's its blocks will be taken for: programs that
        leave a block each, and end, must not keep everybody out for good."""
        for number, session in self._ended.items():
            if not session.is_ending and not session.heaps:
                del self._ended[number]
                self._unused.append(number)
                self._journal.note((RETIRED, number))
                return

    def restore(self, sessions: Iterable[Session], last_number: int) -> None:
        """Take over the sessions of an earlier process. Their numbers went round: the longest unused comes next."""
        for session in sessions:
            (self._by_number if session.is_live else self._ended)[session.number] = session
        self.last_number = last_number
        numbers = [*range(last_number + 1, SESSION_MASK + 1), *range(1, last_number + 1)]
        self._unused = deque(number for number in numbers if not self.is_known(number))

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
        session.is_ending = True
        self._by_number.pop(session.number, None)
        self._ended[session.number] = session
        self._journal.note((ENDING, session.number))

    def settle(self, session: Session) -> None:
        """Nothing is left to do for the end of the session."""
        session.is_ending = False
        self._journal.note((ENDED, session.number))

    def retire(self, named: set[int]) -> None:
        """Let the numbers of ended sessions be used again, except those `named` in state words."""
        for number in [number for number in self._ended if number not in named]:
            if not self._ended[number].heaps:  # else its end is still being worked on
                del self._ended[number]
                self._unused.append(number)
                self._journal.note((RETIRED, number))
