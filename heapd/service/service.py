"""Requests in, answers out: what every frame means, with no socket, thread or clock of its own.

A frame from the work socket is decoded, its token names the session, and unless the same request was answered before
(a client repeats what it sent before its connection broke) the manager carries it out. The answer is a frame, or an
object that will have one: a RunningJob for work in slices, a Deferred for a wait. Whatever a frame holds, an answer
comes out; a fault inside the daemon is logged and answered as one.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import GeneratorType
from typing import Any, Final

from heapd.errors import AccessError, DaemonStoppedError, HeapdError, LimitError, SessionLostError, VersionError
from heapd.layout import LAYOUT_VERSION
from heapd.service.backend import Caller, Job, Manager, Peer, Session
from heapd.service.histogram import Histogram
from heapd.service.pending import Deferred, ReplyMemory, RunningJob, answer_of_fault
from heapd.wire import (
    CONTROL_OPS,
    MAX_REQUEST_BYTES,
    OPS,
    Envelope,
    Request,
    decode_request,
    encode_error,
    encode_reply,
)
from heapd.wire.messages import Hello, SessionClose, Status, Stop

__all__ = ["Answer", "Identity", "Service"]

log = logging.getLogger("heapd.service")

Answer = bytes | RunningJob | Deferred

_MAX_UNFINISHED: Final = 2048  # jobs and waits of one session at once; arbitrary, above the manager's limit on waits
_NEVER: Final = 2**63
_ENDED_SESSIONS: Final = 64  # arbitrary: sessions whose last answers outlive them, for a repeated session.close


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this daemon is, as hello and status tell it.

    Fields:
        name, endpoint, work   of the daemon, of itself, of its work socket (a ZeroMQ address)
        segment, instance      name of the shared memory segment; the arena's 16 random bytes
        incarnation            restarts of the daemon on this arena, from 1
        arena_size             bytes
        pid, uid, start_time   of the daemon's process; start_time in clock ticks after boot
        gid                    group whose members are served too, None: its user alone
        version, python        of heapd and of the interpreter
        started_at             wall clock, seconds since the epoch
        started_ns             the service's clock at the start
    """

    name: str
    endpoint: str
    work: str
    segment: str
    instance: bytes
    incarnation: int
    arena_size: int
    pid: int
    uid: int
    start_time: int
    version: str
    python: str
    started_at: float
    started_ns: int
    gid: int | None = None


