"""A daemon's life from its first check to its last unlink.

Order matters. Up: descriptors, directory, lock, leftovers of a crash, arena, sockets, "ready". Down, on a stop or on
any error on the way up: sockets, arena, lock. Nothing is bound and nothing of another daemon's is touched before the
lock is held.

A server that has a supervisor shares the lock with it and says how far it is; one that has none, or has lost it, does
all that by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from types import FrameType, TracebackType

import zmq

from heapd import __version__
from heapd.arena import Arena
from heapd.errors import InvalidArgumentError, SegmentError
from heapd.layout import H_INCARNATION
from heapd.manager import HeapManager, Limits
from heapd.server.config import DEFAULT_RESERVE, Config
from heapd.server.credentials import start_time_of
from heapd.server.exporter import Exporter
from heapd.server.gate import Gate
from heapd.server.guards import raise_descriptor_limit
from heapd.server.leftovers import Claim, claim_segment, clear_sockets
from heapd.server.link import READY, STOPPING, SupervisorLink
from heapd.server.lock import DaemonLock
from heapd.server.loop import Loop
from heapd.service import Identity, Service
from heapd.units import format_size
from heapd.wire import Endpoint, make_directory

__all__ = ["STOP_SIGNALS", "prepare_directory", "say_ready", "serve"]

log = logging.getLogger("heapd.server")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(config: Config, link: SupervisorLink | None = None) -> None:
    """Run a server in this thread, the process's main one, until it is stopped.

    Args:    link (to the supervisor that forked this process, None: there is none).
    Returns: after a stop by request, signal or idleness; sockets, arena and lock file are gone. The lock file of a
             supervisor is left to it.
    Raises:  DaemonRunningError if the endpoint is served already; InvalidArgumentError, SegmentError, HeapFullError,
             LimitError if the daemon cannot start. Nothing of it is left then.
    """
    endpoint = config.endpoint
    limit = raise_descriptor_limit()
    prepare_directory(config)
    with contextlib.ExitStack() as stack:
        lock = DaemonLock.acquire(endpoint, config.gid) if link is None else link.lock
        stack.callback(lock.release)
        claim = claim_segment(endpoint, config.reserve)
        clear_sockets(endpoint)  # now that it is known that no daemon lives which they could belong to
        promise = stack.enter_context(_Promise(claim.is_there))
        manager = _adopt(config, claim) if claim.is_there else _create(config, claim)
        promise.manager = manager
        service = _service(config, manager, manager.arena)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        gates = (
            Gate(context, endpoint.control_path, config),
            Gate(context, endpoint.work_path, config),
        )
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(False)
            stack.enter_context(end)
        loop = Loop(service, config, gates, limit, ends[0].fileno())
        stack.callback(loop.close)
        stack.enter_context(_stop_on_signals(loop, ends[1]))
        stack.enter_context(_metrics(config, loop, service))  # before anybody is promised anything: it may fail
        if claim.is_there:
            loop.readmit(manager.sessions)
        promise.is_given = True
        for gate in gates:
            gate.open()
        if config.until_eof_fd is not None:
            loop.watch(config.until_eof_fd, partial(_end_at_eof, config.until_eof_fd, loop))
        _log_start(endpoint, manager.arena)
        if link is None:
            say_ready(config)
        else:
            loop.watch_supervisor(link)
            link.say(READY)
        loop.run()
        log.info("stopping %s", endpoint)
        if link is not None:
            link.say(STOPPING)


def prepare_directory(config: Config) -> None:
    """Make the endpoint's directory; what this process makes from now on is its user's alone.

    Raises: SegmentError if the directory cannot be used.
    """
    make_directory(config.endpoint.directory, config.gid)
    os.umask(0o077)


class _Promise(contextlib.AbstractContextManager["_Promise"]):
    """Whether clients may have been told of what is in the arena; then nothing but a stop on purpose removes it, and
    a server that fails leaves it to the next one. Fields: is_given, manager (once there is one)."""

    def __init__(self, is_given: bool) -> None:
        self.is_given = is_given
        self.manager: HeapManager | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.manager is not None and (kind is None or not self.is_given):
            self.manager.shutdown()


def _create(config: Config, claim: Claim) -> HeapManager:
    """A manager of a new arena. Raises: InvalidArgumentError, SegmentError, HeapFullError; nothing of it is left."""
    reserve = config.reserve or DEFAULT_RESERVE
    arena = Arena.create(claim.arena, reserve=reserve, commit_limit=config.commit_limit)
    try:
        arena.segment.open_to(config.gid)
        if not config.has_ledger:
            return HeapManager(arena, clock=time.monotonic_ns, limits=_limits(config))
        return HeapManager.create(arena, claim.ledger, clock=time.monotonic_ns, limits=_limits(config))
    except BaseException:
        arena.stop()
        raise


def _adopt(config: Config, claim: Claim) -> HeapManager:
    """The manager that the daemon was which left an arena behind. Raises: SegmentError; the arena stays as it is."""
    started = time.monotonic()
    try:
        manager = HeapManager.recover(claim.arena, claim.ledger, clock=time.monotonic_ns, limits=_limits(config))
    except SegmentError as error:
        raise SegmentError(
            f"{error}. The arena {claim.arena} is left as it is; if that cannot be mended, `heapd gc --force` removes "
            f"it, with all that it holds"
        ) from error
    arena = manager.arena
    if config.commit_limit is not None:
        arena.limit_commit(config.commit_limit)
    arena.segment.open_to(config.gid)
    log.warning(
        "going on with the arena %s of a daemon that died: start %d, %d heaps, %d sessions, %s committed, in %.3f s",
        claim.arena,
        arena.words[H_INCARNATION],
        len(manager.heaps),
        manager.live_session_count,
        format_size(arena.budget.committed),
        time.monotonic() - started,
    )
    return manager


def _limits(config: Config) -> Limits:
    return Limits(sessions=config.max_sessions, session_quota=config.session_quota)


def _end_at_eof(descriptor: int, loop: Loop) -> None:
    """Somebody wrote to the other end, which means nothing, or nobody has it any more."""
    if not os.read(descriptor, 4096):
        log.info("the process that this daemon was started for has ended; it ends, too")
        loop.stop()


@contextlib.contextmanager
def _metrics(config: Config, loop: Loop, service: Service) -> Iterator[None]:
    """While inside, metrics are served if that was asked for.

    A server that was started again does not leave its clients alone because somebody has taken the port meanwhile.
    """
    if config.metrics_port is None:
        yield
        return
    try:
        exporter = Exporter(config.metrics_port)
    except InvalidArgumentError as error:
        if not service.status()["restarts"]:
            raise
        log.error("%s; going on without", error)
        yield
        return
    loop.watch(exporter.descriptor, lambda: exporter.supply(service.status()))
    exporter.start()
    try:
        yield
    finally:
        exporter.close()


def _log_start(endpoint: Endpoint, arena: Arena) -> None:
    log.info(
        "process %d serves %s: arena %s of %s, at most %s committed",
        os.getpid(),
        endpoint,
        arena.segment.name,
        format_size(arena.shape.size),
        format_size(arena.budget.limit),
        extra={"endpoint": str(endpoint), "segment": arena.segment.name, "commit_limit": arena.budget.limit},
    )


def _service(config: Config, manager: HeapManager, arena: Arena) -> Service:
    """The service over `manager`, which knows who this process is; the arena's header says so too."""
    pid = os.getpid()
    start_time = start_time_of(pid)
    assert start_time is not None, "a running process has a start time"
    manager.start(pid, start_time)
    endpoint = config.endpoint
    identity = Identity(
        name=endpoint.name,
        endpoint=str(endpoint),
        work=endpoint.work,
        segment=arena.segment.name,
        instance=arena.instance,
        incarnation=arena.words[H_INCARNATION],
        arena_size=arena.shape.size,
        pid=pid,
        uid=os.getuid(),
        start_time=start_time,
        version=__version__,
        python=platform.python_version(),
        started_at=time.time(),
        started_ns=time.monotonic_ns(),
        gid=config.gid,
    )
    return Service(manager, identity, clock=time.monotonic_ns, max_process_sessions=config.max_process_sessions)


@contextlib.contextmanager
def _stop_on_signals(loop: Loop, wakeup: socket.socket) -> Iterator[None]:
    """While inside, a stop signal ends the loop at the end of its turn, and wakes it through `wakeup`.

    Afterwards, too, it does no more than that: a second one does not end the process before it has tidied up.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        loop.stop()

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    woken = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)


def say_ready(config: Config) -> None:
    """Tell whoever started this daemon that clients are answered from now on."""
    if config.ready_fd is not None:
        with contextlib.suppress(OSError):  # it may have given up meanwhile
            os.write(config.ready_fd, b"ready\n")
            os.close(config.ready_fd)
    _notify_systemd()


def _notify_systemd() -> None:
    """As sd_notify(3): in a unit of Type=notify the manager waits for this word.

    Not for a program that is a unit itself, and of whose environment a daemon that it started inherits this.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    is_unit = os.environ.get("SYSTEMD_EXEC_PID") in (None, str(os.getpid()))
    if address and is_unit:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"READY=1", address.replace("@", "\0", 1) if address[0] == "@" else address)
