"""Managers with a ledger that die and are recovered, in one process: what a kill leaves, without the kill."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from heapd.arena import Arena, remove_segment
from heapd.heap import Heap
from heapd.manager import HeapManager, Session
from heapd.manager.ledger import Ledger
from heapd.units import MIB
from heapd.wire import messages as m
from tests.harness import unique_name


class Committing(HeapManager):
    """Commits as the service does: after each slice of whatever it does."""

    def handle(self, session: Session, request: m.Request) -> Any:
        try:
            outcome = super().handle(session, request)
        finally:
            self.commit(session, 0, b"")
        return self._committed(outcome) if isinstance(outcome, Generator) else outcome

    def end_session(self, session: Session) -> Any:
        return self._committed(super().end_session(session))

    def _committed(self, job: Any) -> Any:
        try:
            while True:
                try:
                    decided = next(job)
                except StopIteration as end:
                    return end.value
                self.commit(None, 0, b"")
                yield decided
        finally:
            self.commit(None, 0, b"")


class Mortal:
    """An arena, its ledger, and the manager that serves them now. Fields: manager, arena_name, ledger_name."""

    def __init__(self, *, reserve: int = 256 * MIB) -> None:
        self.arena_name = f"heapd-{unique_name()}"
        self.ledger_name = f"{self.arena_name}-ledger"
        arena = Arena.create(self.arena_name, reserve=reserve, commit_limit=200 * MIB)
        self.manager = Committing.create(arena, self.ledger_name)

    def restart(self) -> Committing:
        """The manager is gone as if killed; the next one is made from what it left."""
        self.let_go()
        self.manager = Committing.recover(self.arena_name, self.ledger_name)
        return self.manager

    def let_go(self) -> None:
        """Unmap both segments, as the end of a process does."""
        ledger = self.manager.arena.journal
        assert isinstance(ledger, Ledger)
        ledger.volume.segment.close()
        self.manager.arena.segment.close()


@contextmanager
def mortal(**options: Any) -> Iterator[Mortal]:
    """One, whose segments are removed at the end."""
    it = Mortal(**options)
    try:
        yield it
    finally:
        it.let_go()
        remove_segment(it.arena_name)
        remove_segment(it.ledger_name)


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
        {
            first: (
                slab.kind,
                slab.page_count,
                slab.carved,
                bytes(map(bool, slab.lent)),
                sorted(slab.free),
                sorted(slab.hollow),
            )
            for first, slab in slabs
        },
        [[slab.first_page for slab in slabs] for slabs in heap.pool.partial],
        heap.runs,
        set(heap.unfinished),
        {serial: (r.serial, r.first, r.page_count, r.is_big) for serial, r in space.regions.items()},
        list(space.spare),
        (space.initial, space.committed, space.reserved, space.spare_committed),
    )
