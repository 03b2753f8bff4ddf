"""A machine that does to a service what clients, deaths, restarts and full memory do, beside a model of plain dicts.

Frames go in and frames come out, as over a socket; blocks are allocated and freed past the daemon by storing their
words, as front ends do. After each step walk, validate and statistics are checked, and every block, name, heap and
session is where the model has it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from heapd.arena import Arena, remove_segment
from heapd.errors import (
    BlockTooLargeError,
    CannotResizeInPlaceError,
    DoubleFreeError,
    HeapdError,
    HeapDestroyedError,
    HeapFullError,
    InvalidArgumentError,
    MessageError,
    NoSuchHeapError,
    NoSuchNameError,
    NotABlockError,
    NotPermittedError,
    QuotaError,
    SessionLostError,
    StaleHandleError,
    VersionError,
    WaitTimeoutError,
    WrongHeapError,
)
from heapd.layout import F_FREE_ORPHANS, F_PERSISTENT, F_SERIALIZE, LAYOUT_VERSION
from heapd.manager import HeapManager
from heapd.records import EntryKind, Grant, HeapInfo, Publication
from heapd.service import Deferred, Identity, Peer, RunningJob, Service
from heapd.sizeclass import extent_of
from heapd.units import KIB, MIB
from heapd.wire import OPS, Request, decode_request, encode_request
from heapd.wire import messages as m
from tests.harness import unique_name
from tests.invariants import check_manager, fill, pattern, read, walk_all
from tests.service.model import (
    UID,
    Caller,
    Job,
    ModelBlock,
    ModelHeap,
    ModelSession,
    Wait,
    failing_commits,
    publication,
    result_of,
)

RESERVE, COMMIT_LIMIT = 192 * MIB, 128 * MIB
MOST_SESSIONS, MOST_HEAPS, MOST_BLOCKS = 4, 4, 60

picks = st.integers(0, 10**6)  # which one of however many there are
sizes = st.one_of(st.integers(0, 300), st.integers(0, 9000), st.integers(0, 300_000))
names = st.sampled_from(["a", "b", "c"])


class ServiceMachine(RuleBasedStateMachine):
    """`operations`: frames that were handled, of all machines."""

    operations: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000_000
        self.sweeps = count(1)
        self.names = f"heapd-{unique_name()}"
        arena = Arena.create(self.names, reserve=RESERVE, commit_limit=COMMIT_LIMIT)
        self.serve(HeapManager.create(arena, f"{self.names}-ledger", clock=self.clock))
        self.peers: list[Peer] = []
        self.sessions: list[ModelSession] = []
        self.heaps: dict[int, ModelHeap] = {}
        self.gone: list[int] = []  # ids of heaps that were destroyed
        self.waits: list[Wait] = []
        self.jobs: list[Job] = []
        self.patterns = 0
        self.last: tuple[bytes, bytes] | None = None  # a request that changed something, and its answer
        self.next_pid = 100

    def clock(self) -> int:
        return self.now

    def serve(self, manager: HeapManager) -> None:
        self.manager = manager
        identity = Identity(
            name="x", endpoint="ipc:///x", work="ipc:///x.work", segment=self.names, instance=manager.arena.instance,
            incarnation=1, arena_size=RESERVE, pid=7, uid=UID, start_time=9, version="1", python="3", started_at=0.0,
            started_ns=0,
        )  # fmt: skip
        self.service = Service(manager, identity, clock=self.clock)

    # -- asking ------------------------------------------------------------------------------------------------------
    def handle(self, frame: bytes) -> bytes | RunningJob | Deferred:
        type(self).operations += 1
        return self.service.handle_work(frame)

    def send(self, session: ModelSession, request: Request) -> bytes | RunningJob | Deferred:
        session.last_id += 1
        frame = encode_request(request, session.last_id, session.token)
        answer = self.handle(frame)
        if isinstance(answer, bytes) and not request.is_idempotent and session in self.sessions:
            self.last = frame, answer
        return answer

    def ask(self, session: ModelSession, request: Request) -> Any:
        """The result, when all its slices have run; raises its error."""
        answer = self.send(session, request)
        if isinstance(answer, RunningJob):
            while not answer.step():
                pass
            answer = answer.answer or b""
        assert isinstance(answer, bytes), request
        return result_of(answer)

    def refused(self, session: ModelSession, request: Request, *kinds: type[HeapdError]) -> HeapdError:
        """The error, which must be of one of the kinds."""
        try:
            result = self.ask(session, request)
        except kinds as error:
            return error
        raise AssertionError(f"{request} was answered {result}, not refused as {kinds}")

    def pair(self, pick: int) -> tuple[ModelSession, ModelHeap]:
        """A session and a heap that it has open."""
        pairs = [(session, self.heaps[heap]) for session in self.sessions for heap in sorted(session.heaps)]
        return pairs[pick % len(pairs)]

    def busy(self, heap: ModelHeap, pick: int) -> ModelBlock | None:
        found = [block for block in heap.blocks.values() if block.size is not None]
        return found[pick % len(found)] if found else None

    # -- what the model does -----------------------------------------------------------------------------------------
    def add(self, heap: ModelHeap, grant: Grant, owner: int, size: int | None) -> ModelBlock:
        assert grant.address not in heap.blocks, "a block was given out twice"
        block = heap.blocks[grant.address] = ModelBlock(grant, owner, size)
        if size is not None:
            self.write(block, size)
        return block

    def write(self, block: ModelBlock, size: int) -> None:
        self.patterns += 1
        block.size, block.seed = size, self.patterns
        fill(self.manager.arena, block.grant.address, min(size, 5000), block.seed)

    def check_bytes(self, block: ModelBlock) -> None:
        kept = min(block.size or 0, 5000)
        assert read(self.manager.arena, block.grant.address, kept) == pattern(kept, block.seed)

    def store(self, block: ModelBlock, owner: int, generation: int, size: int | None) -> None:
        """What a front end stores in a block's word."""
        form = self.manager.arena.shape.word_format(block.grant.slot)
        word = form.cached(owner, generation) if size is None else form.busy(owner, generation, size)
        self.manager.arena.words[block.grant.slot] = word
        block.owner, block.size = owner, size
        block.grant = block.grant._replace(generation=generation)

    def forget_heap(self, heap: ModelHeap) -> None:
        heap_id = heap.info.heap_id
        del self.heaps[heap_id]
        self.gone.append(heap_id)
        for session in self.sessions:
            session.heaps.discard(heap_id)
        for wait in self.waits:
            if wait.heap_id == heap_id:
                wait.end = wait.end or HeapDestroyedError

    def forget_session(self, session: ModelSession) -> None:
        self.sessions.remove(session)
        for wait in self.waits:
            if wait.session is session:
                wait.end = SessionLostError
        for heap_id in session.known & self.heaps.keys():
            heap = self.heaps[heap_id]
            heap.openers.discard(session.number)
            is_anonymous = heap.info.name is None
            if not heap.is_persistent and (heap.creator == session.number if is_anonymous else not heap.openers):
                self.forget_heap(heap)
                continue
            for address, block in list(heap.blocks.items()):
                if block.owner == session.number and (block.size is None or heap.frees_orphans):
                    del heap.blocks[address]

    def may_be_full(self, heap: ModelHeap, session: ModelSession, size: int, error: HeapFullError) -> None:
        """Whether a request for `size` bytes of extents may be refused so."""
        assert 0 <= error.used <= error.limit or error.bound == "heap-quota", error
        if error.bound == "heap":
            assert heap.info.maximum, error
        elif isinstance(error, QuotaError):
            others = heap.openers - {session.number}
            mine = sum(block.grant.extent for block in heap.blocks.values() if block.owner not in others)
            assert error.bound == "heap-quota", error
            assert mine + size > heap.info.session_quota > 0, (error, mine)
        else:
            assert error.bound in ("commit", "reserve"), error
            assert sum(job.size for job in self.jobs) + size > 16 * MIB, error

    @staticmethod
    def may_be_full_for_large(error: HeapFullError) -> None:
        assert error.bound in ("commit", "reserve"), error

    # -- what is rarer than work on blocks -----------------------------------------------------------------------------
    @initialize()
    def begin_with_two_sessions_and_a_heap(self) -> None:
        self.connect(1)
        self.connect(1)
        self.create_heap(0, "a", F_SERIALIZE, 0, 0, 0)
        self.open_heap(1, 1)

    @rule(
        pick=picks,
        which=picks,
        name=st.none() | names,
        flags=st.sampled_from([0, 0, F_FREE_ORPHANS, F_PERSISTENT, F_PERSISTENT | F_FREE_ORPHANS]),
        maximum=st.sampled_from([0, 0, 300 * KIB, 2 * MIB]),
        quota=st.sampled_from([0, 0, 100 * KIB]),
        initial=st.sampled_from([0, 0, 50_000]),
    )
    def begin(
        self, pick: int, which: int, name: str | None, flags: int, maximum: int, quota: int, initial: int
    ) -> None:
        """A session, a heap, or a heap opened by one more."""
        if len(self.sessions) < 2 or (pick % 3 == 0 and len(self.sessions) < MOST_SESSIONS):
            self.connect(which)
        elif not self.heaps or (pick % 3 == 1 and len(self.heaps) < MOST_HEAPS):
            self.create_heap(which, name, F_SERIALIZE | flags, maximum, quota, initial)
        else:
            self.open_heap(pick, which)

    @precondition(lambda self: self.sessions)
    @rule(pick=picks, what=st.sampled_from(["session", "process", "daemon", "daemon", "heap", "use of a heap"]))
    def end(self, pick: int, what: str) -> None:
        if what == "daemon":
            self.kill_daemon()
        elif what == "process":
            self.kill_process(pick)
        elif self.jobs:
            self.run_all_slices()
        elif what == "session":
            self.close_session(pick)
        elif any(session.heaps for session in self.sessions):
            self.destroy_heap(pick) if what == "heap" else self.close_heap(pick)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, what=st.sampled_from([m.HeapCompact, m.HeapValidate, m.HeapStatisticsGet, m.ArenaReclaim, None]))
    def look(self, pick: int, what: Callable[[int], Request] | None) -> None:
        if what is None:
            self.list_all(pick)
        else:
            self.work_on_a_heap(pick, what)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(
        pick=picks,
        which=picks,
        garbage=st.binary(max_size=60),
        edits=st.lists(st.tuples(picks, st.integers(0, 255)), min_size=1, max_size=3),
    )
    def disturb(self, pick: int, which: int, garbage: bytes, edits: list[tuple[int, int]]) -> None:
        kind = which % 4
        if kind == 0:
            self.send_garbage(garbage)
        elif kind == 1:
            self.send_mutated(pick, edits)
        elif kind == 2:
            self.repeat()
        else:
            self.misuse(pick, which, 1 + edits[0][0] % 40)

    # -- sessions ----------------------------------------------------------------------------------------------------
    def connect(self, pick: int) -> None:
        if not self.peers or pick % 2:
            self.next_pid += 1
            self.peers.append(Peer(self.next_pid, UID, self.next_pid * 10))
        peer = self.peers[pick % len(self.peers)]
        type(self).operations += 1
        answer = self.service.handle_control(encode_request(m.Hello(LAYOUT_VERSION), 1), Caller(peer, peer.pid))
        assert answer is not None
        greeting = result_of(answer)
        self.sessions.append(ModelSession(greeting["session"], greeting["token"], peer))

    def close_session(self, pick: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        self.ask(session, m.SessionClose())
        self.forget_session(session)

    def kill_process(self, pick: int) -> None:
        peer = self.peers.pop(pick % len(self.peers))
        type(self).operations += 1
        for job in self.service.end_process(peer):
            while not job.step():
                pass
        for session in [session for session in self.sessions if session.peer is peer]:
            self.forget_session(session)

    def kill_daemon(self) -> None:
        """Killed between two slices of the loop, and recovered; whoever waited asks again, if he likes."""
        type(self).operations += 1
        for shared in self.manager.heaps.values():
            shared.heap.space.is_closed = True  # jobs that are dropped do not tidy up: the dead do not
        self.manager.arena.segment.close()
        self.serve(HeapManager.recover(self.names, f"{self.names}-ledger", clock=self.clock))
        self.jobs.clear()
        self.waits.clear()
        peers = {session.number: session.peer for session in self.sessions}
        for session in self.manager.sessions:
            if session.is_live:
                peers[session.number].sessions.clear()
        for session in self.manager.sessions:
            if session.is_live:
                self.service.adopt(session, peers[session.number])
        for job in self.service.resume():
            while not job.step():
                pass

    # -- heaps -------------------------------------------------------------------------------------------------------
    def create_heap(self, pick: int, name: str | None, flags: int, maximum: int, quota: int, initial: int) -> None:
        session = self.sessions[pick % len(self.sessions)]
        request = m.HeapCreate(name, initial, maximum, flags, 0, quota)
        if name is None and flags & F_PERSISTENT:
            self.refused(session, request, InvalidArgumentError)
        elif name is not None and any(heap.info.name == name for heap in self.heaps.values()):
            self.refused(session, request, HeapdError)
        else:
            info = HeapInfo(*self.ask(session, request))
            assert (info.name, info.maximum, info.flags, info.session_quota) == (name, maximum, flags, quota)
            self.heaps[info.heap_id] = ModelHeap(info, session.number, {session.number})
            session.heaps.add(info.heap_id)
            session.known.add(info.heap_id)

    def open_heap(self, pick: int, which: int) -> None:
        session, heap = self.sessions[pick % len(self.sessions)], list(self.heaps.values())[which % len(self.heaps)]
        by_name = heap.info.name is not None and which % 2
        request: Request = m.HeapOpen(heap.info.name or "") if by_name else m.HeapOpenId(heap.info.heap_id)
        assert self.ask(session, request)[0] == heap.info.heap_id
        heap.openers.add(session.number)
        session.heaps.add(heap.info.heap_id)
        session.known.add(heap.info.heap_id)

    def close_heap(self, pick: int) -> None:
        session, heap = self.pair(pick)
        request = m.HeapClose(heap.info.heap_id)
        if heap.info.name is None and heap.creator == session.number:
            self.refused(session, request, NotPermittedError)
            return
        self.ask(session, request)
        heap.openers.discard(session.number)
        session.heaps.discard(heap.info.heap_id)
        if heap.info.name is not None and not heap.openers and not heap.is_persistent:
            self.forget_heap(heap)

    def destroy_heap(self, pick: int) -> None:
        session, heap = self.pair(pick)
        self.ask(session, m.HeapDestroy(heap.info.heap_id))
        self.forget_heap(heap)

    # -- blocks ------------------------------------------------------------------------------------------------------
    def grants(self, session: ModelSession, heap: ModelHeap, request: Request, wanted: list[int]) -> list[Grant]:
        """What a request for blocks of those sizes grants; none if it is refused with good reason."""
        total = sum(extent_of(size) for size in wanted)
        try:
            result = self.ask(session, request)
        except BlockTooLargeError:
            assert max(wanted) > heap.info.maximum > 0
            return []
        except HeapFullError as error:
            self.may_be_full(heap, session, total, error)
            return []
        return [Grant(*fields) for fields in (result if isinstance(result[0], list) else [result])]

    def is_crowded(self, heap: ModelHeap) -> bool:
        return len(heap.blocks) >= MOST_BLOCKS

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, size=sizes)
    def alloc(self, pick: int, size: int) -> None:
        session, heap = self.pair(pick)
        if not self.is_crowded(heap):
            for grant in self.grants(session, heap, m.HeapAlloc(heap.info.heap_id, size), [size]):
                self.add(heap, grant, session.number, size)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, wanted=st.lists(sizes, min_size=1, max_size=8))
    def alloc_many(self, pick: int, wanted: list[int]) -> None:
        session, heap = self.pair(pick)
        if not self.is_crowded(heap):
            found = self.grants(session, heap, m.HeapAllocMany(heap.info.heap_id, wanted), wanted)
            assert len(found) in (0, len(wanted))
            for grant, size in zip(found, wanted, strict=False):
                self.add(heap, grant, session.number, size)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, size=sizes, count=st.integers(1, 9))
    def lease(self, pick: int, size: int, count: int) -> None:
        session, heap = self.pair(pick)
        if not self.is_crowded(heap):
            for grant in self.grants(session, heap, m.HeapLease(heap.info.heap_id, size, count), [size]):
                assert grant.extent >= size
                self.add(heap, grant, session.number, None)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, which=picks, size=picks)
    def allocate_from_cache(self, pick: int, which: int, size: int) -> None:
        """Past the daemon, as a front end does."""
        session, heap = self.pair(pick)
        mine = [block for block in heap.blocks.values() if block.size is None and block.owner == session.number]
        if mine:
            block = mine[which % len(mine)]
            self.store(block, session.number, block.generation, size % (block.grant.extent + 1))
            self.write(block, block.size or 0)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, which=picks)
    def free_to_cache(self, pick: int, which: int) -> None:
        """Past the daemon, whoever allocated it, but where the daemon may free it meanwhile."""
        session, heap = self.pair(pick)
        block = self.busy(heap, which)
        if block is not None and (block.owner == session.number or not heap.frees_orphans):
            self.check_bytes(block)
            form = self.manager.arena.shape.word_format(block.grant.slot)
            self.store(block, session.number, form.next_generation(block.generation), None)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, which=st.lists(picks, min_size=1, max_size=5, unique=True), many=st.booleans())
    def free(self, pick: int, which: list[int], many: bool) -> None:
        session, heap = self.pair(pick)
        doomed = {block.grant.address: block for number in which if (block := self.busy(heap, number)) is not None}
        if not doomed:
            return
        for block in doomed.values():
            self.check_bytes(block)
        if many:
            flat = [value for block in doomed.values() for value in (block.grant.address, block.generation)]
            self.ask(session, m.HeapFreeMany(heap.info.heap_id, flat))
        else:
            for block in doomed.values():
                self.ask(session, m.HeapFree(heap.info.heap_id, block.grant.address, block.generation))
        for address in doomed:
            del heap.blocks[address]

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, everything=st.booleans(), junk=st.lists(picks, max_size=3))
    def give_back(self, pick: int, everything: bool, junk: list[int]) -> None:
        session, heap = self.pair(pick)
        mine = [a for a, block in heap.blocks.items() if block.size is None and block.owner == session.number]
        named = [*mine[: len(mine) // 2 + 1], *junk, *list(heap.blocks)[:1]]
        generations = {address: block.generation for address, block in heap.blocks.items()}
        taken = mine if everything else mine[: len(mine) // 2 + 1]
        taken = taken if everything else sorted(set(taken) | (set(mine) & set(named)))
        flat = [part for address in named for part in (address, generations.get(address, 1))]
        sweep = next(self.sweeps) if everything else 0
        answer = self.ask(session, m.HeapGiveBack(heap.info.heap_id, [] if everything else flat, sweep))
        assert answer == len(taken)
        for address in taken:
            del heap.blocks[address]

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, which=picks, size=sizes, in_place_only=st.booleans())
    def resize(self, pick: int, which: int, size: int, in_place_only: bool) -> None:
        session, heap = self.pair(pick)
        block = self.busy(heap, which)
        if block is None:
            return
        self.check_bytes(block)
        request = m.HeapResize(heap.info.heap_id, block.grant.address, block.generation, size, in_place_only)
        try:
            grant = Grant(*self.ask(session, request))
        except CannotResizeInPlaceError:
            assert size > block.grant.extent or not in_place_only
        except BlockTooLargeError:
            assert size > heap.info.maximum > 0
        except HeapFullError as error:
            self.may_be_full(heap, session, extent_of(size), error)
        else:
            assert grant[:3] == block.grant[:3]
            assert grant.extent >= size
            kept = read(self.manager.arena, grant.address, min(size, block.size or 0, 5000))
            assert kept == pattern(len(kept), block.seed)
            block.grant = grant
            block.owner = session.number if heap.frees_orphans else block.owner
            self.write(block, size)

    # -- large blocks, in slices ---------------------------------------------------------------------------------------
    @precondition(lambda self: len(self.jobs) < 2 and any(session.heaps for session in self.sessions))
    @rule(pick=picks, mebibytes=st.integers(17, 40))
    def begin_large(self, pick: int, mebibytes: int) -> None:
        session, heap = self.pair(pick)
        if heap.info.maximum or heap.info.session_quota:
            return
        with suppress(HeapFullError):
            answer = self.send(session, m.HeapAlloc(heap.info.heap_id, mebibytes * MIB))
            if isinstance(answer, bytes):
                result_of(answer)
            else:
                assert isinstance(answer, RunningJob)
                self.jobs.append(Job(answer, session, heap.info.heap_id, mebibytes * MIB))

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def run_slice(self, pick: int) -> None:
        type(self).operations += 1
        job = self.jobs[pick % len(self.jobs)]
        if not job.job.step():
            return
        self.jobs.remove(job)
        heap = self.heaps.get(job.heap_id)
        try:
            grant = Grant(*result_of(job.job.answer or b""))
        except HeapDestroyedError:
            assert heap is None
        except HeapFullError as error:
            self.may_be_full_for_large(error)
        else:
            if heap is not None and job.session in self.sessions:
                self.add(heap, grant, job.session.number, job.size)

    def run_all_slices(self) -> None:
        while self.jobs:
            self.run_slice(0)

    # -- names -------------------------------------------------------------------------------------------------------
    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, which=picks, name=names)
    def publish(self, pick: int, which: int, name: str) -> None:
        session, heap = self.pair(pick)
        block = self.busy(heap, which)
        if block is not None:
            self.ask(session, m.NamePublish(heap.info.heap_id, name, block.grant.address, block.generation))
            heap.names[name] = block.grant.address, block.generation
            for wait in self.waits:
                if (wait.heap_id, wait.name) == (heap.info.heap_id, name):
                    wait.end = wait.end or publication(name, block)

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, name=names, timeout_ms=st.sampled_from([0, 5, 100]))
    def look_up(self, pick: int, name: str, timeout_ms: int) -> None:
        session, heap = self.pair(pick)
        request = m.NameLookup(heap.info.heap_id, name, timeout_ms)
        block = heap.published(name)
        if block is not None:
            assert Publication(*self.ask(session, request)) == publication(name, block)
        elif not timeout_ms:
            self.refused(session, request, NoSuchNameError)
        else:
            deferred = self.send(session, request)
            assert isinstance(deferred, Deferred)
            deadline_ns = self.now + timeout_ms * 1_000_000
            self.waits.append(Wait(deferred, session, heap.info.heap_id, name, deadline_ns))

    @precondition(lambda self: any(session.heaps for session in self.sessions))
    @rule(pick=picks, name=names)
    def unpublish(self, pick: int, name: str) -> None:
        session, heap = self.pair(pick)
        request = m.NameUnpublish(heap.info.heap_id, name)
        try:
            self.ask(session, request)
        except NoSuchNameError:
            assert heap.published(name) is None
        heap.names.pop(name, None)

    @rule(milliseconds=st.sampled_from([1, 6, 200]))
    def pass_time(self, milliseconds: int) -> None:
        self.now += milliseconds * 1_000_000
        for wait in self.waits:
            if wait.deadline_ns <= self.now:
                wait.end = wait.end or WaitTimeoutError

    # -- looking, and whole heaps --------------------------------------------------------------------------------------
    def list_all(self, pick: int) -> None:
        session, heap = self.pair(pick)
        listed = {fields[0] for fields in self.ask(session, m.NameList(heap.info.heap_id))}
        assert listed == {name for name in heap.names if heap.published(name)}
        assert {fields[0] for fields in self.ask(session, m.HeapList())} == self.heaps.keys()
        live = {fields[0] for fields in self.ask(session, m.SessionList()) if fields[6]}
        assert live == {other.number for other in self.sessions}

    def work_on_a_heap(self, pick: int, kind: Callable[[int], Request]) -> None:
        session, heap = self.pair(pick)
        answer = self.ask(session, kind(heap.info.heap_id))
        assert kind is not m.HeapValidate or answer == []

    # -- what goes wrong -----------------------------------------------------------------------------------------------
    def misuse(self, pick: int, which: int, off: int) -> None:
        """Stale, interior, foreign and free addresses, in free, resize and publish."""
        session, heap = self.pair(pick)
        heap_id = heap.info.heap_id
        blocks = list(heap.blocks.values())
        if blocks:
            block = blocks[which % len(blocks)]
            address, generation = block.grant.address, block.generation
            wrong = StaleHandleError if block.size is not None else DoubleFreeError
            self.refused(session, m.HeapFree(heap_id, address, generation + off), wrong)
            self.refused(session, m.HeapResize(heap_id, address, generation + off, 5), wrong)
            self.refused(session, m.NamePublish(heap_id, "a", address, generation + off), wrong)
            if (inner := address + off) not in heap.blocks:
                self.refused(
                    session, m.HeapFree(heap_id, inner, generation), NotABlockError, WrongHeapError, DoubleFreeError
                )
        for other in self.heaps.values():
            if other is not heap and (foreign := self.busy(other, which)) is not None:
                request = m.HeapFreeMany(heap_id, [foreign.grant.address, foreign.generation])
                self.refused(session, request, WrongHeapError)
        for gone in self.gone[-1:]:
            self.refused(session, m.HeapAlloc(gone, 5), HeapDestroyedError)
        for other in self.heaps.values():
            if other.info.heap_id not in session.heaps:
                self.refused(session, m.HeapAlloc(other.info.heap_id, 5), NoSuchHeapError)

    def repeat(self) -> None:
        """The connection broke before the answer came: it is answered, and not done again."""
        if self.last is None:
            return
        frame, answer = self.last
        if decode_request(frame, OPS).token in {session.token for session in self.sessions}:
            assert self.handle(frame) == answer

    def send_garbage(self, frame: bytes) -> None:
        answer = self.handle(frame)
        assert isinstance(answer, bytes)
        with suppress(MessageError, VersionError):
            raise AssertionError(f"{frame!r} was answered {result_of(answer)}")

    def send_mutated(self, pick: int, edits: list[tuple[int, int]]) -> None:
        """A question with bytes changed: refused or answered; what it became must be a question still."""
        session = self.sessions[pick % len(self.sessions)]
        request = m.HeapWalk(next(iter(session.heaps), 1)) if pick % 2 else m.SessionList(pick)
        frame = bytearray(encode_request(request, 10**6, session.token))
        for at, value in edits:
            frame[at % len(frame)] = value
        with suppress(HeapdError):
            if not decode_request(bytes(frame), OPS).request.is_idempotent:
                return
        answer = self.handle(bytes(frame))
        assert isinstance(answer, (bytes, Deferred, RunningJob))

    @precondition(lambda self: any(session.heaps for session in self.sessions) and not self.jobs)
    @rule(pick=picks, wanted=st.lists(sizes, min_size=1, max_size=5), nth=st.integers(1, 6), persistent=st.booleans())
    def alloc_without_memory(self, pick: int, wanted: list[int], nth: int, persistent: bool) -> None:
        session, heap = self.pair(pick)
        if self.is_crowded(heap):
            return
        try:
            with failing_commits(nth, persistent):
                found = self.ask(session, m.HeapAllocMany(heap.info.heap_id, wanted))
        except BlockTooLargeError:
            assert max(wanted) > heap.info.maximum > 0
        except HeapFullError as error:
            if error.bound != "memory":
                self.may_be_full(heap, session, sum(map(extent_of, wanted)), error)
        else:
            for fields, size in zip(found, wanted, strict=True):
                self.add(heap, Grant(*fields), session.number, size)

    # -- after each step -----------------------------------------------------------------------------------------------
    @invariant()
    def waits_end_as_they_must(self) -> None:
        ready = self.service.take_ready(self.now)
        for deferred in ready:
            (wait,) = [wait for wait in self.waits if wait.deferred is deferred]
            self.waits.remove(wait)
            assert wait.end is not None, "a wait ended by itself"
            try:
                end: object = Publication(*result_of(deferred.answer()))
            except HeapdError as error:
                end = type(error)
            assert end == wait.end, (end, wait.end)
        assert not [wait for wait in self.waits if wait.end is not None], "nobody was told"

    @invariant()
    def everything_is_where_the_model_has_it(self) -> None:
        if self.jobs:
            return
        for job in self.service.take_chores():
            while not job.step():
                pass
        for job in [self.manager._directory.settle()]:
            for _ in job:
                pass
        check_manager(self.manager)
        assert self.manager.heaps.keys() == self.heaps.keys()
        live = {session.number for session in self.sessions}
        assert {session.number for session in self.manager.sessions if session.is_live} == live
        for heap_id, heap in self.heaps.items():
            shared = self.manager.heaps[heap_id]
            assert shared.openers == heap.openers
            entries = walk_all(shared.heap, is_live=self.manager.sessions.is_live)
            found = {
                (e.address, e.size if e.kind is EntryKind.BUSY else None, e.session, e.generation, e.orphaned)
                for e in entries
                if e.kind in (EntryKind.BUSY, EntryKind.CACHED)
            }
            assert found == {
                (address, b.size, b.owner, b.generation, b.size is not None and b.owner not in live)
                for address, b in heap.blocks.items()
            }

    def teardown(self) -> None:
        try:
            while self.jobs:
                self.run_slice(0)
            for heap in self.heaps.values():
                for block in heap.blocks.values():
                    self.check_bytes(block)
            while self.peers:
                self.kill_process(0)
            self.waits_end_as_they_must()
            self.everything_is_where_the_model_has_it()
            assert all(heap.is_persistent for heap in self.heaps.values())
        finally:
            self.manager.arena.segment.close()
            remove_segment(self.names)
            remove_segment(f"{self.names}-ledger")
