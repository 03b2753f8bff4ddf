"""The service over a stand-in for the manager: what is executed, what is answered, and when."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from heapd.errors import (
    AccessError,
    HeapdError,
    HeapFullError,
    InternalError,
    LimitError,
    MessageError,
    NoSuchHeapError,
    SessionLostError,
    UnknownOpError,
    VersionError,
    error_from_wire,
)
from heapd.layout import LAYOUT_VERSION
from heapd.records import Publication
from heapd.service import Answer, Deferred, Identity, Peer, RunningJob, Service
from heapd.wire import Request, decode_reply, encode_request
from heapd.wire.messages import (
    HeapAlloc,
    HeapCompact,
    HeapOpen,
    HeapStatisticsGet,
    Hello,
    NameLookup,
    SessionClose,
    SessionList,
    Status,
    Stop,
)

UID = 1000
SECOND = 1_000_000_000


@dataclass(eq=False)
class FakeSession:
    number: int
    token: bytes
    is_live: bool = True
    replies: dict[int, bytes] = field(default_factory=dict)


@dataclass(eq=False)
class FakeWaiter:
    deadline_ns: int
    result: Any = None
    error: HeapdError | None = None

    @property
    def ready(self) -> bool:
        return self.result is not None or self.error is not None


@dataclass
class FakeManager:
    """Answers by `script`, a function of the request; counts what it was asked."""

    script: Callable[[Request], Any] = lambda request: (1, 2, 3)
    handled: list[Request] = field(default_factory=list)
    sessions: dict[bytes, FakeSession] = field(default_factory=dict)
    waiters: list[FakeWaiter] = field(default_factory=list)
    ready: list[FakeWaiter] = field(default_factory=list)
    end_slices: int = 0
    has_persistent_heaps: bool = False
    committed: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def live_session_count(self) -> int:
        return len(self.sessions)

    def open_session(self, pid: int, uid: int, start_time: int) -> FakeSession:
        session = FakeSession(len(self.sessions) + 1, len(self.sessions).to_bytes(16, "little"))
        self.sessions[session.token] = session
        return session

    def session_of(self, token: bytes) -> FakeSession:
        if token not in self.sessions:
            raise SessionLostError("the daemon does not know this session")
        return self.sessions[token]

    def end_session(self, session: FakeSession) -> Generator[None, None, None]:
        session.is_live = False
        self.sessions.pop(session.token, None)
        for _ in range(self.end_slices):
            yield

    def handle(self, session: FakeSession, request: Request) -> Any:
        self.handled.append(request)
        return self.script(request)

    def commit(self, session: FakeSession | None, request_id: int, answer: bytes) -> None:
        self.committed.append((request_id, answer))

    def resume(self) -> list[Any]:
        return []

    def take_chores(self) -> list[Any]:
        return []

    def status(self) -> dict[str, Any]:
        return {"heaps": 0}

    def wait(self, deadline_ns: int = SECOND) -> FakeWaiter:
        self.waiters.append(FakeWaiter(deadline_ns))
        return self.waiters[-1]

    def expire_waiters(self, now_ns: int) -> None:
        for waiter in [waiter for waiter in self.waiters if waiter.deadline_ns <= now_ns]:
            waiter.error = NoSuchHeapError("too late")
            self.waiters.remove(waiter)
            self.ready.append(waiter)

    def drain_ready(self) -> list[FakeWaiter]:
        ready, self.ready = self.ready, []
        return ready

    def next_deadline_ns(self) -> int | None:
        return min((waiter.deadline_ns for waiter in self.waiters), default=None)


@dataclass
class FakeCaller:
    """The sender of a control message; `peer` None has died."""

    peer: Peer | None
    pid: int = 42
    uid: int = UID
    groups: tuple[int, ...] = ()

    def is_member(self, gid: int) -> bool:
        return gid in self.groups

    def admit(self) -> Peer | None:
        return self.peer


IDENTITY = Identity(
    name="demo", endpoint="ipc:///run/demo", work="ipc:///run/demo.work", segment="heapd-demo", instance=b"i" * 16,
    incarnation=1, arena_size=2**30, pid=7, uid=UID, start_time=99, version="1", python="3", started_at=0.0,
    started_ns=0,
)  # fmt: skip


class Setup:
    """A service, its manager, one peer with one session, and short ways to ask."""

    def __init__(self) -> None:
        self.manager = FakeManager()
        self.service = Service(self.manager, IDENTITY, clock=lambda: SECOND, max_process_sessions=3)
        self.peer = Peer(42, UID, 5)
        self.token = self.hello()["token"]
        self.next_id = 1

    def control(self, request: Request, caller: FakeCaller | None = None) -> Any:
        answer = self.service.handle_control(encode_request(request, 1), caller or FakeCaller(self.peer))
        return None if answer is None else result_of(answer)

    def hello(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.control(Hello(LAYOUT_VERSION))
        return answer

    def ask(self, request: Request, request_id: int | None = None, token: bytes | None = None) -> Answer:
        if request_id is None:
            self.next_id += 1
            request_id = self.next_id
        return self.service.handle_work(encode_request(request, request_id, token or self.token))


def result_of(answer: Answer) -> Any:
    """The result in a frame; raises the error in it."""
    assert isinstance(answer, bytes)
    reply = decode_reply(answer)
    if reply.code:
        raise error_from_wire(reply.code, *reply.payload)
    return reply.payload


@pytest.fixture
def setup() -> Setup:
    return Setup()


def slices(count: int, result: Any = None) -> Generator[None, None, Any]:
    for _ in range(count):
        yield
    return result


# -- requests ------------------------------------------------------------------------------------------------------
def test_a_request_is_carried_out_and_answered(setup: Setup) -> None:
    """The manager's result crosses as it is."""
    assert result_of(setup.ask(HeapAlloc(3, 64))) == [1, 2, 3]
    assert setup.manager.handled == [HeapAlloc(3, 64)]


