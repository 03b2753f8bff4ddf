"""What the service needs of the layer below, as protocols: heapd.manager fulfils them, and so may a test's stand-in."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from heapd.errors import HeapdError
from heapd.wire import Request

__all__ = ["Caller", "Job", "Manager", "Peer", "Session", "Waiter"]


class Decided(Protocol):
    """Yielded by a job whose answer is certain before it has done everything."""

    @property
    def answer(self) -> Any: ...


# Work in slices: yields between slices of a few milliseconds, returns the result, may raise a HeapdError.
Job = Generator[Decided | None, None, Any]


class Session(Protocol):
    """An open session as the manager keeps it."""

    @property
    def number(self) -> int: ...
    @property
    def token(self) -> bytes: ...
    @property
    def replies(self) -> dict[int, bytes]: ...


class Waiter(Protocol):
    """A request whose answer is yet to come; see Manager.drain_ready."""

    @property
    def deadline_ns(self) -> int: ...
    @property
    def ready(self) -> bool: ...
    @property
    def result(self) -> Any: ...
    @property
    def error(self) -> HeapdError | None: ...


class Manager(Protocol):
    """Every operation the service may ask for; times are nanoseconds of the monotonic clock."""

    @property
    def has_persistent_heaps(self) -> bool: ...
    @property
    def live_session_count(self) -> int: ...
    def open_session(self, pid: int, uid: int, start_time: int) -> Session: ...
    def end_session(self, session: Any) -> Job: ...
    def handle(self, session: Any, request: Request) -> Any: ...
    def commit(self, session: Any, request_id: int, answer: bytes) -> None: ...
    def resume(self) -> list[Any]: ...
    def take_chores(self) -> list[Any]: ...
    def status(self) -> dict[str, Any]: ...
    def drain_ready(self) -> list[Any]: ...
    def expire_waiters(self, now_ns: int) -> None: ...
    def next_deadline_ns(self) -> int | None: ...


class Peer:
    """A client process that the kernel has vouched for, with the sessions it has open.

    Fields: pid, uid, start_time (clock ticks after boot), sessions (token to session).
    """

    __slots__ = ("pid", "sessions", "start_time", "uid")

    def __init__(self, pid: int, uid: int, start_time: int) -> None:
        self.pid = pid
        self.uid = uid
        self.start_time = start_time
        self.sessions: dict[bytes, Session] = {}


class Caller(Protocol):
    """Who sent one control message, by the kernel's word. pid 0: a process this daemon cannot see."""

    @property
    def pid(self) -> int: ...
    @property
    def uid(self) -> int: ...
    def is_member(self, gid: int) -> bool:
        """Whether the process was in that group when it connected."""

    def admit(self) -> Peer | None:
        """The living process behind the message, None if it has died."""