class Service:
    """Dispatch over one manager. `clock` gives nanoseconds; `counters` are the server's own, shown by status."""

    def __init__(
        self, manager: Manager, identity: Identity, *, clock: Callable[[], int], max_process_sessions: int = 256
    ) -> None:
        self._manager = manager
        self._identity = identity
        self._clock = clock
        self._max_process_sessions = max_process_sessions
        self._known: dict[bytes, tuple[Session, ReplyMemory]] = {}  # open sessions, by token
        self._ended: OrderedDict[bytes, ReplyMemory] = OrderedDict()
        self._peers: dict[bytes, Peer] = {}
        self._idle_peers: list[Peer] = []
        self._waiting: dict[int, Deferred] = {}  # by id() of the waiter, which the Deferred keeps alive
        self._next_deadline = _NEVER
        self._overtaken: list[Deferred] = []  # waits that ended with their session, to be answered
        self.latency = Histogram()
        self.counters: dict[str, int] = {"requests_refused": 0, "requests_repeated": 0, "callers_refused": 0}
        self.is_stopping = False

    # -- the work socket ---------------------------------------------------------------------------------------------
    def handle_work(self, frame: bytes) -> Answer:
        """The answer to one frame from the work socket; never raises."""
        try:
            request_id, token, request = decode_request(frame, OPS)
        except HeapdError as error:
            return self._refusal(error)
        known = self._known.get(token)
        if known is None:
            return self._answer_without_session(request_id, token)
        session, memory = known
        repeated = memory.find(request_id)
        if repeated is not None:
            self.counters["requests_repeated"] += 1
            return repeated
        if type(request) is SessionClose:
            answer = self._close(session, request_id, memory)
        else:
            answer = self._execute(session, request_id, request, memory)
        if not isinstance(answer, bytes):
            memory.unfinished[request_id] = answer
        elif request.is_idempotent:
            self._manager.commit(session, 0, b"")
        else:
            memory.keep(request_id, answer)
            self._manager.commit(session, request_id, answer)
        return answer

    def _execute(self, session: Session, request_id: int, request: Request, memory: ReplyMemory) -> Answer:
        try:
            if len(memory.unfinished) >= _MAX_UNFINISHED:
                raise LimitError(
                    f"{len(memory.unfinished)} requests of this session are unfinished; wait for some",
                    limit=_MAX_UNFINISHED,
                )
            outcome = self._manager.handle(session, request)
            if outcome is None or isinstance(outcome, (tuple, list)):
                return encode_reply(request_id, outcome)
            if isinstance(outcome, GeneratorType):
                job = RunningJob(
                    outcome,
                    request.name,
                    request_id,
                    memory,
                    is_kept=not request.is_idempotent,
                    commit=partial(self._manager.commit, session),
                )
                # The first slice at once: what follows on the same socket finds it begun, and most jobs done.
                return (job.answer or b"") if job.step() else job
            if hasattr(outcome, "ready"):
                deferred = Deferred(outcome, request.name, request_id, memory)
                if outcome.ready:
                    return deferred.answer()
                self._waiting[id(outcome)] = deferred
                self._next_deadline = min(self._next_deadline, outcome.deadline_ns)
                return deferred
            return encode_reply(request_id, outcome)
        except HeapdError as error:
            return encode_error(request_id, error)
        except Exception:
            return answer_of_fault(request_id, request.name)

    def _answer_without_session(self, request_id: int, token: bytes) -> Answer:
        """A repeated session.close still gets its answer; anything else is told that the session is gone."""
        memory = self._ended.get(token)
        answer = memory.find(request_id) if memory is not None else None
        if answer is not None:
            return answer
        lost = "the daemon does not know this session: it was closed, or the daemon is another one"
        return encode_error(request_id, SessionLostError(lost))

    def _refusal(self, error: HeapdError) -> bytes:
        self.counters["requests_refused"] += 1
        return encode_error(int(error.details.get("request_id") or 0), error)

    # -- the control socket ------------------------------------------------------------------------------------------
    def handle_control(self, frame: bytes, caller: Caller) -> bytes | None:
        """The answer to one frame from the control socket, None if its sender has died; never raises."""
        try:
            envelope = decode_request(frame, CONTROL_OPS)
        except HeapdError as error:
            return self._refusal(error)
        request_id = envelope.request_id
        try:
            self._check_caller(caller, envelope.request)
            return self._control(envelope, caller)
        except HeapdError as error:
            return encode_error(request_id, error)
        except Exception:
            return answer_of_fault(request_id, envelope.request.name)

    def _check_caller(self, caller: Caller, request: Request) -> None:
        if caller.pid == 0:
            self.counters["callers_refused"] += 1
            raise AccessError(
                "this daemon cannot see the calling process: they are in different pid namespaces; run both in one "
                "container, or both outside"
            )
        who = self._identity
        if caller.uid == who.uid:
            return
        if who.gid is None or not caller.is_member(who.gid):
            self.counters["callers_refused"] += 1
            group = "" if who.gid is None else f" and group {who.gid}"
            raise AccessError(f"this daemon serves user {who.uid}{group}, the caller is user {caller.uid}")
        if type(request) is Stop:
            raise AccessError(f"this daemon is user {who.uid}'s to stop, the caller is user {caller.uid}")

    def _control(self, envelope: Envelope, caller: Caller) -> bytes | None:
        request = envelope.request
        if type(request) is Hello:
            peer = caller.admit()
            return None if peer is None else encode_reply(envelope.request_id, self._hello(request, peer))
        if type(request) is Status:
            return encode_reply(envelope.request_id, self.status())
        self.is_stopping = True
        log.info("stop was asked for by process %d", caller.pid, extra={"client": caller.pid})
        return encode_reply(envelope.request_id, None)

    def _hello(self, request: Hello, peer: Peer) -> dict[str, Any]:
        if request.layout_version != LAYOUT_VERSION:
            raise VersionError(
                f"the daemon's memory layout is version {LAYOUT_VERSION}, the client knows {request.layout_version}",
                daemon=LAYOUT_VERSION,
            )
        if len(peer.sessions) >= self._max_process_sessions:
            raise LimitError(
                f"process {peer.pid} has {len(peer.sessions)} sessions open, and may have no more",
                limit=self._max_process_sessions,
            )
        session = self._manager.open_session(peer.pid, peer.uid, peer.start_time)
        self.adopt(session, peer)
        self._manager.commit(session, 0, b"")
        log.info(
            "session %d opened by process %d",
            session.number,
            peer.pid,
            extra={"session": session.number, "client": peer.pid, "uid": peer.uid},
        )
        who = self._identity
        return {
            "session": session.number,
            "token": session.token,
            "instance": who.instance,
            "incarnation": who.incarnation,
            "segment": who.segment,
            "arena_size": who.arena_size,
            "work": who.work,
            "daemon_pid": who.pid,
            "daemon_start_time": who.start_time,
            "max_request_bytes": MAX_REQUEST_BYTES,
            "name": who.name,
            "version": who.version,
        }

    def adopt(self, session: Session, peer: Peer) -> None:
        """Serve a session: a new one, or one that an earlier process of this daemon had opened."""
        peer.sessions[session.token] = session
        self._peers[session.token] = peer
        self._known[session.token] = session, ReplyMemory(session.replies)

    def status(self) -> dict[str, Any]:
        """What the daemon is doing: plain values by name, as PROTOCOL.md lists them."""
        who = self._identity
        return {
            "name": who.name,
            "endpoint": who.endpoint,
            "segment": who.segment,
            "pid": who.pid,
            "incarnation": who.incarnation,
            "version": who.version,
            "python": who.python,
            "state": "stopping" if self.is_stopping else "running",
            "started_at": who.started_at,
            "restarts": who.incarnation - 1,
            "uptime_s": round((self._clock() - who.started_ns) / 1e9, 3),
            "reserve": who.arena_size,
            "requests": self.latency.count,
            "rpc_median_us": self.latency.quantile_ns(0.5) / 1000,
            "rpc_p90_us": self.latency.quantile_ns(0.9) / 1000,
            "rpc_p99_us": self.latency.quantile_ns(0.99) / 1000,
            "rpc_max_us": self.latency.max_ns / 1000,
            **self._manager.status(),
            **self.counters,
            "rpc_total_s": self.latency.total_ns / 1e9,
            "rpc_doublings": self.latency.doublings(),
        }

    # -- ends of sessions --------------------------------------------------------------------------------------------
    def _close(self, session: Session, request_id: int, memory: ReplyMemory) -> Answer:
        log.info("session %d closed", session.number, extra={"session": session.number})
        job = RunningJob(
            self._manager.end_session(session),
            "session.close",
            request_id,
            memory,
            commit=partial(self._manager.commit, session),
        )
        return self._begin_end(session, job)

    def end_process(self, peer: Peer) -> list[RunningJob]:
        """End every session of a process that has died. Returns: the jobs that have more to do."""
        jobs = []
        for session in list(peer.sessions.values()):
            log.info(
                "session %d ends: process %d has died",
                session.number,
                peer.pid,
                extra={"session": session.number, "client": peer.pid},
            )
            what = f"the end of session {session.number}"
            job = self._begin_end(session, self._background(self._manager.end_session(session), what, session))
            if isinstance(job, RunningJob):
                jobs.append(job)
        return jobs

    def resume(self) -> list[RunningJob]:
        """What an earlier process of this daemon had begun and nobody waits for: the jobs that have more to do."""
        jobs = [self._background(job, "work that a restart cut short") for job in self._manager.resume()]
        return [job for job in jobs if not job.step()]

    def take_chores(self) -> list[RunningJob]:
        """Work of the manager's own that is due; each is returned once."""
        return [self._background(job, "a chore") for job in self._manager.take_chores()]

    def _background(self, job: Job, what: str, session: Session | None = None) -> RunningJob:
        return RunningJob(job, what, commit=partial(self._manager.commit, session))

    def _begin_end(self, session: Session, job: RunningJob) -> Answer:
        """Run the first slice at once, so that no request of the session is carried out from here on."""
        _, memory = self._known.pop(session.token)
        self._ended[session.token] = memory
        if len(self._ended) > _ENDED_SESSIONS:
            self._ended.popitem(last=False)
        peer = self._peers.pop(session.token)
        del peer.sessions[session.token]
        if not peer.sessions:
            self._idle_peers.append(peer)
        self._overtake_waits(memory)
        return (job.answer or b"") if job.step() else job

    def _overtake_waits(self, memory: ReplyMemory) -> None:
        """Another thread of a session that is closed may be waiting: it is told."""
        for deferred in memory.unfinished.values():
            if isinstance(deferred, Deferred) and self._waiting.pop(id(deferred.waiter), None) is not None:
                deferred.error = SessionLostError("the session was closed while it waited")
                self._overtaken.append(deferred)

    def take_idle_peers(self) -> list[Peer]:
        """The processes whose last session has ended since the last call; nobody needs to watch them any more."""
        if not self._idle_peers:
            return self._idle_peers
        idle, self._idle_peers = self._idle_peers, []
        return [peer for peer in idle if not peer.sessions]

    # -- waits -------------------------------------------------------------------------------------------------------
    def take_ready(self, now_ns: int) -> list[Deferred]:
        """The waits that have an answer by `now_ns`, or are too late; each is returned once."""
        over, self._overtaken = self._overtaken, []
        if self._waiting:
            if now_ns >= self._next_deadline:
                self._manager.expire_waiters(now_ns)
                self._next_deadline = self._manager.next_deadline_ns() or _NEVER
            found = (self._waiting.pop(id(waiter), None) for waiter in self._manager.drain_ready())
            over.extend(deferred for deferred in found if deferred is not None)
        return over

    @property
    def next_deadline_ns(self) -> int:
        """When to call take_ready again at the latest; too early costs one call."""
        return self._next_deadline if self._waiting else _NEVER

    @staticmethod
    def stopped_answer(request_id: int) -> bytes:
        """The answer to a request that the daemon's stop overtook."""
        return encode_error(request_id, DaemonStoppedError("the daemon was stopped"))

    @property
    def can_idle_out(self) -> bool:
        """Whether the daemon serves no session and keeps nothing that outlives one."""
        return self._manager.live_session_count == 0 and not self._manager.has_persistent_heaps
