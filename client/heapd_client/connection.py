"""A session's way to its daemon's work socket: a DEALER a thread, request ids, deadlines, repeats.

A call sends one frame and waits for the answer with its id in slices, of SLICE_MS at first. Between slices it looks
whether the daemon is still there, and repeats the frame now and then: the daemon remembers what it answered, so that a
repeat is never executed twice. A wait that an exception ends (Ctrl-C, a deadline) leaves its id behind as abandoned;
its answer, when it comes, is handed to `on_late`, so that what it granted is not lost. After a deadline the next call
goes on undisturbed. After an exception it first hears what became of the one before: an answer may have been lost with
the exception, and is asked for again while the daemon remembers it.

What nobody waits for at all is posted, and repeated with the next call if that must be: it may be done late, or twice.

A daemon that dies is started again on the same arena, and says in the arena's header who it is now. A call that was
under way repeats its frame to that one, which remembers the answers of the one before; until there is one, the call
waits. `send` itself waits then, because the socket queues nothing for a daemon that is not there, and goes through the
moment that one is.

ZeroMQ sockets belong to one thread and none survives a fork: a child must `drop` the connection, untouched.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from itertools import count
from math import ceil, inf
from time import monotonic
from typing import Any, Final
from weakref import WeakSet

import zmq
from zmq.backend import Socket as RawSocket

from heapd.errors import (
    ClosedError,
    DaemonLostError,
    DaemonStoppedError,
    HeapdError,
    MessageError,
    error_from_wire,
)
from heapd.wire import KEPT_REPLIES, Endpoint, Reply, Request, decode_reply, encode_request
from heapd.wire.messages import HeapAlloc, HeapAllocMany, HeapLease

from .control import SLICE_MS, Greeting, ProcessWatch, is_process_alive, open_socket
from .mapping import Mapping, Server

__all__ = ["Connection"]

_REPEAT_S: Final = 1.0  # how long an answer may take before the request is sent again
_LONGEST_SLICE_MS: Final = 400  # arbitrary: hundreds of processes that wait for a name shall not keep a core busy
_HURRY_S: Final = 0.2  # the same, after a restart: what was sent meanwhile may have gone to the daemon that died
_GRANTING: Final = (HeapAlloc, HeapAllocMany, HeapLease)
_MAX_POSTED: Final = 8  # arbitrary: who posts faster than the daemon answers waits for it
_MAX_ABANDONED: Final = 256  # arbitrary; a thread that gives up more calls in a row forgets the oldest

# pyzmq's Socket.send is a Python function of five keyword checks round this one.
_raw_send: Final = RawSocket.send
_raw_recv: Final = RawSocket.recv


# Connections that are not closed. A session that nobody refers to is garbage together with all that only it refers to,
# and the collector finalizes garbage in any order: pyzmq's context, before its sockets, would wait for them for ever.
_open: set[Connection] = set()


def _immortalize(thing: object) -> None:
    """Keep sockets or a context from ever being collected, also at the end of the interpreter: to close what a forked
    child inherited can hang."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class _Channel:
    """One thread's socket.

    Fields: socket; lock (held during a call, so that `close` never pulls the socket from under one);
    abandoned (request id to request and frame: answers that may still come); last (the last request, its id and
    frame); is_shaken (an interrupt may have lost an answer that had come); inner (the channel for calls made inside
    one, by finalisers and signal handlers); posted (request id to frame: what nobody waits for the answer of, until it
    comes); server (who got its frames, as far as it has noticed).
    """

    __slots__ = ("__weakref__", "abandoned", "inner", "is_shaken", "last", "lock", "posted", "server", "socket")

    def __init__(self, dealer: zmq.Socket[bytes], server: Server) -> None:
        self.socket = dealer
        self.server = server
        self.lock = threading.Lock()
        self.abandoned: dict[int, tuple[Request, bytes]] = {}
        self.posted: dict[int, bytes] = {}
        self.is_shaken = False
        self.last: tuple[Request, int, bytes] | None = None
        self.inner: _Channel | None = None

    def __del__(self) -> None:
        self.socket.close()  # its thread has ended; linger is 0, so this does not wait


