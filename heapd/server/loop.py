"""The daemon's one thread: two sockets, the clients' pidfds, timers and jobs, in turns of bounded length.

A turn: wait for an event, end the sessions of processes that died, take at most `drain_frames` requests from each
socket and answer each, run one slice of one job, answer the waits that are over.

A zmq socket's descriptor tells of changes, not of messages, and any call on the socket may use a change up. So the
last thing done to a socket before the loop sleeps is always a look that found nothing to receive: `_work_pending` and
`_control_pending` stay true until that has happened.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

import zmq
from zmq.backend import Socket as RawSocket

from heapd.errors import MessageError
from heapd.manager import Session
from heapd.server.config import Config
from heapd.server.credentials import ClientProcess, MessageCaller, ProcessTable, connection_of, cut_off, peer_address
from heapd.server.gate import Gate
from heapd.server.guards import DescriptorGuard, MemoryGuard
from heapd.server.link import SupervisorLink
from heapd.service import Answer, Deferred, RunningJob, Service
from heapd.wire import encode_error

__all__ = ["Loop"]

log = logging.getLogger("heapd.server")

# The C methods and plain ints, without pyzmq's Python wrappers and enums: 4 us less a request.
_receive: Final = RawSocket.recv
_send: Final = RawSocket.send
_get_option: Final[Callable[..., Any]] = RawSocket.get
_NO_BLOCK: Final = int(zmq.NOBLOCK)
_SEND_MORE: Final = int(zmq.SNDMORE | zmq.NOBLOCK)
_MORE: Final = int(zmq.RCVMORE)
_EVENTS: Final = int(zmq.EVENTS)
_READABLE: Final = int(zmq.POLLIN)
_TOLERATED_PARTS: Final = 16  # arbitrary; a peer whose message has more is cut off
_DISCARDED_PARTS: Final = 10_000  # a message of more parts is dropped with its socket: reading on would stall the loop
_STOP_LINGER_MS: Final = 300  # the answer to stop has this long to leave

_COUNTERS: Final = (
    "anonymous_dropped",  # messages without the kernel's word on their sender
    "dead_dropped",  # hellos whose process had died
    "replies_undeliverable",  # the client had left, or did not read its answers
    "peers_cut_off",
    "gates_shut",  # times that descriptors ran short
    "gates_renewed",  # times that buffers ran away
)


class Loop:
    """The poll loop over one service. `wakeup` is a descriptor that becomes readable when a signal came."""

    def __init__(self, service: Service, config: Config, gates: tuple[Gate, Gate], limit: int, wakeup: int) -> None:
        self._service = service
        self._config = config
        self._control_gate, self._work_gate = gates
        self._processes = ProcessTable()
        self._descriptors = DescriptorGuard(limit)
        self._memory = MemoryGuard(config.memory_growth)
        self._jobs: deque[RunningJob] = deque()
        self._parked: set[Deferred] = set()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], object]] = {}
        self._work_pending = self._control_pending = True
        self._is_shut = False  # gates wait to be opened again
        self._tick_ns = int(config.tick_s * 1e9)
        self._next_tick = 0
        self._idle_since: int | None = None
        self._is_stopping = False
        self._supervisor: SupervisorLink | None = None
        for name in _COUNTERS:
            service.counters[name] = 0
        self.watch(wakeup, lambda: os.read(wakeup, 4096))
        self._watch_gates()

    def watch_supervisor(self, link: SupervisorLink) -> None:
        """Show it at each tick that this loop turns. If it dies, go on, and take its lock over."""

        def notice() -> None:
            self._unwatch(link.fileno())
            self._supervisor = None
            log.warning("the supervisor has died; this server goes on, and nobody will start it again")
            link.lock.take_over()

        self._supervisor = link
        self.watch(link.fileno(), notice)

    def readmit(self, sessions: Iterable[Session]) -> None:
        """Take over the sessions of an earlier server, and end first those whose process has died since.

        Raises: OSError if descriptors are short.
        """
        service, gone = self._service, []
        for session in sessions:
            if session.is_live:
                process = self._processes.readmit(session.pid, session.uid, session.start_time)
                service.adopt(session, process)
                if process.pidfd < 0:
                    gone.append(process)
        for process in self._processes.take_fresh():
            self.watch(process.pidfd, partial(self._end_process, process))
        self._jobs.extend(service.resume())
        for process in gone:
            self._jobs.extend(service.end_process(process))

    def stop(self) -> None:
        """End the loop at the end of its turn; may be called from a signal handler."""
        self._is_stopping = True

    def run(self) -> None:
        """Serve until stopped. Everybody who waits is then told."""
        poll = self._epoll.poll
        clock = time.monotonic_ns
        service = self._service
        while not self._is_stopping:
            for descriptor, _ in poll(self._timeout()):
                handler = self._handlers.get(descriptor)
                if handler is not None:
                    handler()
            now = clock()
            if now >= self._next_tick:
                self._tick(now)
            if self._control_pending:
                self._drain_control()
            if self._work_pending:
                self._drain_work()
            if self._jobs:
                self._run_job()
            if self._parked:
                self._answer_ready(clock())
            if service.is_stopping:
                self._is_stopping = True
        self._say_goodbye()

    def close(self) -> None:
        """Close the sockets and forget every process."""
        self._control_gate.close(_STOP_LINGER_MS)
        self._work_gate.close(_STOP_LINGER_MS)
        for process in self._processes:
            self._processes.forget(process)
        self._epoll.close()

    def _timeout(self) -> float:
        """Seconds that the loop may sleep."""
        if self._work_pending or self._control_pending or self._jobs:
            return 0
        wake = self._next_tick
        if self._parked:
            wake = min(wake, self._service.next_deadline_ns)
        return max(0.0, (wake - time.monotonic_ns()) / 1e9)

    # -- the work socket ---------------------------------------------------------------------------------------------
    def _drain_work(self) -> None:
        socket = self._work_gate.socket
        handle, clock = self._service.handle_work, time.monotonic_ns
        record = self._service.latency.record
        deadline = clock() + self._config.drain_ms * 1_000_000
        for _ in range(self._config.drain_frames):
            try:
                address = _receive(socket, _NO_BLOCK)
            except zmq.Again:
                self._work_pending = False
                return
            started = clock()
            frame = _receive(socket)
            if _get_option(socket, _MORE):
                if not self._refuse_parts(self._work_gate, address):
                    return
                continue
            answer = handle(frame)
            if type(answer) is bytes:
                try:
                    _send(socket, address, _SEND_MORE)
                    _send(socket, answer, _NO_BLOCK)
                except zmq.ZMQError as error:
                    self._note_undelivered(error)
            else:
                self._park(answer, address)
            now = clock()
            record(now - started)
            # Asked before trying: the exception of a receive that finds nothing costs half a request. And asked twice:
            # who is ready to run on this CPU, libzmq's thread or a client, runs in between and may bring the next
            # request, which spares us the sleep and them the waking (a tenth more requests from eight clients).
            if not _get_option(socket, _EVENTS) & _READABLE:
                os.sched_yield()
                if not _get_option(socket, _EVENTS) & _READABLE:
                    self._work_pending = False
                    return
            if now > deadline:
                break
        self._work_pending = True

    def _park(self, answer: Answer, address: bytes) -> None:
        """Keep an answer that is not ready, with where to send it; the same one again if a request was repeated."""
        assert not isinstance(answer, bytes)
        if address in answer.reply_to:
            return
        if not answer.reply_to:
            if isinstance(answer, RunningJob):
                self._jobs.append(answer)
            else:
                self._parked.add(answer)
        answer.reply_to.append(address)

    def _send(self, socket: zmq.Socket[bytes], address: bytes, frame: bytes) -> None:
        """Send, or count: the daemon waits for nobody. What is not delivered is asked for again."""
        try:
            _send(socket, address, _SEND_MORE)
            _send(socket, frame, _NO_BLOCK)
        except zmq.ZMQError as error:
            self._note_undelivered(error)

    def _note_undelivered(self, error: zmq.ZMQError) -> None:
        if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
            raise error
        self._service.counters["replies_undeliverable"] += 1

    def _refuse_parts(self, gate: Gate, address: bytes) -> bool:
        """Discard the rest of a message of several frames and answer it, or cut its sender off if there were many.

        Returns: False if the gate had to be renewed: its old socket is gone.
        """
        connection = None
        count = 0
        for count in range(_DISCARDED_PARTS):  # noqa: B007
            part = gate.socket.recv(copy=False)
            if connection is None:
                connection = connection_of(part)
            if not part.more:
                break
        else:
            self._renew_gates("a message of more than %d parts", _DISCARDED_PARTS)
            return False
        if count >= _TOLERATED_PARTS and connection is not None:
            cut_off(connection)  # an answer would not get out before it
            self._service.counters["peers_cut_off"] += 1
        else:
            self._send(gate.socket, address, encode_error(0, MessageError("a request is one frame, not several")))
        return True

    # -- the control socket ------------------------------------------------------------------------------------------
    def _drain_control(self) -> None:
        gate = self._control_gate
        for _ in range(self._config.drain_frames):
            try:
                address = gate.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                self._control_pending = False
                return
            frame = gate.socket.recv(copy=False)
            if frame.more:
                if not self._refuse_parts(gate, address):
                    return
                continue
            self._answer_control(address, frame)
        self._control_pending = True

    def _answer_control(self, address: bytes, frame: zmq.Frame) -> None:
        who = peer_address(frame)
        if who is None:
            self._service.counters["anonymous_dropped"] += 1
            return
        caller = MessageCaller(*who, connection_of(frame), self._processes)
        answer = self._service.handle_control(frame.bytes, caller)
        for process in self._processes.take_fresh():
            if process.sessions:
                self.watch(process.pidfd, partial(self._end_process, process))
            else:
                self._processes.forget(process)
        if answer is None:
            self._service.counters["dead_dropped"] += 1
        else:
            self._send(self._control_gate.socket, address, answer)

    # -- deaths, jobs, waits -----------------------------------------------------------------------------------------
    def _end_process(self, process: ClientProcess) -> None:
        """Its pidfd says that the process has died: end its sessions."""
        self._jobs.extend(self._service.end_process(process))
        self._forget_idle()

    def _forget_idle(self) -> None:
        """Stop watching the processes that have no session left."""
        for peer in self._service.take_idle_peers():
            if isinstance(peer, ClientProcess) and peer.pidfd >= 0:
                self._unwatch(peer.pidfd)
                self._processes.forget(peer)

    def _run_job(self) -> None:
        """One slice of the job whose turn it is."""
        job = self._jobs.popleft()
        if not job.step():
            self._jobs.append(job)
            return
        if job.answer is not None:
            self._send_all(job.reply_to, job.answer)

    def _answer_ready(self, now_ns: int) -> None:
        for deferred in self._service.take_ready(now_ns):
            self._parked.discard(deferred)
            self._send_all(deferred.reply_to, deferred.answer())

    def _send_all(self, addresses: list[bytes], frame: bytes) -> None:
        for address in addresses:
            self._send(self._work_gate.socket, address, frame)
        self._work_pending = True

    def _say_goodbye(self) -> None:
        """Tell everybody whose answer is outstanding that it will not come."""
        outstanding: list[RunningJob | Deferred] = [*self._jobs, *self._parked]
        for pending in outstanding:
            if pending.request_id is not None:
                self._send_all(pending.reply_to, self._service.stopped_answer(pending.request_id))

    # -- guards and timers -------------------------------------------------------------------------------------------
    def _tick(self, now_ns: int) -> None:
        self._next_tick = now_ns + self._tick_ns
        if self._supervisor is not None:
            self._supervisor.beat()
        self._forget_idle()
        self._jobs.extend(self._service.take_chores())
        if self._memory.has_grown():
            self._renew_gates("the process grew by more than %d MiB", self._config.memory_growth >> 20)
        if self._is_shut and self._descriptors.has_room():
            for gate in (self._control_gate, self._work_gate):
                gate.open()
            self._is_shut = False
        if self._config.idle_exit_s is not None:
            self._consider_idle_exit(now_ns, self._config.idle_exit_s)

    def _consider_idle_exit(self, now_ns: int, after_s: float) -> None:
        if not self._service.can_idle_out:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now_ns
        elif now_ns - self._idle_since >= after_s * 1e9:
            log.info("nobody has used this daemon for %g s; it ends", after_s)
            self.stop()

    def _count_accepted(self, gate: Gate) -> None:
        if self._descriptors.is_full(gate.take_accepted()) and not self._is_shut:
            log.warning("%d descriptors are open; no new client until some are closed", self._descriptors.cap)
            self._service.counters["gates_shut"] += 1
            self._control_gate.shut()
            self._work_gate.shut()
            self._is_shut = True
            self._work_pending = self._control_pending = True

    def _renew_gates(self, reason: str, figure: int) -> None:
        """Drop all connections and what libzmq has buffered for them; sessions hang on tokens and go on."""
        log.warning("connections are cut and made anew: " + reason, figure)
        self._service.counters["gates_renewed"] += 1
        for gate in (self._control_gate, self._work_gate):
            for descriptor in (gate.socket.FD, gate.monitor.FD):
                self._unwatch(descriptor)
            gate.renew()
        self._watch_gates()
        self._is_shut = True
        self._next_tick = time.monotonic_ns() + 5_000_000  # arbitrary: libzmq has closed the old listeners by then
        self._memory.rebase()

    # -- descriptors -------------------------------------------------------------------------------------------------
    def watch(self, descriptor: int, handler: Callable[[], object]) -> None:
        """Call `handler` in this thread whenever the descriptor is readable."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, select.EPOLLIN)

    def _unwatch(self, descriptor: int) -> None:
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def _watch_gates(self) -> None:
        def work() -> None:
            self._work_pending = True

        def control() -> None:
            self._control_pending = True

        self.watch(self._work_gate.socket.FD, work)
        self.watch(self._control_gate.socket.FD, control)
        for gate in (self._control_gate, self._work_gate):
            self.watch(gate.monitor.FD, partial(self._count_accepted, gate))
            self._count_accepted(gate)  # its descriptor tells nothing before the first look
        self._work_pending = self._control_pending = True
