"""The control socket: is a daemon there, who am I, how is it, stop. One question, one socket, no session.

Also what both sockets share: how they are set up, and how a client sees that the daemon's process has ended.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic, sleep
from typing import Any, Final, NamedTuple

import zmq

from heapd.errors import (
    AccessError,
    DaemonLostError,
    DaemonNotFoundError,
    DaemonStoppedError,
    LimitError,
    MessageError,
    error_from_wire,
)
from heapd.layout import LAYOUT_VERSION
from heapd.wire import (
    MAX_REPLY_BYTES,
    SHUT_SUFFIX,
    TOKEN_BYTES,
    Endpoint,
    Request,
    check_directory,
    decode_reply,
    encode_request,
)
from heapd.wire.messages import Hello, Status, Stop

from .arguments import as_patience

__all__ = [
    "SLICE_MS",
    "Greeting",
    "ask",
    "await_daemon",
    "daemon_status",
    "descriptors",
    "is_answering",
    "ProcessWatch",
    "is_process_alive",
    "not_found",
    "open_socket",
    "say_hello",
    "stop_daemon",
]

SLICE_MS: Final = 100  # how late a call notices that the daemon is gone; a request takes a thousandth of that
_RECONNECT_MS: Final = 10  # a restarted daemon is found again in 7 ms (median, measured), 86 ms at libzmq's default
_MAX_RECONNECT_MS: Final = 40  # libzmq doubles the pause up to this: at 200 ms it is 165 ms late at times, or 200
_POLL_S: Final = 0.005
_ROOM: Final = 8  # descriptors: two a thread of a context, two a socket, and some
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
_ID: Final = 1  # a control socket here asks one thing


class Greeting(NamedTuple):
    """What hello answered; see PROTOCOL.md. Sizes in bytes, daemon_start_time in clock ticks after boot."""

    session: int
    token: bytes
    instance: bytes
    incarnation: int
    segment: str
    arena_size: int
    work: str
    daemon_pid: int
    daemon_start_time: int

    @classmethod
    def of(cls, answer: Any) -> Greeting:
        """Raises: MessageError if `answer` is no map with these fields; others in it are a newer daemon's."""
        try:
            greeting = cls(*(answer[name] for name in cls._fields))
        except (KeyError, TypeError):
            raise MessageError("the daemon's answer to hello is incomplete") from None
        if len(greeting.token) != TOKEN_BYTES or len(greeting.instance) != 16:
            raise MessageError("the daemon's answer to hello is malformed")
        return greeting


@contextmanager
def descriptors() -> Iterator[None]:
    """Round what opens files or sockets. Raises: LimitError if there can be no more of them."""
    try:
        yield
    except (OSError, zmq.ZMQError) as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise LimitError(
            f"{os.strerror(error.errno)}: this process may have {limit} open; close some, or raise that (ulimit -n)",
            limit=limit,
        ) from None


def _check_room() -> None:
    """See that some descriptors may be opened: libzmq aborts where it finds none for the threads of a context."""
    with ExitStack() as stack:
        for _ in range(_ROOM):
            stack.callback(os.close, os.eventfd(0))


