"""A daemon's life from its first check to its last unlink.

Order matters. Up: directory, lock, leftovers of a crash, descriptors, arena, sockets, "ready". Down, on a stop or on
any error on the way up: sockets, arena, lock. Nothing is bound and nothing of another daemon's is touched before the
lock is held.
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
from types import FrameType

import zmq

from heapd import __version__
from heapd.arena import Arena
from heapd.layout import H_INCARNATION
from heapd.manager import HeapManager, Limits
from heapd.server.config import Config
from heapd.server.credentials import start_time_of
from heapd.server.gate import Gate
from heapd.server.guards import raise_descriptor_limit
from heapd.server.leftovers import claim_segment, clear_sockets
from heapd.server.lock import DaemonLock
from heapd.server.loop import Loop
from heapd.service import Identity, Service
from heapd.units import format_size
from heapd.wire import Endpoint, make_directory

__all__ = ["serve"]

log = logging.getLogger("heapd.server")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(config: Config) -> None:
    """Run a daemon in this thread, the process's main one, until it is stopped.

    Returns: after a stop by request, signal or idleness; sockets, arena and lock file are gone.
    Raises:  DaemonRunningError if the endpoint is served already; InvalidArgumentError, SegmentError, HeapFullError
             if the daemon cannot start. Nothing of it is left then.
    """
    endpoint = config.endpoint
    make_directory(endpoint.directory, config.gid)
    os.umask(0o077)
    with contextlib.ExitStack() as stack:
        lock = DaemonLock.acquire(endpoint)
        stack.callback(lock.release)
        limit = raise_descriptor_limit()
        clear_sockets(endpoint)
        arena = Arena.create(claim_segment(endpoint), reserve=config.reserve, commit_limit=config.commit_limit)
        limits = Limits(sessions=config.max_sessions, session_quota=config.session_quota)
        manager = HeapManager(arena, clock=time.monotonic_ns, limits=limits)
        stack.callback(manager.shutdown)
        arena.segment.open_to(config.gid)
        service = _service(config, manager, arena)
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
        for gate in gates:
            gate.open()
        _log_start(endpoint, arena)
        _say_ready(config)
        loop.run()
        log.info("stopping %s", endpoint)


def _log_start(endpoint: Endpoint, arena: Arena) -> None:
    log.info(
        "process %d serves %s: arena %s of %s, at most %s committed",
        os.getpid(),
        endpoint,
        arena.segment.name,
        format_size(arena.shape.size),
        format_size(arena.budget.limit),
    )


def _service(config: Config, manager: HeapManager, arena: Arena) -> Service:
    """The service over `manager`, which knows who this process is; the arena's header says so too."""
    pid = os.getpid()
    start_time = start_time_of(pid)
    assert start_time is not None, "a running process has a start time"
    arena.start(pid, start_time)
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
    """While inside, a stop signal ends the loop at the end of its turn, and wakes it through `wakeup`."""

    def stop(number: int, frame: FrameType | None) -> None:
        loop.stop()

    before = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    woken = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_ready(config: Config) -> None:
    """Tell whoever started this daemon that clients are answered from now on."""
    if config.ready_fd is not None:
        with contextlib.suppress(OSError):  # it may have given up meanwhile
            os.write(config.ready_fd, b"ready\n")
            os.close(config.ready_fd)
