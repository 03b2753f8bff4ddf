"""Clients of a manager, without a socket: what the service does with requests, jobs and waiters, in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any

from heapd.layout import F_FREE_ORPHANS, F_PERSISTENT, F_SERIALIZE
from heapd.manager import HeapManager, Session, Waiter
from heapd.records import Entry, Grant, HeapInfo, HeapStatistics, Publication, SessionInfo, Violation
from heapd.wire import messages as m
from tests.arenas import finish

_pids = iter(range(1000, 10**9))


def names(grants: Iterable[Grant]) -> list[int]:
    """As requests name several blocks: address, generation, address, generation, ..."""
    return [part for grant in grants for part in (grant.address, grant.generation)]


class Task:
    """A request that is being worked on: its first slice has run, as in the service.

    Fields: is_done, answer, error (what it raised, None so far).
    """

    def __init__(self, outcome: Any) -> None:
        self._job = outcome if isinstance(outcome, Generator) else None
        self.is_done = self._job is None
        self.answer = None if self._job else outcome
        self.error: BaseException | None = None
        self.step()

    def step(self) -> bool:
        """Run one slice. Returns: True if it is done."""
        if not self.is_done:
            assert self._job is not None
            try:
                next(self._job)
            except StopIteration as end:
                self.answer, self.is_done = end.value, True
            except Exception as error:
                self.error, self.is_done = error, True
        return self.is_done

    def result(self) -> Any:
        """Run it to the end; its answer, or what it raised."""
        while not self.step():
            pass
        if self.error is not None:
            raise self.error
        return self.answer


class Client:
    """One session and the calls that a client library would make of it."""

    def __init__(self, manager: HeapManager, pid: int | None = None, uid: int = 1000) -> None:
        self.manager = manager
        self.session: Session = manager.open_session(pid or next(_pids), uid)
        self.number = self.session.number

    def begin(self, request: m.Request) -> Task:
        """Ask, and run the first slice only."""
        return Task(self.manager.handle(self.session, request))

    def ask(self, request: m.Request, between: Callable[[], object] = lambda: None) -> Any:
        """Ask, and run to the end; `between` is called at every pause."""
        return finish(self.manager.handle(self.session, request), between)

    def end(self) -> None:
        """The session's end: by close, or because its process has died."""
        finish(self.manager.end_session(self.session))

    # -- heaps ---------------------------------------------------------------------------------------------------------
    def create(
        self,
        name: str | None = None,
        *,
        initial: int = 0,
        maximum: int = 0,
        flags: int = F_SERIALIZE,
        max_block: int = 0,
        session_quota: int = 0,
    ) -> HeapInfo:
        return HeapInfo(*self.ask(m.HeapCreate(name, initial, maximum, flags, max_block, session_quota)))

    def create_persistent(self, name: str) -> HeapInfo:
        return self.create(name, flags=F_SERIALIZE | F_PERSISTENT)

    def create_freeing_orphans(self, name: str, *, persistent: bool = False) -> HeapInfo:
        return self.create(name, flags=F_FREE_ORPHANS | (F_PERSISTENT if persistent else 0))

    def open(self, name: str) -> HeapInfo:
        return HeapInfo(*self.ask(m.HeapOpen(name)))

    def open_id(self, heap: int) -> HeapInfo:
        return HeapInfo(*self.ask(m.HeapOpenId(heap)))

    def default(self, reserve: int = 0, commit: int = 0) -> HeapInfo:
        return HeapInfo(*self.ask(m.HeapDefault(reserve, commit)))

    def destroy(self, heap: HeapInfo) -> None:
        assert self.ask(m.HeapDestroy(heap.heap_id)) is None

    def close(self, heap: HeapInfo) -> None:
        assert self.ask(m.HeapClose(heap.heap_id)) is None

    def heaps(self, pid: int = 0, after: int = 0, limit: int = 500) -> list[HeapInfo]:
        return [HeapInfo(*fields) for fields in self.ask(m.HeapList(pid, after, limit))]

    def sessions(self, pid: int = 0) -> list[SessionInfo]:
        return [SessionInfo(*fields) for fields in self.ask(m.SessionList(pid))]

    # -- blocks --------------------------------------------------------------------------------------------------------
    def alloc(self, heap: HeapInfo, size: int) -> Grant:
        return Grant(*self.ask(m.HeapAlloc(heap.heap_id, size)))

    def alloc_many(self, heap: HeapInfo, sizes: list[int]) -> list[Grant]:
        return [Grant(*fields) for fields in self.ask(m.HeapAllocMany(heap.heap_id, sizes))]

    def lease(self, heap: HeapInfo, size: int, count: int) -> list[Grant]:
        return [Grant(*fields) for fields in self.ask(m.HeapLease(heap.heap_id, size, count))]

    def free(self, heap: HeapInfo, grant: Grant) -> None:
        assert self.ask(m.HeapFree(heap.heap_id, grant.address, grant.generation)) is None

    def free_many(self, heap: HeapInfo, grants: list[Grant]) -> None:
        flat = [value for grant in grants for value in (grant.address, grant.generation)]
        assert self.ask(m.HeapFreeMany(heap.heap_id, flat)) is None

    def resize(self, heap: HeapInfo, grant: Grant, size: int, *, in_place_only: bool = True) -> Grant:
        return Grant(*self.ask(m.HeapResize(heap.heap_id, grant.address, grant.generation, size, in_place_only)))

    # -- looking -------------------------------------------------------------------------------------------------------
    def walk(self, heap: HeapInfo, limit: int = 1024) -> list[Entry]:
        entries: list[Entry] = []
        cursor = 0
        while True:
            page, cursor = self.ask(m.HeapWalk(heap.heap_id, cursor, limit))
            entries += [Entry(*fields) for fields in page]
            if not cursor:
                return entries

    def validate(self, heap: HeapInfo, address: int = 0) -> list[Violation]:
        return [Violation(*fields) for fields in self.ask(m.HeapValidate(heap.heap_id, address))]

    def statistics(self, heap: HeapInfo) -> HeapStatistics:
        return HeapStatistics(*self.ask(m.HeapStatisticsGet(heap.heap_id)))

    # -- names ---------------------------------------------------------------------------------------------------------
    def publish(self, heap: HeapInfo, name: str, grant: Grant) -> None:
        assert self.ask(m.NamePublish(heap.heap_id, name, grant.address, grant.generation)) is None

    def lookup(self, heap: HeapInfo, name: str) -> Publication:
        return Publication(*self.ask(m.NameLookup(heap.heap_id, name)))

    def wait(self, heap: HeapInfo, name: str, timeout_ms: int = 1000) -> Waiter:
        waiter = self.ask(m.NameLookup(heap.heap_id, name, timeout_ms))
        assert isinstance(waiter, Waiter)
        return waiter

    def unpublish(self, heap: HeapInfo, name: str) -> None:
        assert self.ask(m.NameUnpublish(heap.heap_id, name)) is None

    def names(self, heap: HeapInfo, after: str | None = None, limit: int = 500) -> list[Publication]:
        return [Publication(*fields) for fields in self.ask(m.NameList(heap.heap_id, after, limit))]