class Connection:
    """What one session uses to call its daemon; any thread may call.

    Args: endpoint, greeting (hello's answer), context (owned from now on), arena (whose header says who serves it),
          timeout_s (deadline of a call), on_late (gets each request whose answer came after it was given up, and the
          answer).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        greeting: Greeting,
        context: zmq.Context[zmq.Socket[bytes]],
        arena: Mapping,
        *,
        timeout_s: float,
        on_late: Callable[[Request, Any], None],
    ) -> None:
        self.greeting = greeting
        self.is_closed = False
        self.timeout_s = timeout_s
        self._endpoint = endpoint
        self._context = context
        self._token = greeting.token
        self._ids = count(1)
        self._newest_id = 0
        self._on_late = on_late
        self._arena = arena
        self._local = threading.local()
        self._channels: WeakSet[_Channel] = WeakSet()
        self._opening = threading.Lock()  # a socket opened beside `close` would keep its context from ending
        _open.add(self)
        # A daemon in another pid namespace cannot be watched; then only deadlines tell.
        self._server = arena.server
        self._watch = ProcessWatch(*self._server[1:])
        self._can_watch = self._watch.is_alive()

    def call(self, request: Request, wait_s: float = 0.0, until: float = inf) -> Any:
        """The daemon's answer to `request`.

        Args:   wait_s (seconds the daemon itself may take on purpose, on top of the session's timeout), until
                (monotonic seconds: from then on it is waited for no longer if it has died, and nobody is to start it
                again).
        Raises: what the daemon answers; DaemonStoppedError, DaemonLostError; ClosedError after close.
        """
        try:
            channel: _Channel = self._local.channel
        except AttributeError:
            channel = self._local.channel = self._open_channel()
        while channel.lock.locked() and not self.is_closed:  # by this very thread
            if channel.inner is None:
                channel.inner = self._open_channel()
            channel = channel.inner
        with channel.lock:
            if self.is_closed:
                raise ClosedError("the session is closed")
            if channel.is_shaken:
                self._catch_up(channel, until)
            self._newest_id = request_id = next(self._ids)
            frame = encode_request(request, request_id, self._token)
            channel.last = request, request_id, frame
            dealer, is_sent = channel.socket, False
            try:
                try:
                    if channel.posted:
                        self._post_again(channel)
                    _raw_send(dealer, frame)
                    is_sent = True
                    reply = decode_reply(_raw_recv(dealer))
                    if reply.request_id != request_id:
                        self._take_late(channel, reply)
                        reply = self._wait(channel, request, frame, request_id, is_sent, wait_s, until)
                except zmq.Again:
                    reply = self._wait(channel, request, frame, request_id, is_sent, wait_s, until)
            except BaseException as error:
                channel.is_shaken = channel.is_shaken or not isinstance(error, HeapdError)
                self._abandon(channel, request_id, request, frame)
                raise
        if reply.code:
            raise error_from_wire(reply.code, *reply.payload)
        return reply.payload

    def post(self, request: Request) -> bool:
        """Tell the daemon something that may be done late, or twice, and wait for no answer; False, and it knows
        nothing, where a call must do instead. It is told before what this thread asks next.
        """
        channel: _Channel | None = getattr(self._local, "channel", None)
        if channel is None or channel.is_shaken or len(channel.posted) >= _MAX_POSTED or channel.lock.locked():
            return False
        with channel.lock:
            if self.is_closed:
                return False
            self._newest_id = request_id = next(self._ids)
            channel.posted[request_id] = frame = encode_request(request, request_id, self._token)
            try:
                _raw_send(channel.socket, frame, zmq.NOBLOCK)
            except zmq.Again:
                del channel.posted[request_id]
                return False
        return True

    def _post_again(self, channel: _Channel) -> None:
        """Before a call: what was posted to a daemon that has died since is lost. So it may be where the connection was
        cut, which shows when no more may be posted."""
        if self._has_lost_server(channel) or len(channel.posted) >= _MAX_POSTED:
            for frame in channel.posted.values():
                _raw_send(channel.socket, frame)

    def _open_channel(self) -> _Channel:
        with self._opening:
            if self.is_closed:
                raise ClosedError("the session is closed")
            channel = _Channel(open_socket(self._context, self.greeting.work), self._arena.server)
            self._channels.add(channel)
        return channel

    def _mine(self) -> list[_Channel]:
        """The calling thread's channels."""
        found = []
        channel: _Channel | None = getattr(self._local, "channel", None)
        while channel is not None:
            found.append(channel)
            channel = channel.inner
        return found

    def regret(self, request: Request) -> None:
        """Have the answer to the last call, which an exception kept from its caller, handed to `on_late`."""
        for channel in self._mine():
            if channel.last is not None and channel.last[0] is request:
                _, request_id, frame = channel.last
                channel.is_shaken = True
                self._abandon(channel, request_id, request, frame)

    def _catch_up(self, channel: _Channel, until: float) -> None:
        """After an interrupt, before anything new is asked: hear what became of the calls that were given up, and ask
        again for blocks that we may have been given. The daemon remembers so many answers only, and would carry out
        again what it has forgotten. What it leased it finds by itself.

        Args: until (as for `call`).
        """
        while channel.socket.poll(0):
            self._take_late(channel, decode_reply(_raw_recv(channel.socket)))
        for given_up, (request, frame) in list(channel.abandoned.items()):
            if isinstance(request, HeapLease) or given_up not in channel.abandoned:
                continue
            if self._newest_id - given_up < KEPT_REPLIES:
                self._take_late(channel, self._wait(channel, request, frame, given_up, False, 0.0, until))
            else:  # other threads have asked that much meanwhile
                del channel.abandoned[given_up]
        channel.is_shaken = False

    # -- the slow path: no answer within a slice, or somebody else's ---------------------------------------------------
    def _wait(
        self,
        channel: _Channel,
        request: Request,
        frame: bytes,
        request_id: int,
        is_sent: bool,
        wait_s: float,
        until: float,
    ) -> Reply:
        """Wait for the answer to a request; send it if that was not possible yet, repeat it while none comes."""
        began = now = monotonic()
        deadline = now + self.timeout_s + wait_s
        repeat_s = _REPEAT_S + wait_s
        repeat_at = now + repeat_s
        slice_ms = SLICE_MS
        while True:
            self._check_open(request)
            if self._has_lost_server(channel):
                is_sent, repeat_s, slice_ms = False, _HURRY_S, SLICE_MS
            try:
                if not is_sent or now >= repeat_at:
                    is_sent, repeat_at, repeat_s = False, now + repeat_s, _REPEAT_S + wait_s
                    for each in (*channel.posted.values(), frame):
                        _raw_send(channel.socket, each)
                    is_sent = True
                if channel.socket.poll(slice_ms if now >= until else ceil(min(slice_ms, (until - now) * 1000))):
                    reply = decode_reply(_raw_recv(channel.socket))
                    if reply.request_id == request_id:
                        return reply
                    self._take_late(channel, reply)
                slice_ms = min(2 * slice_ms, _LONGEST_SLICE_MS)
            except zmq.Again:
                pass
            now = monotonic()
            if now >= deadline:
                raise self._lost(request, self.timeout_s)
            if now >= until and not (self._is_served() or self._is_awaited()):
                raise self._lost(request, now - began)

    def _check_open(self, request: Request) -> None:
        """Raises: ClosedError, DaemonStoppedError if waiting is in vain."""
        if self.is_closed:
            raise ClosedError("the session was closed while a call was waiting")
        if self._arena.is_stopped:
            raise DaemonStoppedError(f"{request.name}: the daemon was stopped", op=request.name)

    def _has_lost_server(self, channel: _Channel) -> bool:
        """Whether the daemon that got the channel's last frame has died, as far as is known; told of each but once
        another one is there."""
        server = self._arena.server
        if server != channel.server:
            channel.server = server
            return True
        return not self._is_served()

    def _is_served(self) -> bool:
        """Whether the process that the arena's header names lives, as far as this one can see."""
        if not self._can_watch:
            return True
        server = self._arena.server
        if server != self._server:
            self._watch = ProcessWatch(*server[1:])
            self._server = server
        return self._watch.is_alive()

    def _is_awaited(self) -> bool:
        """Whether somebody lives who is to start the daemon again, or just does."""
        holder = self._endpoint.holder()
        return holder is not None and is_process_alive(*holder)

    def _lost(self, request: Request, within_s: float) -> DaemonLostError:
        pid = self._arena.server.pid
        fault = "did not answer" if self._is_served() else "has died, and was not started again"
        return DaemonLostError(
            f"{request.name}: the daemon, process {pid}, {fault} within {within_s:.3g} s", op=request.name
        )

    def _abandon(self, channel: _Channel, request_id: int, request: Request, frame: bytes) -> None:
        """Remember a request whose answer may still come, if that would give us something."""
        abandoned = channel.abandoned
        if isinstance(request, _GRANTING):
            abandoned[request_id] = request, frame
        if len(abandoned) > _MAX_ABANDONED:
            leases = (number for number, (each, _) in abandoned.items() if isinstance(each, HeapLease))
            del abandoned[next(leases, next(iter(abandoned)))]  # what was leased `trim` finds

    def _take_late(self, channel: _Channel, reply: Reply) -> None:
        """An answer to another request than the one being waited for: one given up, or a repeat's second answer."""
        if reply.request_id == 0 and reply.code:
            raise MessageError(f"the daemon could not read a request: {reply.payload[0]}")
        channel.posted.pop(reply.request_id, None)
        request, _ = channel.abandoned.get(reply.request_id, (None, b""))
        if request is not None and not reply.code:
            self._on_late(request, reply.payload)
        channel.abandoned.pop(reply.request_id, None)  # last: an interrupted call is asked again

    @property
    def is_shared(self) -> bool:
        """Another living thread has called, and may be in a call."""
        mine = self._mine()
        return any(channel not in mine for channel in list(self._channels))

    # -- the end -----------------------------------------------------------------------------------------------------
    def close(self, patience_s: float = 0.5) -> None:
        """Close the sockets; threads in a call get ClosedError. Waits `patience_s` seconds for them at most."""
        with self._opening:
            if self.is_closed:
                return
            self.is_closed = True
        _open.discard(self)
        deadline = monotonic() + patience_s
        is_complete = True
        for channel in list(self._channels):
            if channel.lock.acquire(timeout=max(deadline - monotonic(), 0.0)):
                channel.socket.close()
                channel.lock.release()
            else:
                is_complete = False  # its thread is stuck in a call, and closes it when it ends
        if is_complete:
            self._context.term()
        else:
            _immortalize(self._context)

    def drop(self, *, is_closed: bool = True) -> None:
        """Let go of sockets without touching them: in a forked child, where they are the parent's; at exit, where
        another thread uses them."""
        self.is_closed = is_closed
        _open.discard(self)
        _immortalize((self._context, self._local, list(self._channels)))