def open_socket(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    """A DEALER to `address` whose calls wait SLICE_MS at most.

    IMMEDIATE: nothing is queued for a daemon that is not there; it would be executed, unwanted, by the next one.
    """
    with descriptors():
        _check_room()
        dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.immediate = True
    dealer.rcvtimeo = dealer.sndtimeo = SLICE_MS
    dealer.reconnect_ivl, dealer.reconnect_ivl_max = _RECONNECT_MS, _MAX_RECONNECT_MS
    dealer.maxmsgsize = MAX_REPLY_BYTES
    dealer.connect(address)
    return dealer


def is_process_alive(pid: int, start_time: int) -> bool:
    """Whether the process that had `pid` since `start_time` (clock ticks after boot) still runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] not in (b"Z", b"X") and int(fields[19]) == start_time


class ProcessWatch:
    """Whether one process lives, asked often: a descriptor of it, so that no file is opened for each look, and none is
    left open where a signal handler raises."""

    def __init__(self, pid: int, start_time: int) -> None:
        """As `is_process_alive`."""
        self._fd = -1
        with suppress(OSError):
            self._fd = os.pidfd_open(pid)
        self._is_right = self._fd >= 0 and is_process_alive(pid, start_time)

    def is_alive(self) -> bool:
        if not self._is_right:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def find_listener(path: str) -> int | None:
    """Who accepts connections at the socket `path`: process id, 0 if that cannot be seen, None if nobody does.

    Raises: AccessError if this user may not ask; LimitError.
    """
    with descriptors(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        status = probe.connect_ex(path)
        if status == 0:
            pid: int = _UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
            return pid
    if status == errno.EACCES:
        raise AccessError(f"the daemon at {path} belongs to another user")
    return 0 if status == errno.EAGAIN else None  # EAGAIN: so many are waiting that the listener's queue is full


def is_answering(path: str) -> bool:
    """Whether somebody accepts connections at the socket `path`. Raises: AccessError if this user may not ask."""
    return find_listener(path) is not None


def await_daemon(endpoint: Endpoint, deadline: float) -> int | None:
    """Wait until the endpoint's daemon listens, if one is there that just starts, starts again, or ends.

    Args:    deadline (monotonic seconds).
    Returns: as find_listener; None at once where nobody holds the endpoint's lock.
    Raises:  AccessError; DaemonLostError if a daemon is there, and lets no new client in until the deadline.
    """
    while (listener := find_listener(endpoint.control_path)) is None:
        holder = endpoint.holder()
        if holder is None or not is_process_alive(*holder):
            return None
        if monotonic() >= deadline:
            if os.path.lexists(endpoint.control_path + SHUT_SUFFIX):
                raise DaemonLostError(
                    f"the daemon at {endpoint} lets no new client in: it has as many descriptors open as it may; end "
                    f"some clients, or raise its limit (LimitNOFILE= in systemd, ulimit -n)"
                )
            return None
        sleep(_POLL_S)
    return listener


def ask(
    endpoint: Endpoint, request: Request, timeout_s: float, context: zmq.Context[zmq.Socket[bytes]] | None = None
) -> Any:
    """The answer to one control request.

    It is asked again of the next daemon if one dies over it.
    Raises: DaemonNotFoundError at once if nobody listens and nobody is about to; DaemonLostError if there is no answer
            within `timeout_s` seconds, or nobody new is let in; SegmentError if somebody else could have put the socket
            there; else what the daemon answers.
    """
    deadline = monotonic() + timeout_s
    if os.path.lexists(endpoint.directory):
        check_directory(endpoint.directory)
    listener = await_daemon(endpoint, deadline)
    if listener is None:
        raise not_found(endpoint)
    frame = encode_request(request, _ID)
    own_context = context is None
    context = zmq.Context() if context is None else context
    dealer = open_socket(context, endpoint.control)
    asked: int | None = None  # who was
    try:
        while monotonic() < deadline:
            try:
                if asked != listener:
                    asked = None
                    dealer.send(frame)
                    asked = listener
                reply = decode_reply(dealer.recv())
            except zmq.Again:
                listener = await_daemon(endpoint, deadline)
                if listener is None:
                    raise DaemonStoppedError(
                        f"the daemon at {endpoint} went before it answered {request.name}"
                    ) from None
                continue
            if reply.code:
                raise error_from_wire(reply.code, *reply.payload)
            return reply.payload
    finally:
        dealer.close()
        if own_context:
            context.term()
    raise DaemonLostError(f"{request.name}: the daemon at {endpoint} did not answer within {timeout_s:g} s")


def not_found(endpoint: Endpoint) -> DaemonNotFoundError:
    command = f"heapd serve -e {endpoint}"
    return DaemonNotFoundError(f"no daemon answers at {endpoint}; start one with `{command}`", endpoint=str(endpoint))


def say_hello(endpoint: Endpoint, timeout_s: float, context: zmq.Context[zmq.Socket[bytes]]) -> Greeting:
    """Open a session for this process. Raises: as `ask`; VersionError if the two sides do not fit."""
    return Greeting.of(ask(endpoint, Hello(LAYOUT_VERSION), timeout_s, context))


def daemon_status(endpoint: str | None = None, *, timeout: float = 10.0) -> dict[str, Any]:
    """What the daemon says about itself, without opening a session.

    Args:    endpoint (as for `connect`), timeout (seconds).
    Returns: name, endpoint, pid, incarnation, uptime_s, sessions, heaps, committed, ...; see PROTOCOL.md.
    Raises:  DaemonNotFoundError if none answers; DaemonLostError past the timeout.
    """
    answer: dict[str, Any] = ask(Endpoint.parse(endpoint), Status(), as_patience(timeout))
    return answer


def stop_daemon(endpoint: str | None = None, *, timeout: float = 10.0) -> int:
    """Ask the daemon to end; returns when its processes are gone.

    Args:    endpoint (as for `connect`), timeout (seconds).
    Returns: the process id that its server had.
    Raises:  DaemonNotFoundError if none answers; DaemonLostError if it still runs at the timeout.
    """
    import select

    timeout = as_patience(timeout)
    where = Endpoint.parse(endpoint)
    deadline = monotonic() + timeout
    try:
        pid: int = ask(where, Status(), timeout)["pid"]
    except DaemonStoppedError:  # somebody else told it before
        raise not_found(where) from None
    holder = where.holder()  # the supervisor, if it has one
    with ExitStack() as stack:
        processes = []
        for each in {pid, holder[0] if holder is not None else pid}:
            with suppress(OSError):  # in another pid namespace: its word has to do
                processes.append(os.pidfd_open(each))
                stack.callback(os.close, processes[-1])
        with suppress(DaemonStoppedError, DaemonNotFoundError):  # somebody else told it, or it went without a word
            ask(where, Stop(), max(deadline - monotonic(), 0.1))
        for process in processes:
            if not select.select([process], [], [], max(deadline - monotonic(), 0.0))[0]:
                raise DaemonLostError(f"the daemon at {where}, process {pid}, did not end within {timeout:g} s")
    return pid
