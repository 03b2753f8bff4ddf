"""Many heaps, many clients: every operation the service may ask for.

`handle` answers a request with plain values, with a *job* (a generator that yields between slices of a few ms and
returns the answer), or with a *waiter* (an answer that comes when a name is published). Nothing here blocks, and
nothing waits for a heap's mutex: the daemon is one thread, so its records need no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final

from heapd.arena import Arena
from heapd.errors import (
    HeapdError,
    HeapDestroyedError,
    HeapExistsError,
    HeapFullError,
    InvalidArgumentError,
    LimitError,
    NoSuchHeapError,
    NoSuchNameError,
    NotABlockError,
    NotPermittedError,
    WrongHeapError,
)
from heapd.heap import SLICE_BYTES, Heap, collect_statistics, validate_block, validate_heap, walk
from heapd.layout import (
    BUSY,
    F_EXECUTABLE,
    F_FREE_ORPHANS,
    F_GENERATE_EXCEPTIONS,
    F_PERSISTENT,
    F_SERIALIZE,
    HEAP_INDEX_BITS,
)
from heapd.manager.executable import check_executable
from heapd.manager.names import Waiter, WaitingRoom
from heapd.manager.sessions import Session, Sessions
from heapd.manager.shared import Controls, SharedHeap
from heapd.records import Grant, Publication, as_tuple
from heapd.units import KIB, MIB, PAGE_SHIFT
from heapd.wire import messages as m

__all__ = ["HeapManager", "Job", "Limits"]

Job = Generator[None, None, Any]

_FLAGS: Final = F_SERIALIZE | F_EXECUTABLE | F_PERSISTENT | F_GENERATE_EXCEPTIONS | F_FREE_ORPHANS
_DEFAULT_RESERVE: Final = 1 * MIB  # Win32 /HEAP defaults
_DEFAULT_COMMIT: Final = 4 * KIB
_WORDS_A_SLICE: Final = 5_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Counts no client can pass: sessions, heaps, names in one heap, waiters of one session. All arbitrary."""

    sessions: int = 4096
    heaps: int = 8192
    names: int = 65_536
    waiters: int = 1024