def test_an_answer_carries_the_requests_id(setup: Setup) -> None:
    """Clients match answers by it."""
    answer = setup.ask(HeapAlloc(3, 64), 77)
    assert isinstance(answer, bytes)
    assert decode_reply(answer).request_id == 77


def test_an_error_of_the_manager_is_the_answer(setup: Setup) -> None:
    """With its kind."""

    def full(request: Request) -> Any:
        raise HeapFullError("full")

    setup.manager.script = full
    with pytest.raises(HeapFullError, match="full"):
        result_of(setup.ask(HeapAlloc(3, 64)))


def test_a_fault_inside_the_daemon_is_logged_and_answered(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """The client learns no more than that there was one; the log has the traceback; the daemon goes on."""
    setup.manager.script = lambda request: 1 // 0
    with pytest.raises(InternalError, match=r"heap\.alloc"):
        result_of(setup.ask(HeapAlloc(3, 64)))
    assert "ZeroDivisionError" in caplog.text
    setup.manager.script = lambda request: None
    assert result_of(setup.ask(HeapAlloc(3, 64))) is None


def test_a_result_that_cannot_be_sent_is_a_fault(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the manager returns, an answer comes out."""
    setup.manager.script = lambda request: [object()]
    with pytest.raises(InternalError):
        result_of(setup.ask(HeapAlloc(3, 64)))


def test_an_unknown_token_is_told_so(setup: Setup) -> None:
    """The client then knows that its session is gone."""
    with pytest.raises(SessionLostError):
        result_of(setup.ask(HeapAlloc(3, 64), token=b"?" * 16))
    assert setup.manager.handled == []


def test_a_frame_that_is_no_request_is_answered_with_id_0(setup: Setup) -> None:
    """Its sender cannot be told apart from it."""
    answer = setup.service.handle_work(b"\xc1")
    assert isinstance(answer, bytes)
    assert decode_reply(answer).request_id == 0
    with pytest.raises(MessageError):
        result_of(answer)
    assert setup.service.counters["requests_refused"] == 1


@pytest.mark.parametrize("request_", [Hello(LAYOUT_VERSION), Status(), Stop()], ids=lambda request: request.name)
def test_the_work_socket_knows_no_control_op(setup: Setup, request_: Request) -> None:
    """Nobody stops the daemon past the check of who is calling."""
    with pytest.raises(UnknownOpError):
        result_of(setup.ask(request_))


# -- repeats -------------------------------------------------------------------------------------------------------
def test_a_repeated_request_is_answered_and_not_executed_again(setup: Setup) -> None:
    """A client repeats what it sent before its connection broke."""
    first = setup.ask(HeapAlloc(3, 64), 9)
    setup.manager.script = lambda request: (7, 7, 7)
    assert setup.ask(HeapAlloc(3, 64), 9) == first
    assert len(setup.manager.handled) == 1
    assert setup.service.counters["requests_repeated"] == 1


def test_a_repeated_request_that_failed_fails_the_same_way(setup: Setup) -> None:
    """An error is an answer like any other."""

    def full(request: Request) -> Any:
        raise HeapFullError("full")

    setup.manager.script = full
    first = setup.ask(HeapAlloc(3, 64), 9)
    setup.manager.script = lambda request: None
    assert setup.ask(HeapAlloc(3, 64), 9) == first


def test_a_repeated_question_is_asked_again(setup: Setup) -> None:
    """What changes nothing is not remembered: its answer may be large and is better fresh."""
    setup.ask(SessionList(), 9)
    setup.ask(SessionList(), 9)
    assert len(setup.manager.handled) == 2


def test_the_same_id_in_another_session_is_another_request(setup: Setup) -> None:
    """Ids are a session's own."""
    other = setup.hello()["token"]
    setup.ask(HeapAlloc(3, 64), 9)
    setup.ask(HeapAlloc(3, 64), 9, token=other)
    assert len(setup.manager.handled) == 2


def test_a_repeat_during_a_job_joins_it(setup: Setup) -> None:
    """The job runs once and answers both."""
    setup.manager.script = lambda request: slices(3, 55)
    job = setup.ask(HeapCompact(3), 9)
    assert isinstance(job, RunningJob)
    assert setup.ask(HeapCompact(3), 9) is job
    while not job.step():
        pass
    assert result_of(job.answer or b"") == 55
    assert setup.ask(HeapCompact(3), 9) == job.answer
    assert len(setup.manager.handled) == 1


def test_a_repeat_during_a_wait_joins_it(setup: Setup) -> None:
    """A client that waits long repeats its request; it waits once."""
    setup.manager.script = lambda request: setup.manager.wait()
    waiting = setup.ask(NameLookup(3, "x", 1000), 9)
    assert setup.ask(NameLookup(3, "x", 1000), 9) is waiting
    assert len(setup.manager.waiters) == 1


# -- jobs ----------------------------------------------------------------------------------------------------------
def test_a_job_of_one_slice_is_answered_at_once(setup: Setup) -> None:
    """Only what takes longer waits for its turns."""
    setup.manager.script = lambda request: slices(0, 55)
    assert result_of(setup.ask(HeapCompact(3))) == 55


def test_a_job_that_fails_is_answered_with_its_error(setup: Setup) -> None:
    """In whichever slice."""

    def failing() -> Generator[None, None, None]:
        yield
        raise HeapFullError("full")

    setup.manager.script = lambda request: failing()
    job = setup.ask(HeapCompact(3))
    assert isinstance(job, RunningJob)
    assert job.step()
    with pytest.raises(HeapFullError):
        result_of(job.answer or b"")


def test_a_job_with_a_fault_is_answered_with_one(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """A fault in a slice does not reach the loop."""

    def faulty() -> Generator[None, None, None]:
        yield
        raise KeyError("oops")

    setup.manager.script = lambda request: faulty()
    job = setup.ask(HeapCompact(3))
    assert isinstance(job, RunningJob)
    assert job.step()
    with pytest.raises(InternalError):
        result_of(job.answer or b"")
    assert "oops" in caplog.text


def test_unfinished_requests_of_a_session_are_limited(setup: Setup) -> None:
    """No client fills the daemon's memory with jobs that it only begins."""
    setup.manager.script = lambda request: slices(5)
    for _ in range(2048):
        assert isinstance(setup.ask(HeapStatisticsGet(3)), RunningJob)
    with pytest.raises(LimitError, match="unfinished"):
        result_of(setup.ask(HeapStatisticsGet(3)))


# -- waits ---------------------------------------------------------------------------------------------------------
def test_a_wait_is_answered_when_its_waiter_is_ready(setup: Setup) -> None:
    """The publication crosses as the tuple of its fields."""
    setup.manager.script = lambda request: setup.manager.wait(5 * SECOND)
    waiting = setup.ask(NameLookup(3, "x", 1000))
    assert isinstance(waiting, Deferred)
    assert setup.service.take_ready(SECOND) == []
    waiter = setup.manager.waiters.pop()
    waiter.result = Publication("x", 1, 2, 3, 4)
    setup.manager.ready.append(waiter)
    assert setup.service.take_ready(SECOND) == [waiting]
    assert result_of(waiting.answer()) == ["x", 1, 2, 3, 4]


def test_a_wait_that_is_too_late_is_answered_so(setup: Setup) -> None:
    """The deadline is known to the loop, and met."""
    setup.manager.script = lambda request: setup.manager.wait(5 * SECOND)
    waiting = setup.ask(NameLookup(3, "x", 1000))
    assert setup.service.next_deadline_ns == 5 * SECOND
    assert setup.service.take_ready(5 * SECOND) == [waiting]
    assert isinstance(waiting, Deferred)
    with pytest.raises(NoSuchHeapError, match="too late"):
        result_of(waiting.answer())
    assert setup.service.next_deadline_ns > 2**60


def test_a_wait_whose_session_is_closed_is_told(setup: Setup) -> None:
    """Another thread of the session closed it."""
    setup.manager.script = lambda request: setup.manager.wait()
    waiting = setup.ask(NameLookup(3, "x", 1000))
    setup.ask(SessionClose())
    assert setup.service.take_ready(0) == [waiting]
    assert isinstance(waiting, Deferred)
    with pytest.raises(SessionLostError, match="closed while it waited"):
        result_of(waiting.answer())


# -- hello, status, stop -------------------------------------------------------------------------------------------
def test_hello_says_all_that_a_client_needs(setup: Setup) -> None:
    """Where to ask, what to map, and who the daemon is."""
    answer = setup.hello()
    assert answer == {
        "session": 2, "token": answer["token"], "instance": b"i" * 16, "incarnation": 1, "segment": "heapd-demo",
        "arena_size": 2**30, "work": "ipc:///run/demo.work", "daemon_pid": 7, "daemon_start_time": 99,
        "max_request_bytes": 65536, "name": "demo", "version": "1",
    }  # fmt: skip
    assert len(answer["token"]) == 16


def test_hello_of_another_user_is_refused(setup: Setup) -> None:
    """By the kernel's word on who it is; nothing was opened."""
    with pytest.raises(AccessError, match="user 1001"):
        setup.control(Hello(LAYOUT_VERSION), FakeCaller(setup.peer, uid=1001))
    assert setup.manager.live_session_count == 1
    assert setup.service.counters["callers_refused"] == 1


@pytest.mark.parametrize("request_", [Hello(LAYOUT_VERSION), Status(), Stop()], ids=lambda request: request.name)
def test_a_caller_that_cannot_be_seen_is_refused(setup: Setup, request_: Request) -> None:
    """pid 0 stands for a process in another pid namespace: its death would never be seen."""
    with pytest.raises(AccessError, match="pid namespaces"):
        setup.control(request_, FakeCaller(setup.peer, pid=0))
    assert not setup.service.is_stopping


def test_a_member_of_the_daemons_group_is_served_and_may_not_stop_it(setup: Setup) -> None:
    """Everybody else is refused by both names; the daemon is its user's."""
    setup.service._identity = replace(IDENTITY, gid=50)
    member = FakeCaller(setup.peer, uid=1001, groups=(7, 50))
    setup.control(Hello(LAYOUT_VERSION), member)
    assert setup.control(Status(), member)["name"] == "demo"
    with pytest.raises(AccessError, match="to stop"):
        setup.control(Stop(), member)
    assert not setup.service.is_stopping
    with pytest.raises(AccessError, match=f"user {UID} and group 50, the caller is user 1001"):
        setup.control(Hello(LAYOUT_VERSION), FakeCaller(setup.peer, uid=1001, groups=(7,)))


def test_hello_of_a_corpse_gets_no_answer_and_no_session(setup: Setup) -> None:
    """A killed client's request is still delivered; executing it would allocate for nobody."""
    assert setup.service.handle_control(encode_request(Hello(LAYOUT_VERSION), 1), FakeCaller(None)) is None
    assert setup.manager.live_session_count == 1


def test_hello_with_another_layout_is_refused(setup: Setup) -> None:
    """Both sides write the arena."""
    with pytest.raises(VersionError, match="layout"):
        setup.control(Hello(LAYOUT_VERSION + 1))


def test_sessions_of_one_process_are_limited(setup: Setup) -> None:
    """One process cannot take every session number."""
    setup.hello()
    setup.hello()
    with pytest.raises(LimitError, match="process 42 has 3 sessions"):
        setup.hello()


def test_status_has_the_managers_figures_and_the_counters(setup: Setup) -> None:
    """One map of plain values."""
    setup.service.counters["loops"] = 5
    status = setup.control(Status())
    assert status["name"] == "demo"
    assert status["uptime_s"] == 1.0
    assert (status["heaps"], status["loops"], status["state"]) == (0, 5, "running")


def test_stop_is_answered_and_noted(setup: Setup) -> None:
    """The loop sees it after the answer is out."""
    assert setup.control(Stop()) is None
    assert setup.service.is_stopping


def test_the_control_socket_knows_no_work_op(setup: Setup) -> None:
    """Sessions work elsewhere."""
    with pytest.raises(UnknownOpError):
        setup.control(SessionList())


# -- ends ----------------------------------------------------------------------------------------------------------
def test_a_closed_session_is_lost_at_once(setup: Setup) -> None:
    """Even if taking back what it had takes many slices."""
    setup.manager.end_slices = 5
    job = setup.ask(SessionClose())
    assert isinstance(job, RunningJob)
    with pytest.raises(SessionLostError):
        result_of(setup.ask(HeapOpen("x")))


def test_a_repeated_close_is_answered_as_the_first(setup: Setup) -> None:
    """Its answer may have been lost on the way."""
    first = setup.ask(SessionClose(), 9)
    assert result_of(first) is None
    assert setup.ask(SessionClose(), 9) == first
    with pytest.raises(SessionLostError):
        result_of(setup.ask(SessionClose(), 10))


def test_a_process_without_a_session_left_is_idle(setup: Setup) -> None:
    """Its pidfd need not be watched any more; while another session lives it must."""
    second = setup.hello()["token"]
    setup.ask(SessionClose())
    assert setup.service.take_idle_peers() == []
    setup.ask(SessionClose(), token=second)
    assert setup.service.take_idle_peers() == [setup.peer]
    assert setup.service.take_idle_peers() == []


def test_a_dead_process_loses_all_its_sessions(setup: Setup) -> None:
    """By jobs that nobody waits for."""
    setup.hello()
    setup.manager.end_slices = 2
    jobs = setup.service.end_process(setup.peer)
    assert len(jobs) == 2
    assert setup.manager.live_session_count == 0
    for job in jobs:
        while not job.step():
            pass
        assert job.answer is None


def test_a_fault_while_a_dead_process_is_reaped_is_logged(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """And kept from the loop."""

    def faulty(session: FakeSession) -> Generator[None, None, None]:
        yield
        raise HeapFullError("odd")

    setup.manager.end_session = faulty  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        (job,) = setup.service.end_process(setup.peer)
        assert job.step()
    assert "the end of session 1: odd" in caplog.text


@pytest.mark.parametrize(("has_persistent_heaps", "can_end"), [(False, True), (True, False)])
def test_the_daemon_may_end_when_nothing_would_be_missed(
    setup: Setup, has_persistent_heaps: bool, can_end: bool
) -> None:
    """Without a session, unless a persistent heap waits for the next."""
    setup.service.end_process(setup.peer)
    setup.manager.has_persistent_heaps = has_persistent_heaps
    assert setup.service.can_idle_out is can_end


def test_the_daemon_may_not_end_under_a_session(setup: Setup) -> None:
    """However little it does."""
    assert not setup.service.can_idle_out
