"""The stress run: many client processes on shared heaps, watched, then everything checked."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import heapd_client as hc
from heapd.errors import HeapdError, NoSuchNameError
from heapd.records import HeapStatistics
from heapd.units import KIB
from heapd.wire import JobFolder
from heapd.workloads import WorkloadError
from heapd.workloads.board import Board, Phase, Row, board_size
from heapd.workloads.nursery import Run, log_of, run_nursery
from heapd.workloads.stress_client import (
    CONTROL_HEAP,
    DEADLINE,
    PATIENCE_S,
    Plan,
    Report,
    heap_name,
    result_name,
    run_client,
)
from heapd.workloads.team import interrupts_held

__all__ = ["MOST_CLIENTS", "Calm", "HeapCheck", "Progress", "StressOutcome", "bytes_a_client", "run_stress"]

MOST_CLIENTS = 500
_START_DEADLINE_S = 120.0
_END_DEADLINE_S = 150.0  # more than a client's own patience with the others
_POLL_S = 0.1
_MOST_BYTES = 512 * KIB


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of the run: phase ("start", "run", "finish"), done and total (clients; seconds in "run"),
    operations and live blocks so far, errors so far."""

    phase: str
    done: float
    total: float
    operations: int
    live: int
    errors: int


@dataclass(frozen=True, slots=True)
class HeapCheck:
    """A work heap after everybody freed everything: violations and locks as text, statistics after compact."""

    name: str
    serialized: bool
    violations: list[str]
    lost_increments: int
    statistics: HeapStatistics

    @property
    def pages_in_use(self) -> int:
        """Slabs and runs that are left; none should be."""
        return self.statistics.slabs + self.statistics.runs

    @property
    def is_clean(self) -> bool:
        return not (self.violations or self.lost_increments or self.pages_in_use or self.statistics.busy_blocks)


@dataclass(slots=True)
class StressOutcome:
    """What a stress run found.

    Fields: plan, operations, seconds (from the start signal to the last client's deadline), report (all clients'
    together), dead (a sentence for each client that ended badly), heaps.
    """

    plan: Plan
    operations: int = 0
    seconds: float = 0.0
    report: Report = field(default_factory=Report)
    dead: list[str] = field(default_factory=list)
    heaps: list[HeapCheck] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.report.errors or self.dead) and all(heap.is_clean for heap in self.heaps)