class HeapManager:
    """The daemon's records: sessions, heaps, names.

    Fields: arena, sessions, heaps (by id, in order of birth).
    """

    def __init__(
        self, arena: Arena, *, clock: Callable[[], int] = time.monotonic_ns, limits: Limits | None = None
    ) -> None:
        self.arena = arena
        self.limits = limits or Limits()
        self.sessions = Sessions(self.limits.sessions)
        self.heaps: dict[int, SharedHeap] = {}
        self._by_name: dict[str, SharedHeap] = {}
        self._by_index: dict[int, SharedHeap] = {}
        self._controls = Controls(arena)
        self._room = WaitingRoom()
        self._clock = clock
        self._handlers: dict[type[m.Request], Callable[[Session, Any], Any]] = {
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
            m.HeapAlloc: self._alloc,
            m.HeapAllocMany: self._alloc_many,
            m.HeapResize: self._resize,
            m.HeapFree: self._free,
            m.HeapFreeMany: self._free_many,
            m.HeapLease: self._lease,
            m.HeapGiveBack: self._give_back,
            m.HeapWalk: self._walk,
            m.HeapValidate: self._validate,
            m.HeapCompact: self._compact,
            m.HeapStatisticsGet: self._heap_statistics,
            m.NamePublish: self._publish,
            m.NameLookup: self._lookup,
            m.NameUnpublish: self._unpublish,
            m.NameList: self._list_names,
        }

    def handle(self, session: Session, request: m.Request) -> Any:
        """Do what a live session asks. Returns: the answer, a Job or a Waiter. Raises: HeapdError."""
        session.requests += 1
        if type(request) is m.SessionClose:
            return self.end_session(session)
        return self._handlers[type(request)](session, request)

    # -- sessions ----------------------------------------------------------------------------------------------------
    def open_session(self, pid: int, uid: int) -> Session:
        """Raises: LimitError."""
        return self.sessions.open(pid, uid, self._clock())

    def session_of(self, token: bytes) -> Session:
        """Raises: SessionLostError."""
        return self.sessions.locate(token)

    @property
    def live_session_count(self) -> int:
        return len(self.sessions)

    def end_session(self, session: Session) -> Job:
        """Take back what a session leaves: its anonymous heaps, its caches, named heaps that nobody else has open."""
        if not session.is_live:
            return
        self.sessions.end(session)
        self._room.session_gone(session)
        session.heaps.update((shared.heap_id, shared) for shared in session.closed if not shared.is_destroyed)
        for shared in list(session.heaps.values()):
            shared.openers.discard(session.number)
            if not self._must_go(shared, session):
                yield from self._reap(shared, session)
            # A reap yields: the heap may have lost its last session, or gone, meanwhile.
            if not shared.is_destroyed and self._must_go(shared, session):
                yield from self._destroy(shared)
            session.heaps.pop(shared.heap_id, None)
        session.default_heap = None
        self.sessions.retire({number for shared in self.heaps.values() for number in shared.orphan_owners})

    @staticmethod
    def _must_go(shared: SharedHeap, session: Session) -> bool:
        if shared.is_destroyed or shared.is_persistent:
            return False
        return not shared.openers if shared.name is not None else shared.creator == session.number

    def _reap(self, shared: SharedHeap, session: Session) -> Job:
        """Go through the blocks of a heap that lives on: take back those the ended session cached, and, by the
        heap's policy, those it had allocated; note which ended sessions still own some."""
        heap, words = shared.heap, self.arena.words
        owners: set[int] = set()
        for seen, (slot, address) in enumerate(heap.lent_slots(), 1):
            word, form = words[slot], self.arena.shape.word_format(slot)
            number = form.session(word)
            if number == session.number and (form.state(word) != BUSY or shared.frees_orphans):
                slab, index, _ = heap.locate(address)
                heap.take_back(slab, index, slot)
            elif not self.sessions.is_live(number):
                owners.add(number)
            if seen % _WORDS_A_SLICE == 0:
                yield
                if shared.is_destroyed:
                    return
        shared.orphan_owners = owners
        yield from self._settle()

    def _settle(self) -> Job:
        """Decommit what was released, in slices."""
        while not self.arena.is_settled:
            self.arena.settle()
            yield

    def _list_sessions(self, session: Session, request: m.SessionList) -> list[tuple[Any, ...]]:
        now = self._clock()
        return [as_tuple(s.info(now)) for s in self.sessions if request.pid in (0, s.pid)]

    def _arena_statistics(self, session: Session, request: m.ArenaStatisticsGet) -> tuple[Any, ...]:
        committed = sum(shared.heap.space.committed for shared in self.heaps.values()) << PAGE_SHIFT
        return as_tuple(self.arena.statistics(committed, len(self.heaps), len(self.sessions)))

    def _reclaim(self, session: Session, request: m.ArenaReclaim) -> None:
        for heap_id in self.heaps:
            self._controls.bump(heap_id)

    # -- heaps -------------------------------------------------------------------------------------------------------
    def _create_heap(self, session: Session, request: m.HeapCreate) -> tuple[Any, ...]:
        if request.flags & ~_FLAGS:
            raise InvalidArgumentError(f"unknown heap flags {request.flags & ~_FLAGS:#x}")
        if request.heap_name is not None and request.heap_name in self._by_name:
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
        )
        return self._info(shared)

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
        is_default: bool = False,
    ) -> SharedHeap:
        if len(self.heaps) >= self.limits.heaps:
            raise LimitError(
                f"the daemon has {len(self.heaps)} heaps, its limit; destroy some", limit=self.limits.heaps
            )
        heap_id = self._controls.take()
        index = heap_id & ((1 << HEAP_INDEX_BITS) - 1)
        try:
            heap = Heap(self.arena, index, initial=initial, maximum=maximum, reserve=reserve, max_block=max_block)
        except HeapdError:
            self._controls.abandon(heap_id)
            raise
        shared = SharedHeap(heap_id, name, flags, heap, session.number, is_default)
        self.heaps[heap_id] = self._by_index[index] = shared
        if name is not None:
            self._by_name[name] = shared
        self._controls.activate(heap_id, flags)
        self._join(session, shared)
        return shared

    @staticmethod
    def _join(session: Session, shared: SharedHeap) -> None:
        session.heaps[shared.heap_id] = shared
        shared.openers.add(session.number)

    def _info(self, shared: SharedHeap) -> tuple[Any, ...]:
        return as_tuple(shared.info(self._controls.epoch(shared.heap_id), self.sessions.is_live(shared.creator)))

    def _open_heap(self, session: Session, request: m.HeapOpen) -> tuple[Any, ...]:
        shared = self._by_name.get(request.heap_name)
        if shared is None:
            raise NoSuchHeapError(f"there is no heap named {request.heap_name!r}")
        self._join(session, shared)
        return self._info(shared)

    def _open_heap_by_id(self, session: Session, request: m.HeapOpenId) -> tuple[Any, ...]:
        by_index = request.heap < 1 << HEAP_INDEX_BITS
        shared = self._by_index.get(request.heap) if by_index else self.heaps.get(request.heap)
        if shared is None:
            raise self._no_heap(request.heap)
        self._join(session, shared)
        return self._info(shared)

    def _no_heap(self, heap_id: int) -> HeapdError:
        if self._controls.was_used(heap_id):
            return HeapDestroyedError(f"heap {heap_id} was destroyed")
        return NoSuchHeapError(f"there is no heap {heap_id}")

    def _default_heap(self, session: Session, request: m.HeapDefault) -> tuple[Any, ...]:
        if session.default_heap is None:
            reserve, commit = request.reserve or _DEFAULT_RESERVE, request.commit or _DEFAULT_COMMIT
            if commit > reserve:
                raise InvalidArgumentError(f"{commit} bytes to commit are more than the {reserve} to reserve")
            session.default_heap = self._make(
                session, None, F_SERIALIZE, initial=commit, reserve=reserve, is_default=True
            )
        return self._info(session.default_heap)

    def _locate(self, session: Session, heap_id: int) -> SharedHeap:
        """A heap that the session has open."""
        shared = session.heaps.get(heap_id)
        if shared is None:
            if heap_id in self.heaps:
                raise NoSuchHeapError(f"heap {heap_id} is not open in this session; open it first")
            raise self._no_heap(heap_id)
        return shared

    def _close_heap(self, session: Session, request: m.HeapClose) -> Job | None:
        shared = self._locate(session, request.heap)
        if shared.creator == session.number and shared.name is None:
            raise NotPermittedError("an anonymous heap lives as long as the session that made it; destroy it instead")
        shared.openers.discard(session.number)
        del session.heaps[request.heap]
        session.closed = {other for other in session.closed if not other.is_destroyed} | {shared}
        return self._destroy(shared) if self._must_go(shared, session) else None

    def _destroy_heap(self, session: Session, request: m.HeapDestroy) -> Job:
        shared = self._locate(session, request.heap)
        if shared.is_default:
            raise NotPermittedError("a session's default heap cannot be destroyed; it goes with the session")
        return self._destroy(shared)

    def _destroy(self, shared: SharedHeap) -> Job:
        if shared.is_destroyed:
            return
        shared.is_destroyed = True
        self._controls.release(shared.heap_id)
        del self.heaps[shared.heap_id]
        del self._by_index[shared.index]
        if shared.name is not None:
            del self._by_name[shared.name]
        for number in shared.openers:
            session = self.sessions.find(number)
            if session is not None:
                session.heaps.pop(shared.heap_id, None)
        self._room.heap_gone(shared.heap_id)
        shared.heap.close()
        yield from self._settle()

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
        return [self._info(shared) for shared in page]

    # -- blocks ------------------------------------------------------------------------------------------------------
    def _alloc(self, session: Session, request: m.HeapAlloc) -> Grant | Job:
        shared = session.heaps.get(request.heap) or self._locate(session, request.heap)
        if request.size > SLICE_BYTES:
            return self._alloc_large(session, shared, request.size)
        return shared.heap.alloc(request.size, session.number)

    def _alloc_large(self, session: Session, shared: SharedHeap, size: int) -> Job:
        grant = yield from shared.heap.alloc_in_slices(size, session.number)
        if not session.is_live and not shared.is_destroyed:
            # The session ended while its block was committed: nobody will ever hear of the block.
            shared.heap.free(grant.address, grant.generation)
            yield from self._settle()
        return grant

    def _alloc_many(self, session: Session, request: m.HeapAllocMany) -> list[Grant] | Job:
        shared = self._locate(session, request.heap)
        sizes = request.sizes
        for size in sizes:
            shared.heap.check_size(size)
        if sum(sizes) > SLICE_BYTES:
            return self._alloc_many_large(session, shared, sizes)
        grants: list[Grant] = []
        try:
            for size in sizes:
                grants.append(shared.heap.alloc(size, session.number))
        except HeapFullError:
            self._undo(shared, grants)
            raise
        return grants

    def _alloc_many_large(self, session: Session, shared: SharedHeap, sizes: list[int]) -> Job:
        grants: list[Grant] = []
        spent = 0
        try:
            for size in sizes:
                if size > SLICE_BYTES:
                    grants.append((yield from shared.heap.alloc_in_slices(size, session.number)))
                else:
                    grants.append(shared.heap.alloc(size, session.number))
                    spent += size
                    if spent > SLICE_BYTES:
                        spent = 0
                        yield
                if shared.is_destroyed:
                    raise HeapDestroyedError("the heap was destroyed while the blocks were allocated")
        except HeapFullError:
            self._undo(shared, grants)
            raise
        if not session.is_live and not shared.is_destroyed:
            self._undo(shared, grants)
        return grants

    @staticmethod
    def _undo(shared: SharedHeap, grants: list[Grant]) -> None:
        for grant in grants:
            shared.heap.free(grant.address, grant.generation)

    def _resize(self, session: Session, request: m.HeapResize) -> Grant | Job:
        shared = self._locate(session, request.heap)
        try:
            grant = shared.heap.resize(
                request.address, request.generation, request.size, in_place_only=request.in_place_only
            )
        except NotABlockError as error:
            raise self._explain(shared, request.address, error) from None
        return grant if self.arena.is_settled else self._settle_then(grant)

    def _settle_then(self, answer: Any) -> Job:
        yield from self._settle()
        return answer

    def _free(self, session: Session, request: m.HeapFree) -> Job | None:
        shared = session.heaps.get(request.heap) or self._locate(session, request.heap)
        try:
            shared.heap.free(request.address, request.generation)
        except NotABlockError as error:
            raise self._explain(shared, request.address, error) from None
        return None if self.arena.is_settled else self._settle_then(None)

    def _free_many(self, session: Session, request: m.HeapFreeMany) -> Job | None:
        shared = self._locate(session, request.heap)
        if len(request.blocks) % 2:
            raise InvalidArgumentError("blocks are pairs of address and generation; one is incomplete")
        pairs = list(zip(request.blocks[::2], request.blocks[1::2], strict=True))
        if len({address for address, _ in pairs}) != len(pairs):
            raise InvalidArgumentError("a block is named twice in one free_many; nothing was freed")
        for address, generation in pairs:
            try:
                shared.heap.check_free(address, generation)
            except NotABlockError as error:
                raise self._explain(shared, address, error) from None
        for address, generation in pairs:
            shared.heap.free(address, generation)
        return None if self.arena.is_settled else self._settle_then(None)

    def _lease(self, session: Session, request: m.HeapLease) -> list[Grant]:
        shared = session.heaps.get(request.heap) or self._locate(session, request.heap)
        if request.size * request.count > SLICE_BYTES:
            raise InvalidArgumentError(
                f"a lease of {request.count} blocks of {request.size} bytes is too large at once"
            )
        return shared.heap.lease(request.size, request.count, session.number)

    def _give_back(self, session: Session, request: m.HeapGiveBack) -> int | Job:
        shared = session.heaps.get(request.heap) or self._locate(session, request.heap)
        if request.everything:
            return self._give_back_all(session, shared)
        taken = sum(shared.heap.give_back(address, session.number) for address in request.addresses)
        return taken if self.arena.is_settled else self._settle_then(taken)

    def _give_back_all(self, session: Session, shared: SharedHeap) -> Job:
        taken = 0
        for seen, (_, address) in enumerate(shared.heap.lent_slots(), 1):
            taken += shared.heap.give_back(address, session.number)
            if seen % _WORDS_A_SLICE == 0:
                yield
                if shared.is_destroyed:
                    return taken
        shared.heap.drop_empty_slabs()
        yield from self._settle()
        return taken

    def _explain(self, shared: SharedHeap, address: int, error: NotABlockError) -> HeapdError:
        """Say more about an address that is no block of the heap."""
        if shared.heap.owns(address):
            return error
        for other in self.heaps.values():
            if other.heap.owns(address):
                name = repr(other.name) if other.name else other.heap_id
                return WrongHeapError(f"the address {address:#x} lies in heap {name}, not in this one")
        return NotABlockError(f"the address {address:#x} lies in no heap")

    # -- looking -----------------------------------------------------------------------------------------------------
    def _walk(self, session: Session, request: m.HeapWalk) -> list[Any]:
        shared = self._locate(session, request.heap)
        entries, cursor = walk(shared.heap, request.cursor, request.limit, self.sessions.is_live)
        return [[as_tuple(entry) for entry in entries], cursor]

    def _validate(self, session: Session, request: m.HeapValidate) -> list[tuple[Any, ...]] | Job:
        shared = self._locate(session, request.heap)
        if request.address:
            found = validate_block(shared.heap, request.address, self.sessions.is_known)
            return [as_tuple(violation) for violation in found]
        return self._validate_all(shared)

    def _validate_all(self, shared: SharedHeap) -> Job:
        found = list(self._controls.violations(shared.heap_id, shared.flags))
        found += yield from validate_heap(shared.heap, self.sessions.is_known)
        return [as_tuple(violation) for violation in found]

    def _compact(self, session: Session, request: m.HeapCompact) -> Job:
        shared = self._locate(session, request.heap)
        self._controls.bump(shared.heap_id)
        return shared.heap.compact()

    def _heap_statistics(self, session: Session, request: m.HeapStatisticsGet) -> Job:
        shared = self._locate(session, request.heap)
        return self._collect(shared)

    def _collect(self, shared: SharedHeap) -> Job:
        statistics = yield from collect_statistics(shared.heap, self.sessions.is_live)
        return as_tuple(statistics)

    # -- names -------------------------------------------------------------------------------------------------------
    def _publish(self, session: Session, request: m.NamePublish) -> None:
        shared = self._locate(session, request.heap)
        try:
            shared.heap.check_free(request.address, request.generation)
        except NotABlockError as error:
            raise self._explain(shared, request.address, error) from None
        if len(shared.names) >= self.limits.names and request.block_name not in shared.names:
            raise LimitError(f"the heap has {len(shared.names)} names, the limit", limit=self.limits.names)
        _, _, slot = shared.heap.locate(request.address)
        shared.names[request.block_name] = slot, request.address, request.generation
        publication = self._publication(shared, request.block_name)
        assert publication is not None
        self._room.publish(shared.heap_id, request.block_name, publication)

    def _publication(self, shared: SharedHeap, name: str) -> Publication | None:
        """What a name stands for; None, and the name is forgotten, if its block was freed."""
        entry = shared.names.get(name)
        if entry is None:
            return None
        slot, address, generation = entry
        form = self.arena.shape.word_format(slot)
        try:
            shared.heap.check_free(address, generation)
        except HeapdError:
            del shared.names[name]
            return None
        return Publication(name, slot, address, generation, form.size(self.arena.words[slot]))

    def _lookup(self, session: Session, request: m.NameLookup) -> tuple[Any, ...] | Waiter:
        shared = self._locate(session, request.heap)
        publication = self._publication(shared, request.block_name)
        if publication is not None:
            return as_tuple(publication)
        if not request.timeout_ms:
            raise NoSuchNameError(f"nothing is published as {request.block_name!r} in this heap")
        if session.waiters >= self.limits.waiters:
            raise LimitError(f"the session waits for {session.waiters} names, the limit", limit=self.limits.waiters)
        waiter = Waiter(session, shared.heap_id, request.block_name, self._clock() + request.timeout_ms * 1_000_000)
        self._room.add(waiter)
        return waiter

    def _unpublish(self, session: Session, request: m.NameUnpublish) -> None:
        shared = self._locate(session, request.heap)
        if shared.names.pop(request.block_name, None) is None:
            raise NoSuchNameError(f"nothing is published as {request.block_name!r} in this heap")

    def _list_names(self, session: Session, request: m.NameList) -> list[tuple[Any, ...]]:
        shared = self._locate(session, request.heap)
        found: list[tuple[Any, ...]] = []
        for name in sorted(shared.names):
            if request.after is not None and name <= request.after:
                continue
            publication = self._publication(shared, name)
            if publication is not None:
                found.append(as_tuple(publication))
            if len(found) == request.limit:
                break
        return found

    # -- for the loop ------------------------------------------------------------------------------------------------
    def expire_waiters(self, now_ns: int) -> None:
        self._room.expire(now_ns)

    def next_deadline_ns(self) -> int | None:
        return self._room.next_deadline_ns() if self._room.count else None

    def drain_ready(self) -> list[Waiter]:
        return self._room.drain_ready()

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
            "waiters": self._room.count,
            "reserve": arena.shape.size,
            "reserved": arena.reserved,
            "commit_limit": arena.budget.limit,
            "committed": arena.budget.committed,
            "peak_committed": arena.budget.peak,
        }

    def shutdown(self) -> None:
        """Mark the arena as stopped on purpose and unlink it."""
        self.arena.stop()
