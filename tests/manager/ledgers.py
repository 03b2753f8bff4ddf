"""Managers with a ledger that die and are recovered, in one process: what a kill leaves, without the kill."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from heapd.arena import Arena, remove_segment
from heapd.heap import Heap
from heapd.manager import KEPT_REPLIES, HeapManager, Limits, Session
from heapd.units import MIB
from heapd.wire import messages as m
from tests.harness import unique_name


class Mortal:
    """An arena and its ledger, and the manager that serves them now. Fields: manager, arena_name, ledger_name."""

    def __init__(self, *, reserve: int = 256 * MIB, limits: Limits | None = None) -> None:
        self.arena_name = f"heapd-{unique_name()}"
        self.ledger_name = f"{self.arena_name}-ledger"
        self._limits = limits
        arena = Arena.create(self.arena_name, reserve=reserve, commit_limit=200 * MIB)
        self.manager = HeapManager.create(arena, self.ledger_name, limits=limits)
        self._ids = count(1)

    def restart(self) -> HeapManager:
        """The manager is gone as if killed; the next one is made from what it left."""
        self.abandon()
        self.manager = HeapManager.recover(self.arena_name, self.ledger_name, limits=self._limits)
        return self.manager

    def abandon(self) -> None:
        """Let go of the mappings, as the end of a process does."""
        self.manager.arena.segment.close()

    def remove(self) -> None:
        remove_segment(self.arena_name)
        remove_segment(self.ledger_name)

    def ask(self, session: Session, request: m.Request, request_id: int = 0) -> Any:
        """Do a request as the service does: commit after each slice, and the answer with the last."""
        return finish_committed(self.manager, session, self.manager.handle(session, request), next(self._ids))


def finish_committed(manager: HeapManager, session: Session | None, outcome: Any, request_id: int = 0) -> Any:
    """Run a job to its end, committing as the service does."""
    if isinstance(outcome, Generator):
        while True:
            try:
                next(outcome)
            except StopIteration as end:
                outcome = end.value
                break
            manager.commit(session, 0, b"")
    if session is not None and request_id:
        session.replies[request_id] = b"answer"
        while len(session.replies) > KEPT_REPLIES:
            del session.replies[next(iter(session.replies))]
    manager.commit(session, request_id, b"answer" if request_id else b"")
    return outcome


@contextmanager
def mortal(**options: Any) -> Iterator[Mortal]:
    """One, whose segments are removed at the end."""
    it = Mortal(**options)
    try:
        yield it
    finally:
        it.abandon()
        it.remove()


def portrait(manager: HeapManager) -> dict[str, Any]:
    """Every private record of a manager, for one `==`; order counts only where it means something.

    Not in it: answers. Those of requests that changed nothing are not recorded; they may be executed again.
    """
    arena, directory = manager.arena, manager._directory
    return {
        "pages": bytes(arena._state),
        "mapped": bytes(arena.pages._mapped),
        "granules": list(arena._granules),
        "doomed": sorted(page for first, n in arena.doomed for page in range(first, first + n)),
        "committed": (arena.budget.committed, arena.budget.peak, arena.budget.limit, arena.reserved),
        "heaps": {
            heap_id: (
                shared.name,
                shared.flags,
                shared.creator,
                shared.is_default,
                sorted(shared.openers),
                shared.names,
                shared.orphan_owners,
                heap_portrait(shared.heap),
            )
            for heap_id, shared in manager.heaps.items()
        },
        "names": {name: shared.heap_id for name, shared in directory.by_name.items()},
        "sessions": [
            (
                (s.number, s.token, s.pid, s.uid, s.start_time, s.opened_ns, s.is_live, s.is_ending),
                sorted(s.heaps),
                sorted(shared.heap_id for shared in s.closed if not shared.is_destroyed),
                s.default_heap and s.default_heap.heap_id,
            )
            for s in sorted(manager.sessions, key=lambda s: s.number)
        ],
        "controls": (directory.controls.epochs, directory.controls.next_serial, sorted(directory.controls._unused)),
        "unanswered": {
            ticket: sorted((grant.address, grant.generation) for grant in it.grants)
            for ticket, it in directory.unanswered.items()
        },
    }


def heap_portrait(heap: Heap) -> Any:
    space = heap.space
    slabs = heap.slabs.items()
    return (
        (heap.maximum, heap.max_block, heap.allocations, heap.releases),
        {first: (slab.kind, slab.carved, bytes(map(bool, slab.lent)), sorted(slab.free)) for first, slab in slabs},
        [[slab.first_page for slab in slabs] for slabs in heap.partial],
        heap.runs,
        set(heap.unfinished),
        {serial: (r.serial, r.first, r.page_count, r.is_big) for serial, r in space.regions.items()},
        list(space.spare),
        (space.initial, space.committed, space.reserved, space.spare_committed),
    )