def bytes_a_client(clients: int) -> int:
    """What one client may hold so that all together stay under half of what /dev/shm has left."""
    status = os.statvfs("/dev/shm")
    return max(4 * KIB, min(_MOST_BYTES, status.f_bavail * status.f_frsize // (2 * clients)))


class Calm:
    """What befalls a run from outside: nothing. A storm overrides what it brings."""

    def client(self, plan: Plan) -> Run:
        """What client processes run."""
        return partial(run_client, plan)

    def begin(self, session: hc.Session, control: hc.Heap, heaps: list[hc.Heap], board: Board) -> None:
        """Called once, before any client is there."""

    def strike(self) -> None:
        """Called ever again while the clients run."""

    def is_victim(self, number: int) -> bool:
        """Whether client `number`, which was killed, is to be started again."""
        return False

    def clear_up(self, outcome: StressOutcome) -> None:
        """Called when all clients have ended, before the heaps are checked."""


def run_stress(plan: Plan, progress: Callable[[Progress], object], weather: Calm | None = None) -> StressOutcome:
    """Run the plan against the daemon at its endpoint.

    Raises: HeapdError, WorkloadError if it cannot be run; what clients found is in the outcome.
    """
    weather = weather or Calm()
    with (
        hc.connect(plan.endpoint, autostart=False, timeout=PATIENCE_S) as session,
        JobFolder("stress-logs") as folder,
    ):
        control = session.create_heap(CONTROL_HEAP)
        heaps = [session.create_heap(heap_name(number), serialize=number % 2 == 0) for number in range(plan.heaps)]
        block = control.alloc(board_size(plan.clients, plan.heaps), zero=True)
        control.publish("board", block)
        board = Board(block.view, plan.clients, plan.heaps)
        outcome = StressOutcome(plan)
        weather.begin(session, control, heaps, board)
        with _nursery(weather.client(plan), plan.clients, folder.path) as connection:
            _Watch(plan, outcome, board, connection, folder.path, progress, weather).run(control)
        _collect(control, plan, outcome)
        weather.clear_up(outcome)
        outcome.heaps = [_check_heap(heap, board, number, outcome) for number, heap in enumerate(heaps)]
        for heap in (*heaps, control):
            heap.destroy()
    return outcome


@contextmanager
def _nursery(run: Run, clients: int, folder: Path) -> Iterator[Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_nursery, args=(theirs, run, clients, folder), name="nursery", daemon=True)
    with interrupts_held():
        process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with suppress(OSError):
            ours.send(None)
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
        ours.close()


class _Watch:
    """The parent's part while clients run: the start signal, the progress, who has died."""

    def __init__(
        self, plan: Plan, outcome: StressOutcome, board: Board, connection: Connection, folder: Path,
        progress: Callable[[Progress], object], weather: Calm,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._outcome = outcome
        self._board = board
        self._connection = connection
        self._folder = folder
        self._progress = progress
        self._weather = weather
        self._ended: set[int] = set()

    def run(self, control: hc.Heap) -> None:
        """Until every client has ended."""
        clients = self._plan.clients
        self._until("start", lambda: self._count(Phase.READY), clients, _START_DEADLINE_S)
        seconds = self._plan.seconds
        with control.alloc(DEADLINE.size) as go:
            started = time.monotonic()
            DEADLINE.pack_into(go.view, 0, started + seconds)
            control.publish("go", go)
            self._until("run", lambda: min(time.monotonic() - started, seconds), seconds, seconds + _END_DEADLINE_S)
            self._outcome.seconds = time.monotonic() - started
            self._until("finish", lambda: len(self._ended), clients, _END_DEADLINE_S)
            control.unpublish("go")
        self._outcome.operations = sum(self._board.column(Row.OPERATIONS))

    def _count(self, phase: Phase) -> int:
        return sum(value >= phase for value in self._board.column(Row.PHASE))

    def _until(self, phase: str, done: Callable[[], float], total: float, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            self._notice_ends()
            if phase == "run":
                self._weather.strike()
            now = done()
            board = self._board
            sums = [sum(board.column(word)) for word in (Row.OPERATIONS, Row.LIVE, Row.ERRORS)]
            self._progress(Progress(phase, now, total, *sums))
            if now >= total or len(self._ended) == self._plan.clients:
                return
            if time.monotonic() > deadline:
                self._outcome.dead.append(f"{phase}: only {now:g} of {total:g} after {patience_s:g} s; the rest killed")
                return
            time.sleep(_POLL_S)

    def _notice_ends(self) -> None:
        try:
            while self._connection.poll():
                number, status = self._connection.recv()
                if os.WIFSIGNALED(status) and self._weather.is_victim(number):
                    self._connection.send(number)
                    continue
                self._ended.add(number)
                if status:
                    self._outcome.dead.append(f"client {number} {_fate(status)}{self._last_words(number)}")
                    self._board.put(number, Row.PHASE, Phase.ENDED)  # so that nobody waits for it
        except (EOFError, ConnectionResetError):
            if len(self._ended) < self._plan.clients:
                raise WorkloadError("the process that starts the clients has died") from None

    def _last_words(self, number: int) -> str:
        with suppress(OSError):
            text = log_of(self._folder, number).read_text(errors="replace").strip()
            return ": " + " / ".join(text.split("\n")[-3:]) if text else ""
        return ""


def _fate(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with exit code {os.WEXITSTATUS(status)}"


def _collect(control: hc.Heap, plan: Plan, outcome: StressOutcome) -> None:
    """Add up what the clients left in the control heap."""
    for number in range(plan.clients):
        try:
            outcome.report.merge(Report.from_json(bytes(control.lookup(result_name(number)).view)))
        except NoSuchNameError:
            if not any(text.startswith(f"client {number} ") for text in outcome.dead):
                outcome.dead.append(f"client {number} left no report")


def _check_heap(heap: hc.Heap, board: Board, number: int, outcome: StressOutcome) -> HeapCheck:
    try:
        violations = [f"{found.what} at {found.address:#x}: {found.detail}" for found in heap.validate()]
        heap.compact()
        lost = outcome.report.counts.get(f"guard {number}", 0) - board.guard(number)
        return HeapCheck(heap_name(number), number % 2 == 0, violations, lost, heap.statistics())
    except HeapdError as error:
        raise WorkloadError(f"{heap_name(number)} could not be checked: {error}") from error
