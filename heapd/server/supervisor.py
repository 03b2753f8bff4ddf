"""A small parent process that starts the server process again whenever it dies.

The server is a fork of the supervisor, which has imported everything and has neither a thread nor a ZeroMQ context:
so a restart costs what adopting the arena costs, and no start of an interpreter. Supervisor and server share the
endpoint's lock, so that nobody else takes the endpoint between a death and the restart, or while either one lives.

    server ends with 0            stopped on purpose, nothing of it is left: the supervisor ends, too
    server hangs                  killed, after `Config.watchdog_s` in which nothing moved: that is a death, too
    server dies                   logged with its reason; another one is started, which adopts the arena
    ... after it said "stopping"  the supervisor removes what is left, and ends
    ... too often in a while      the supervisor gives up; the arena stays for whoever starts the daemon again
    supervisor is told to stop    it tells the server
    supervisor is killed          the server goes on, without one
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import FrameType
from typing import Any, Final, NoReturn

from heapd.errors import DaemonLostError, HeapdError, SegmentError
from heapd.server.config import Config
from heapd.server.guards import raise_descriptor_limit
from heapd.server.leftovers import discard
from heapd.server.lifecycle import STOP_SIGNALS, prepare_directory, say_ready, serve
from heapd.server.link import READY, STOPPING, Pulse, SupervisorLink
from heapd.server.lock import DaemonLock
from heapd.server.watchdog import Effort, Heart, Watchdog

__all__ = ["supervise"]

log = logging.getLogger("heapd.supervisor")

_WINDOW_S: Final = 60.0  # `Config.restarts` in this time are the limit
_SHORT_LIFE_S: Final = 1.0  # arbitrary: who serves longer is restarted at once
_FIRST_DELAY_S: Final = 0.05  # before the second restart in a row of servers with short lives; then twice that
_LONGEST_DELAY_S: Final = 0.4  # so that a server that dies at once meets the default limit within the window


def supervise(config: Config) -> None:
    """Run a daemon until it is stopped: a server process, started again when it dies.

    Returns: after a stop by request, signal or idleness; sockets, arena and lock file are gone.
    Raises:  DaemonRunningError if the endpoint is served already; what `serve` raises if the server cannot start, and
             nothing of it is left then; DaemonLostError if it died more than `config.restarts` times in a minute: the
             arena is left as it is, and the next start adopts it.
    """
    if not config.restarts:
        serve(config)
        return
    raise_descriptor_limit()
    prepare_directory(config)
    lock = DaemonLock.acquire(config.endpoint, config.gid)
    try:
        Supervisor(config, lock).run()
    finally:
        lock.release()


@dataclass(slots=True)
class Life:
    """One server process, from its fork to its end.

    Fields: pid, pidfd, words (what it says: READY, STOPPING, or the error it ends with), watchdog, status (its wait
    status once it has ended), ready_at (monotonic seconds, None before), is_stopping, is_hung (and is being killed for
    that), error.
    """

    pid: int
    pidfd: int
    words: Connection
    watchdog: Watchdog
    status: int | None = None
    ready_at: float | None = None
    is_stopping: bool = False
    is_hung: bool = False
    error: HeapdError | None = None

    @property
    def end(self) -> str:
        """How it ended, for the log."""
        assert self.status is not None
        code = os.waitstatus_to_exitcode(self.status)
        if code < 0:
            return f"{'hung and ' if self.is_hung else ''}was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}" + (f": {self.error}" if self.error else "")


class Supervisor:
    """Starts servers one after another. `lock` is the endpoint's, shared with each of them."""

    def __init__(self, config: Config, lock: DaemonLock) -> None:
        self._config = config
        self._lock = lock
        self._was_ready = False
        self._stop_signal: int | None = None
        self._deaths: deque[float] = deque()  # within the window
        self._short_lives = 0  # in a row
        self._pulse = Pulse()
        self._wakeup = socket.socketpair()
        for end in self._wakeup:
            end.setblocking(False)

    def run(self) -> None:
        """Until a server ends on purpose. Raises: as `supervise`."""
        try:
            with self._signals_noted():
                while not self._attempt():
                    self._pause()
                    if self._stop_signal is not None:  # while there was no server to tell
                        discard(self._config.endpoint)
                        return
        finally:
            self.close()

    def _attempt(self) -> bool:
        """The life of one server. Returns: whether no other one is to follow. Raises: as `supervise`."""
        try:
            return self._is_over(self._live())
        except OSError as error:  # no process, no descriptor: a machine out of memory may have some again soon
            if not self._was_ready or isinstance(error, HeapdError):
                raise
            self._count_death(f"no server process can be started ({error.strerror})", 0.0)
            return False

    def close(self) -> None:
        """Let go of what it waits with."""
        for end in self._wakeup:
            end.close()

    # -- one server --------------------------------------------------------------------------------------------------
    def _live(self) -> Life:
        """Start a server and attend to it until it has ended."""
        life = self._fork()
        try:
            if self._stop_signal is not None:
                signal.pidfd_send_signal(life.pidfd, self._stop_signal)
            while life.status is None:
                ends = [] if life.words.closed else [life.words]
                ready = wait([*ends, life.pidfd, self._wakeup[0]], life.watchdog.pause_s)
                if self._wakeup[0] in ready:
                    self._pass_signals_on(life)
                self._listen(life)
                if life.pidfd in ready:
                    self._listen(life)  # its last words may have come after those above
                    _, life.status = os.waitpid(life.pid, 0)
                elif life.watchdog.is_alarmed():
                    self._kill_hung(life)
        finally:
            life.words.close()
            os.close(life.pidfd)
        return life

    def _fork(self) -> Life:
        """The server process. In it, this call does not return."""
        ours, theirs = Pipe(duplex=False)
        gc.freeze()  # what the two share stays shared: the server's collector would write to all of it
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = os.fork()
            if not pid:
                ours.close()
                self._be_server(SupervisorLink(theirs, self._lock, self._pulse), blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        try:
            return Life(pid, os.pidfd_open(pid), ours, self._watch(pid, Effort(pid)))
        except OSError:
            os.kill(pid, signal.SIGKILL)  # nobody would watch it, and there must not be two
            os.waitpid(pid, 0)
            ours.close()
            raise

    def _be_server(self, link: SupervisorLink, blocked: set[int]) -> NoReturn:
        """The server's whole life; never back into the supervisor's frames."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)  # until there is a loop to stop; the supervisor tidies up then
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self.close()
            if self._config.ready_fd is not None and not self._was_ready:
                os.close(self._config.ready_fd)  # the supervisor says it; whoever reads waits for its end
            serve(self._config, link)
            status = 0
        except HeapdError as error:
            link.say(error)
        except BaseException:
            log.exception("the server met a fault of its own")
        finally:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(status)

    def _watch(self, pid: int, heart: Heart) -> Watchdog:
        return Watchdog(pid, heart, self._config.watchdog_s)

    def _kill_hung(self, life: Life) -> None:
        """End a server that hangs: first by SIGABRT, at which it writes down where; if it still is there at the next
        look, by what nobody can refuse."""
        number = signal.SIGKILL if life.is_hung else signal.SIGABRT
        if not life.is_hung:
            life.is_hung = True
            is_serving = life.ready_at is not None and not life.is_stopping
            log.error(
                "the server process %d hangs: its %s for %g s, and the kernel says %s; killing it",
                life.pid,
                "loop has not turned" if is_serving else f"{'stop' if life.is_stopping else 'start'} has not got on",
                self._config.watchdog_s,
                life.watchdog.describe(),
            )
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(life.pidfd, number)

    def _listen(self, life: Life) -> None:
        """Take what the server says."""
        try:
            while not life.words.closed and life.words.poll():
                said: Any = life.words.recv()
                if said == READY:
                    life.ready_at = time.monotonic()
                    life.watchdog = self._watch(life.pid, self._pulse)
                    if not self._was_ready:
                        self._was_ready = True
                        say_ready(self._config)
                elif said == STOPPING:
                    life.is_stopping = True
                    life.watchdog = self._watch(life.pid, Effort(life.pid))
                elif isinstance(said, HeapdError):
                    life.error = said
        except EOFError:  # it is about to end
            life.words.close()

    # -- between two -------------------------------------------------------------------------------------------------
    def _is_over(self, life: Life) -> bool:
        """Whether no other server is to follow. Raises: as `supervise`."""
        if life.status == 0:
            return True
        if self._stop_signal is not None or life.is_stopping:
            level = logging.INFO if life.ready_at is None else logging.ERROR  # it may be stopped before it can tidy up
            log.log(level, "the server process %d was to stop and %s; removing what it left", life.pid, life.end)
            discard(self._config.endpoint)
            return True
        if life.error is not None and (not self._was_ready or isinstance(life.error, SegmentError)):
            raise life.error  # the next one would meet the same
        lived_s = time.monotonic() - life.ready_at if life.ready_at is not None else 0.0
        self._count_death(f"the server process {life.pid} {life.end} after {lived_s:.1f} s", lived_s)
        return False

    def _count_death(self, what: str, lived_s: float) -> None:
        """Log a death. Raises: DaemonLostError if it was one too many."""
        now = time.monotonic()
        self._short_lives = self._short_lives + 1 if lived_s < _SHORT_LIFE_S else 0
        self._deaths.append(now)
        while self._deaths[0] < now - _WINDOW_S:
            self._deaths.popleft()
        if len(self._deaths) > self._config.restarts:
            raise DaemonLostError(
                f"the server of {self._config.endpoint} died {len(self._deaths)} times within {_WINDOW_S:g} s, and is "
                f"not started again: {what}. Its arena is kept; `heapd serve` goes on with it"
            )
        log.error("%s; starting another", what)

    def _pause(self) -> None:
        """Wait before a restart, longer with each server that did not live; not at all for one that did."""
        if self._short_lives > 1:
            delay_s = min(_FIRST_DELAY_S * 2 ** (self._short_lives - 2), _LONGEST_DELAY_S)
            if wait([self._wakeup[0]], delay_s):
                self._drain()

    # -- signals -----------------------------------------------------------------------------------------------------
    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """While inside, a stop signal is remembered, and wakes whoever waits for the wakeup socket."""

        def note(number: int, frame: FrameType | None) -> None:
            self._stop_signal = number

        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        woken = signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_signals_on(self, life: Life) -> None:
        self._drain()
        if self._stop_signal is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(life.pidfd, self._stop_signal)

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            self._wakeup[0].recv(4096)
