"""The heaps there are, by id, name and control index, with the sessions that have them open."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count
from typing import Any

from heapd.arena import Arena
from heapd.errors import HeapdError, HeapDestroyedError, NoSuchHeapError, NotABlockError, WrongHeapError
from heapd.journal import DONE, JOIN, PENDING, Journal
from heapd.manager.names import WaitingRoom
from heapd.manager.sessions import Session, Sessions
from heapd.manager.shared import Controls, SharedHeap
from heapd.records import Grant, as_tuple

__all__ = ["Decided", "Directory", "Job", "Limits", "Unanswered"]


@dataclass(frozen=True, slots=True)
class Decided:
    """What a job yields when its answer is certain and only cleaning up is left to do; the first one counts."""

    answer: Any


Job = Generator[Decided | None, None, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """What no client can pass. Counts, all arbitrary: sessions, heaps, names in one heap, waiters of one session; and
    session_quota: bytes that one session may have, 0 for no limit."""

    sessions: int = 4096
    heaps: int = 8192
    names: int = 65_536
    waiters: int = 1024
    session_quota: int = 0


class Unanswered:
    """Blocks for a request that takes several turns. Should the daemon die before it is answered, they are freed: the
    client asks again.

    Fields: ticket (what the journal knows it by), shared, grants (so far).
    """

    def __init__(self, ticket: int, shared: SharedHeap, journal: Journal) -> None:
        self.ticket = ticket
        self.shared = shared
        self.grants: list[Grant] = []
        self._journal = journal

    def add(self, grant: Grant) -> None:
        self.grants.append(grant)
        shared = self.shared
        self._journal.note((PENDING, self.ticket, shared.index, shared.heap_id, grant.address, grant.generation))


class Directory:
    """What every operation needs to find its heap and its block.

    Fields: arena, limits, clock (ns), sessions, heaps (by id, in order of birth), by_name, by_index (control index),
    controls, room (who waits for a name), unanswered (by ticket).
    """

    def __init__(self, arena: Arena, limits: Limits, clock: Callable[[], int]) -> None:
        self.arena = arena
        self.limits = limits
        self.clock = clock
        self.sessions = Sessions(limits.sessions, arena.journal)
        self.heaps: dict[int, SharedHeap] = {}
        self.by_name: dict[str, SharedHeap] = {}
        self.by_index: dict[int, SharedHeap] = {}
        self.controls = Controls(arena)
        self.room = WaitingRoom()
        self.unanswered: dict[int, Unanswered] = {}
        self._tickets = count(1)

    def join(self, session: Session, shared: SharedHeap) -> None:
        if shared.heap_id not in session.heaps:
            self.arena.journal.note((JOIN, session.number, shared.heap_id))
            session.heaps[shared.heap_id] = shared
            shared.openers.add(session.number)

    def info(self, shared: SharedHeap) -> tuple[Any, ...]:
        return as_tuple(shared.info(self.controls.epoch(shared.heap_id), self.sessions.is_live(shared.creator)))

    def locate(self, session: Session, heap_id: int) -> SharedHeap:
        """A heap that the session has open."""
        shared = session.heaps.get(heap_id)
        if shared is None:
            if heap_id in self.heaps:
                raise NoSuchHeapError(f"heap {heap_id} is not open in this session; open it first")
            raise self.no_heap(heap_id)
        return shared

    def find(self, heap_id: int) -> SharedHeap:
        """A heap that somebody looks at; that needs no opening."""
        shared = self.heaps.get(heap_id)
        if shared is None:
            raise self.no_heap(heap_id)
        return shared

    def no_heap(self, heap_id: int) -> HeapdError:
        if self.controls.was_used(heap_id):
            return HeapDestroyedError(f"heap {heap_id} was destroyed")
        return NoSuchHeapError(f"there is no heap {heap_id}")

    def explain(self, shared: SharedHeap, address: int, error: NotABlockError) -> HeapdError:
        """Say more about an address that is no block of the heap."""
        if shared.heap.owns(address):
            return error
        for other in self.heaps.values():
            if other.heap.owns(address):
                name = repr(other.name) if other.name else other.heap_id
                return WrongHeapError(f"the address {address:#x} lies in heap {name}, not in this one")
        return NotABlockError(f"the address {address:#x} lies in no heap")

    def expect(self, shared: SharedHeap, ticket: int = 0) -> Unanswered:
        """Begin a request that is answered in a later turn. Args: ticket (of one that an earlier process began)."""
        ticket = ticket or next(self._tickets)
        return self.unanswered.setdefault(ticket, Unanswered(ticket, shared, self.arena.journal))

    def resolve(self, unanswered: Unanswered) -> None:
        """Its answer is there, or it will have none: what it allocated stays as it is."""
        if self.unanswered.pop(unanswered.ticket, None) is not None:
            self.arena.journal.note((DONE, unanswered.ticket))

    def settle(self) -> Job:
        """Decommit what was released, in slices."""
        while not self.arena.is_settled:
            self.arena.settle()
            yield None

    def settle_then(self, answer: Any) -> Job:
        """As settle, after which the answer is given; that it will be is certain before."""
        self.arena.settle()
        if not self.arena.is_settled:
            yield Decided(answer)
            yield from self.settle()
        return answer
