"""The stress run in a storm: clients and the server are killed at random, and at the end everything is accounted for.

Every client keeps an estate (estate.py): what it held when it was killed, to the block, is what the process started in
its place must find. What a killed client was at work with is in no estate; that much, and no more, may be left over
when all others have freed what they hold.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import heapd_client as hc
from heapd.errors import HeapdError
from heapd.records import EntryKind
from heapd.units import PAGE_SIZE
from heapd.workloads import WorkloadError
from heapd.workloads.board import Board, Row
from heapd.workloads.chaos_client import run_chaos_client
from heapd.workloads.estate import Estate, estate_name, estate_size
from heapd.workloads.nursery import Run
from heapd.workloads.stress import Calm, Progress, StressOutcome, run_stress
from heapd.workloads.stress_client import Plan

__all__ = ["ChaosOutcome", "run_chaos"]

_CLIENT_KILLS_S = 0.5  # seconds between two kills of clients, on average
_SERVER_KILLS_S = 2.0
_LULL_S = 0.5  # no kills before the end: the last to be killed shall come back and see it
_MOST_AT_WORK = 17  # blocks that one operation of a client is at work with: a batch of 16, and one on its way
_SETTLE_S = 10.0


@dataclass(slots=True)
class ChaosOutcome:
    """What a storm did, and what it broke.

    Fields: stress (the run itself), client_kills, server_kills, recoveries_s (seconds from each kill of the server to
    the next answer), checked (times that a block was compared with what had been written into it), bytes_lost (of
    blocks that had changed or were gone), unfinished (blocks that killed clients were at work with, found and freed),
    pages_leaked (in use by nothing after everything was freed), faults (a sentence each, beside those of the stress).
    """

    stress: StressOutcome
    client_kills: int = 0
    server_kills: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    checked: int = 0
    bytes_lost: int = 0
    unfinished: int = 0
    pages_leaked: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return self.stress.is_clean and not (self.bytes_lost or self.pages_leaked or self.faults)

    @property
    def median_recovery_s(self) -> float:
        return median(self.recoveries_s) if self.recoveries_s else 0.0

    @property
    def longest_recovery_s(self) -> float:
        return max(self.recoveries_s, default=0.0)


def run_chaos(plan: Plan, progress: Callable[[Progress, ChaosOutcome], object]) -> ChaosOutcome:
    """Run the plan in a storm. Its daemon's server is killed again and again: it must be the caller's own.

    Raises: HeapdError, WorkloadError if it cannot be run; what was found is in the outcome.
    """
    outcome = ChaosOutcome(StressOutcome(plan))
    storm = Storm(plan, outcome)
    try:
        outcome.stress = run_stress(plan, lambda now: progress(now, outcome), storm)
        _count_leaks(plan, outcome)
    finally:
        storm.close()
    return outcome


class Storm(Calm):
    """Kills at times that follow from the seed; whom, from the seed and who is there."""

    def __init__(self, plan: Plan, outcome: ChaosOutcome) -> None:
        self._plan = plan
        self._outcome = outcome
        self._random = random.Random(f"{plan.seed}/storm")
        self._processes: dict[int, tuple[int, int]] = {}  # of clients, by number: process id and pidfd
        self._struck: set[int] = set()
        self._ends_at = 0.0
        self._next_client = self._next_server = 0.0

    def client(self, plan: Plan) -> Run:
        return partial(run_chaos_client, plan)

    def begin(self, session: hc.Session, control: hc.Heap, heaps: list[hc.Heap], board: Board) -> None:
        self._session, self._heaps, self._board = session, heaps, board
        self._estates = []
        for number in range(self._plan.clients):
            block = control.alloc(estate_size(self._plan.heaps), zero=True)
            control.publish(estate_name(number), block)
            self._estates.append(Estate(block.view, self._plan.heaps))

    # -- while clients run -------------------------------------------------------------------------------------------
    def strike(self) -> None:
        now = time.monotonic()
        if not self._ends_at:
            self._ends_at = now + self._plan.seconds - _LULL_S
            self._next_client, self._next_server = (
                now + self._pause(_CLIENT_KILLS_S),
                now + self._pause(_SERVER_KILLS_S),
            )
        self._outcome.checked, self._outcome.bytes_lost = self._sum(Row.CHECKED), self._sum(Row.LOST)
        if now >= self._ends_at:
            return
        if now >= self._next_client:
            self._next_client = now + self._pause(_CLIENT_KILLS_S)
            self._kill_client()
        if now >= self._next_server:
            self._kill_server()
            self._next_server = time.monotonic() + self._pause(_SERVER_KILLS_S)

    def _pause(self, average_s: float) -> float:
        return self._random.expovariate(1 / average_s)

    def _sum(self, word: Row) -> int:
        return sum(self._board.column(word))

    def _kill_client(self) -> None:
        number = self._random.randrange(self._plan.clients)
        pidfd = self._process(number)
        if pidfd is None or number in self._struck:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            self._struck.add(number)
            self._outcome.client_kills += 1

    def _process(self, number: int) -> int | None:
        """A pidfd of the client's process, None if it has not said yet who it is, or has ended."""
        pid = self._board.get(number, Row.PID)
        known = self._processes.get(number)
        if known is not None and known[0] == pid:
            return known[1]
        if known is not None:
            os.close(self._processes.pop(number)[1])
        try:
            self._processes[number] = pid, os.pidfd_open(pid)
        except (OSError, ValueError):
            return None
        return self._processes[number][1]

    def _kill_server(self) -> None:
        """Kill it, and see how long the next answer takes."""
        started = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(self._session.daemon_pid, signal.SIGKILL)
            self._outcome.server_kills += 1
        try:
            self._session.statistics()
        except HeapdError as error:
            raise WorkloadError(f"the server was killed, and the daemon is lost: {error}") from error
        self._outcome.recoveries_s.append(time.monotonic() - started)

    def is_victim(self, number: int) -> bool:
        if number not in self._struck:
            return False
        self._struck.discard(number)
        return True

    # -- the account -------------------------------------------------------------------------------------------------
    def clear_up(self, outcome: StressOutcome) -> None:
        """Free what killed clients were at work with, and see that it is no more than that."""
        chaos = self._outcome
        for number, heap in enumerate(self._heaps):
            left = [entry for entry in heap.walk() if entry.kind is EntryKind.BUSY]
            for entry in left:
                self._session.block_at(entry.address).free()
            chaos.unfinished += len(left)
            outcome.report.counts[f"guard {number}"] = self._count_guard(number)
        if chaos.unfinished > _MOST_AT_WORK * chaos.client_kills:
            chaos.faults.append(f"{chaos.unfinished} blocks are left, more than {chaos.client_kills} killed clients "
                                "can have been at work with")  # fmt: skip
        for number, estate in enumerate(self._estates):
            if held := len(list(estate.assets())):
                chaos.faults.append(f"client {number} has ended and not freed {held} of its blocks")
        chaos.checked, chaos.bytes_lost = self._sum(Row.CHECKED), self._sum(Row.LOST)
        if (untold := self._sum(Row.ERRORS) - len(outcome.report.errors)) > 0:
            chaos.faults.append(f"{untold} errors of clients that were killed after they had met them")

    def _count_guard(self, heap: int) -> int:
        """How often the heap's guard was raised, as the clients counted it; one that was killed between raising and
        counting counts."""
        counted = sum(estate.guard(heap) for estate in self._estates)
        raised = self._board.guard(heap)
        return raised if counted <= raised <= counted + self._outcome.client_kills else counted

    def close(self) -> None:
        """Forget the processes."""
        for _, pidfd in self._processes.values():
            os.close(pidfd)
        self._processes.clear()


def _count_leaks(plan: Plan, outcome: ChaosOutcome) -> None:
    """Pages of heaps in which slabs or runs are left, and memory behind the arena that the daemon does not know of."""
    outcome.pages_leaked = sum(
        heap.statistics.committed // PAGE_SIZE for heap in outcome.stress.heaps if heap.pages_in_use
    )
    with hc.connect(plan.endpoint, autostart=False) as session:
        deadline = time.monotonic() + _SETTLE_S  # what was released is decommitted in slices
        while True:
            unknown = _allocated(session) - session.statistics().committed
            if unknown <= 0 or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
    outcome.pages_leaked += max(unknown, 0) // PAGE_SIZE


def _allocated(session: hc.Session) -> int:
    """Bytes of memory behind the arena, as the kernel counts them."""
    return os.stat(f"/dev/shm/{session.segment}").st_blocks * 512
