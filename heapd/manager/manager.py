"""Many heaps, many clients: every operation the service may ask for.

`handle` answers a request with plain values, with a *job* (a generator that yields between slices of a few ms and
returns the answer), or with a *waiter* (an answer that comes when a name is published). Nothing here blocks, and
nothing waits for a heap's mutex: the daemon is one thread, so its records need no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, Self

from heapd.arena import Arena
from heapd.errors import (
    HeapdError,
    HeapExistsError,
    HeapFullError,
    InvalidArgumentError,
    LimitError,
    NoSuchHeapError,
    NotPermittedError,
)
from heapd.heap import NOBODY, Heap, drop_unfinished, recount
from heapd.journal import LEAVE, NO_HEAP, OWNERS
from heapd.layout import (
    CACHED,
    F_EXECUTABLE,
    F_FREE_CHECK,
    F_FREE_ORPHANS,
    F_GENERATE_EXCEPTIONS,
    F_PERSISTENT,
    F_SERIALIZE,
    F_TAIL_CHECK,
    HEAP_INDEX_BITS,
)
from heapd.manager.blocks import BlockOperations
from heapd.manager.directory import Directory, Job, Limits
from heapd.manager.executable import check_executable
from heapd.manager.ledger import Ledger, Records, Volume, restore_arena, restore_directory, retell
from heapd.manager.names import Waiter
from heapd.manager.naming import NameOperations
from heapd.manager.quota import Quotas
from heapd.manager.sessions import Session
from heapd.manager.shared import SharedHeap
from heapd.manager.whole import WholeHeapOperations
from heapd.records import as_tuple
from heapd.units import KIB, MIB
from heapd.wire import messages as m

__all__ = ["HeapManager", "Job", "Limits"]


_RECORDED: Final = F_GENERATE_EXCEPTIONS | F_TAIL_CHECK | F_FREE_CHECK  # kept for the clients; nothing here heeds them
_FLAGS: Final = F_SERIALIZE | F_EXECUTABLE | F_PERSISTENT | F_FREE_ORPHANS | _RECORDED
_TAKING: Final = {
    m.HeapCreate,
    m.HeapDefault,
    m.HeapAlloc,
    m.HeapAllocMany,
    m.HeapResize,
    m.HeapLease,
    m.NamePublish,
}
_DEFAULT_RESERVE: Final = 1 * MIB  # Win32 /HEAP defaults
_DEFAULT_COMMIT: Final = 4 * KIB
_WORDS_A_SLICE: Final = 5_000


def _forget(session: Session | None, request_id: int, answer: bytes) -> None:
    """Without a ledger nothing lasts."""


class HeapManager:
    """The daemon's records: sessions, heaps, names.

    Fields: arena, sessions, heaps (by id, in order of birth).
    """

    def __init__(
        self, arena: Arena, *, clock: Callable[[], int] = time.monotonic_ns, limits: Limits | None = None
    ) -> None:
        self._directory = Directory(arena, limits or Limits(), clock)
        self.arena = arena
        self.limits = self._directory.limits
        self.sessions = self._directory.sessions
        self.heaps = self._directory.heaps
        self._note = arena.journal.note
        self._ledger = arena.journal if isinstance(arena.journal, Ledger) else None
        self._commit = _forget if self._ledger is None else self._ledger.commit
        self._quotas = Quotas(self.limits.session_quota)
        self._blocks = blocks = BlockOperations(self._directory, self._quotas)
        names, whole = NameOperations(self._directory), WholeHeapOperations(self._directory)
        self._handlers: dict[type[m.Request], Callable[[Session, Any], Any]] = {
            m.SessionClose: lambda session, request: self.end_session(session),
            m.SessionList: self._list_sessions,
            m.ArenaStatisticsGet: self._arena_statistics,
            m.ArenaReclaim: self._reclaim,
            m.HeapCreate: self._create_heap,
            m.HeapOpen: self._open_heap,
            m.HeapOpenId: self._open_heap_by_id,
            m.HeapDefault: self._default_heap,
            m.HeapClose: self._close_heap,
            m.HeapDestroy: self._destroy_heap,
            m.HeapList: self._list_heaps,
            m.HeapAlloc: blocks.alloc,
            m.HeapAllocMany: blocks.alloc_many,
            m.HeapResize: blocks.resize,
            m.HeapFree: blocks.free,
            m.HeapFreeMany: blocks.free_many,
            m.HeapLease: blocks.lease,
            m.HeapGiveBack: blocks.give_back,
            m.HeapWalk: whole.walk,
            m.HeapValidate: whole.validate,
            m.HeapCompact: whole.compact,
            m.HeapStatisticsGet: whole.statistics,
            m.NamePublish: names.publish,
            m.NameLookup: names.lookup,
            m.NameUnpublish: names.unpublish,
            m.NameList: names.list_names,
        }

    @classmethod
    def create(
        cls,
        arena: Arena,
        ledger: str,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        limits: Limits | None = None,
    ) -> Self:
        """A manager of a new arena, whose records are kept in a segment of their own, named `ledger`.

        Raises: SegmentError if that cannot be made; nothing of it is left.
        """
        volume = Volume.create(
            ledger,
            instance=arena.instance,
            page_count=arena.shape.page_count,
            commit_limit=arena.budget.limit,
            inode=arena.segment.inode,
        )
        try:
            arena.journal = journal = Ledger(volume, arena.words)
            manager = cls(arena, clock=clock, limits=limits)
            journal.begin(retell(manager._directory))
        except BaseException:
            volume.remove()
            raise
        return manager

    @classmethod
    def recover(
        cls,
        arena: str,
        ledger: str,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        limits: Limits | None = None,
    ) -> Self:
        """The manager that an earlier process was, from its arena and its ledger: names of segments.

        Heaps, blocks, sessions, names and remembered answers are as they were. The caller looks which sessions'
        processes live, ends the others, and runs what `resume` gives.

        Raises: SegmentError, saying why that is impossible. Neither segment is harmed.
        """
        volume = Volume.open(ledger)
        try:
            records = Records.read(volume.active.frames(), volume.page_count)
            memory = restore_arena(arena, volume, records, volume.count_incarnation())
        except BaseException:
            volume.segment.close()
            raise
        volume.active.trim()
        volume.spare.wipe_all()
        memory.journal = journal = Ledger(volume, memory.words, records.sequence)
        manager = cls(memory, clock=clock, limits=limits)
        restore_directory(manager._directory, records, is_applied=volume.applied == records.sequence)
        volume.applied = records.sequence
        memory.restore_sessions({session.number: session.word for session in manager.sessions if session.is_live})
        for shared in manager.heaps.values():
            drop_unfinished(shared.heap)
        for unanswered in list(manager._directory.unanswered.values()):
            manager._blocks.forget(unanswered)
        journal.commit(None, 0, b"")
        return manager

    def resume(self) -> list[Job]:
        """What the earlier process had begun and nobody waits for: ends of sessions, memory to be decommitted; and
        what it knew and did not record: what each session has of each heap."""
        jobs = [self._finish_end(session) for session in self.sessions if session.is_ending]
        counts = [recount(shared.heap, NOBODY, shared.openers, NOBODY) for shared in self.heaps.values()]
        return [*jobs, *counts, self._directory.settle()]

    def commit(self, session: Session | None, request_id: int, answer: bytes) -> None:
        """What was changed since the last call is to last, and with it the answer to a request of the session (0, b"":
        none). To be called before the answer is sent, and after each slice of a job."""
        self._commit(session, request_id, answer)

    def take_chores(self) -> list[Job]:
        """Jobs that are due for the manager's own sake."""
        return [self.compaction()] if self._ledger is not None and self._ledger.is_large else []

    def compaction(self) -> Job:
        """The job that makes the ledger small."""
        assert self._ledger is not None
        return self._ledger.compact(retell(self._directory))

    def handle(self, session: Session, request: m.Request) -> Any:
        """Do what a live session asks. Returns: the answer, a Job or a Waiter. Raises: HeapdError."""
        session.requests += 1
        if self._ledger is not None and not request.is_idempotent:
            self._ledger.check_room(is_taking=type(request) in _TAKING)
        return self._handlers[type(request)](session, request)

    # -- sessions ----------------------------------------------------------------------------------------------------
    def open_session(self, pid: int, uid: int, start_time: int = 0) -> Session:
        """A session for a process.

        Args: start_time (clock ticks after boot, 0: unknown). Raises: LimitError, HeapFullError.
        """
        session = self.sessions.open(pid, uid, start_time, self._directory.clock())
        try:
            self.arena.set_session(session.number, session.word)
        except HeapFullError:
            self.sessions.end(session)
            self.sessions.settle(session)
            self._retire()
            raise
        return session

    @property
    def live_session_count(self) -> int:
        return len(self.sessions)

    def end_session(self, session: Session) -> Job:
        """Take back what a session leaves: its anonymous heaps, its caches, named heaps that nobody else has open."""
        if not session.is_live:
            return
        self.sessions.end(session)
        self.arena.set_session(session.number, 0)  # first: nobody sends it blocks any more
        self._directory.room.session_gone(session)
        session.heaps.update((shared.heap_id, shared) for shared in session.closed if not shared.is_destroyed)
        for shared in session.heaps.values():
            shared.openers.discard(session.number)
        yield from self._finish_end(session)

    def _finish_end(self, session: Session) -> Job:
        """What end_session has to do in slices; an end that the daemon's death cut short is taken up here."""
        for shared in list(session.heaps.values()):
            # Each step yields: the heap may have lost its last session, or gone, meanwhile.
            if not shared.is_destroyed and not self._must_go(shared, session):
                yield from self._reap(shared, session)
            if not shared.is_destroyed and self._must_go(shared, session):
                yield from self._destroy(shared)
            session.heaps.pop(shared.heap_id, None)
        session.default_heap = None
        session.closed.clear()
        for shared in self.heaps.values():
            if shared.creator == session.number:
                shared.creator = 0  # the number may be another's soon
        self.sessions.settle(session)
        self._retire()

    def _retire(self) -> None:
        """Let the numbers of ended sessions that own no blocks be used again."""
        self.sessions.retire({number for shared in self.heaps.values() for number in shared.orphan_owners})

    @staticmethod
    def _must_go(shared: SharedHeap, session: Session) -> bool:
        if shared.is_destroyed or shared.is_persistent:
            return False
        return not shared.openers if shared.name is not None else shared.creator == session.number

    def _reap(self, shared: SharedHeap, session: Session) -> Job:
        """Go through the blocks of a heap that lives on: take back those the ended session cached (or another one that
        ended: they may have been freed to it since), and, by the heap's policy, those it had allocated; note which
        ended sessions still own some."""
        heap, words = shared.heap, self.arena.words
        owners: set[int] = set()
        for seen, (slot, address) in enumerate(heap.lent_slots(), 1):
            word, form = words[slot], self.arena.shape.word_format(slot)
            number = form.session(word)
            if self.sessions.is_live(number):
                pass
            elif form.state(word) == CACHED or (number == session.number and shared.frees_orphans):
                slab, index, _ = heap.locate(address)
                heap.take_back(slab, index, slot)
            else:
                owners.add(number)
            if seen % _WORDS_A_SLICE == 0:
                yield None
                if shared.is_destroyed:
                    return
        shared.orphan_owners = owners
        self._note((OWNERS, shared.index, list(owners)))
        yield from recount(heap, session.number, shared.openers, NOBODY)
        yield from self._directory.settle()

    def _list_sessions(self, session: Session, request: m.SessionList) -> list[tuple[Any, ...]]:
        now = self._directory.clock()
        return [as_tuple(s.info(now)) for s in self.sessions if request.pid in (0, s.pid)]

    def _arena_statistics(self, session: Session, request: m.ArenaStatisticsGet) -> tuple[Any, ...]:
        return as_tuple(self.arena.statistics(len(self.heaps), len(self.sessions)))

    def _reclaim(self, session: Session, request: m.ArenaReclaim) -> int | Job:
        if request.heap:
            shared = self._directory.locate(session, request.heap)
            self._directory.controls.bump(shared.heap_id)
            return len(shared.openers - {session.number})
        return self._reclaim_all(session)

    def _reclaim_all(self, session: Session) -> Job:
        asked: set[int] = set()
        for heap_id, shared in self.heaps.items():
            self._directory.controls.bump(heap_id)
            asked |= shared.openers
        for shared in list(self.heaps.values()):  # what heaps keep for themselves is wanted elsewhere
            yield from shared.heap.compact()
        return len(asked - {session.number})

    # -- heaps -------------------------------------------------------------------------------------------------------
    def _create_heap(self, session: Session, request: m.HeapCreate) -> tuple[Any, ...]:
        if request.flags & ~_FLAGS:
            raise InvalidArgumentError(f"unknown heap flags {request.flags & ~_FLAGS:#x}")
        if request.heap_name is not None and request.heap_name in self._directory.by_name:
            raise HeapExistsError(f"a heap named {request.heap_name!r} exists; open it, or choose another name")
        if request.heap_name is None and request.flags & F_PERSISTENT:
            raise InvalidArgumentError("a persistent heap needs a name: nobody could find it again")
        if request.flags & F_EXECUTABLE:
            check_executable()
        shared = self._make(
            session,
            request.heap_name,
            request.flags,
            initial=request.initial,
            maximum=request.maximum,
            max_block=request.max_block,
            quota=request.session_quota,
        )
        return self._directory.info(shared)

    def _make(
        self,
        session: Session,
        name: str | None,
        flags: int,
        *,
        initial: int = 0,
        maximum: int = 0,
        reserve: int = 0,
        max_block: int = 0,
        quota: int = 0,
        is_default: bool = False,
    ) -> SharedHeap:
        if len(self.heaps) >= self.limits.heaps:
            raise LimitError(
                f"the daemon has {len(self.heaps)} heaps, its limit; destroy some", limit=self.limits.heaps
            )
        self._quotas.check_new_heap(session, initial)
        heap_id = self._directory.controls.take()
        index = heap_id & ((1 << HEAP_INDEX_BITS) - 1)
        try:
            heap = Heap(self.arena, index, initial=initial, maximum=maximum, reserve=reserve, max_block=max_block)
        except HeapdError:
            self._directory.controls.abandon(heap_id)
            raise
        shared = SharedHeap(heap_id, name, flags, heap, session.number, is_default, quota=quota, initial=initial)
        self._note(shared.change())
        self.heaps[heap_id] = self._directory.by_index[index] = shared
        if name is not None:
            self._directory.by_name[name] = shared
        self._directory.controls.activate(heap_id, flags)
        self._directory.join(session, shared)
        return shared

    def _open_heap(self, session: Session, request: m.HeapOpen) -> tuple[Any, ...]:
        shared = self._directory.by_name.get(request.heap_name)
        if shared is None:
            raise NoSuchHeapError(f"there is no heap named {request.heap_name!r}")
        self._directory.join(session, shared)
        return self._directory.info(shared)

    def _open_heap_by_id(self, session: Session, request: m.HeapOpenId) -> tuple[Any, ...]:
        by_index = request.heap < 1 << HEAP_INDEX_BITS
        shared = self._directory.by_index.get(request.heap) if by_index else self.heaps.get(request.heap)
        if shared is None:
            raise self._directory.no_heap(request.heap)
        self._directory.join(session, shared)
        return self._directory.info(shared)

    def _default_heap(self, session: Session, request: m.HeapDefault) -> tuple[Any, ...]:
        if session.default_heap is None:
            reserve, commit = request.reserve or _DEFAULT_RESERVE, request.commit or _DEFAULT_COMMIT
            if commit > reserve:
                raise InvalidArgumentError(f"{commit} bytes to commit are more than the {reserve} to reserve")
            session.default_heap = self._make(
                session, None, F_SERIALIZE, initial=commit, reserve=reserve, is_default=True
            )
        return self._directory.info(session.default_heap)

    def _close_heap(self, session: Session, request: m.HeapClose) -> Job | None:
        shared = self._directory.locate(session, request.heap)
        if shared.creator == session.number and shared.name is None:
            raise NotPermittedError("an anonymous heap lives as long as the session that made it; destroy it instead")
        shared.openers.discard(session.number)
        del session.heaps[request.heap]
        session.sweeps.pop(request.heap, None)
        self._note((LEAVE, session.number, shared.heap_id))
        session.closed = {other for other in session.closed if not other.is_destroyed} | {shared}
        return self._destroy(shared) if self._must_go(shared, session) else None

    def _destroy_heap(self, session: Session, request: m.HeapDestroy) -> Job:
        shared = self._directory.locate(session, request.heap)
        if shared.is_default:
            raise NotPermittedError("a session's default heap cannot be destroyed; it goes with the session")
        return self._destroy(shared)

    def _destroy(self, shared: SharedHeap) -> Job:
        if shared.is_destroyed:
            return
        shared.is_destroyed = True
        self._directory.controls.release(shared.heap_id)
        del self.heaps[shared.heap_id]
        del self._directory.by_index[shared.index]
        if shared.name is not None:
            del self._directory.by_name[shared.name]
        for number in shared.openers:
            session = self.sessions.find(number)
            if session is not None:
                session.heaps.pop(shared.heap_id, None)
                session.sweeps.pop(shared.heap_id, None)
        self._directory.room.heap_gone(shared.heap_id)
        self._note((NO_HEAP, shared.index))
        shared.heap.close()
        yield from self._directory.settle_then(None)

    def _list_heaps(self, session: Session, request: m.HeapList) -> list[tuple[Any, ...]]:
        wanted = self.heaps
        if request.pid:
            wanted = {
                heap_id: shared
                for other in self.sessions
                if other.pid == request.pid and other.is_live
                for heap_id, shared in other.heaps.items()
            }
        page = [wanted[heap_id] for heap_id in sorted(wanted) if heap_id > request.after][: request.limit]
        if request.pid:  # within the page: who asks for more goes on after its largest id
            page.sort(key=lambda shared: not shared.is_default)
        return [self._directory.info(shared) for shared in page]

    # -- for the loop ------------------------------------------------------------------------------------------------
    def expire_waiters(self, now_ns: int) -> None:
        self._directory.room.expire(now_ns)

    def next_deadline_ns(self) -> int | None:
        return self._directory.room.next_deadline_ns() if self._directory.room.count else None

    def drain_ready(self) -> list[Waiter]:
        return self._directory.room.drain_ready()

    @property
    def has_persistent_heaps(self) -> bool:
        return any(shared.is_persistent for shared in self.heaps.values())

    def status(self) -> dict[str, Any]:
        """Plain values for the status answer; sizes in bytes."""
        arena = self.arena
        return {
            "segment": arena.segment.name,
            "sessions": len(self.sessions),
            "heaps": len(self.heaps),
            "session_limit": self.limits.sessions,
            "heap_limit": self.limits.heaps,
            "waiters": self._directory.room.count,
            "reserve": arena.shape.size,
            "reserved": arena.reserved,
            "commit_limit": arena.budget.limit,
            "committed": arena.budget.committed,
            "peak_committed": arena.budget.peak,
            "session_quota": self.limits.session_quota,
            "ledger": 0 if self._ledger is None else self._ledger.volume.segment.allocated_bytes,
        }

    def start(self, pid: int, start_time: int) -> None:
        """Say who serves the arena: in its header for clients, in the ledger for the next daemon.

        Args: pid, start_time (clock ticks after boot, /proc/PID/stat field 22).
        """
        if self._ledger is not None:
            self._ledger.volume.name_server(pid, start_time)
        self.arena.start(pid, start_time)

    def shutdown(self) -> None:
        """Mark the arena as stopped on purpose and unlink it, and with it the ledger."""
        if self._ledger is not None:
            self._ledger.volume.stop()  # first: what the header says counts for clients alone
        self.arena.stop()
        if self._ledger is not None:
            self._ledger.volume.remove()
