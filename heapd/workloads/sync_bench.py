"""What serialization costs: pairs of alloc and free by processes and by threads, over three ways to have a heap.

    shared, serialized     one heap, its mutex taken in each call
    shared, unserialized   one heap, made with HEAP_NO_SERIALIZE
    a heap each            as many heaps as workers, serialized, so that each mutex has one user

Contended acquisitions and time waited are the heap's own counters, written by the holders of the real mutex.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import heapd_client as hc
from heapd.records import HeapStatistics
from heapd.workloads.crew import Crew, Duty, Start, pin, sleep_until
from heapd.workloads.latency import Histogram

__all__ = ["KINDS", "Cell", "Plan", "Work", "measure"]

KINDS = {"serialized": "shared, serialized", "unserialized": "shared, unserialized", "own": "a heap each"}
_SIZE = 64  # bytes a block
_BATCH = 64  # pairs of which one is timed by itself
_TAKEN_IN_SECTION = 3  # times a critical section takes the mutex: the lock, alloc, free
_START_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: endpoint, counts (of workers), seconds (each), holds_us (of the critical section), runs (rounds
    through all of it; of each measurement the run with the median throughput counts)."""

    endpoint: str
    counts: tuple[int, ...]
    seconds: float
    holds_us: tuple[int, ...]
    runs: int = 1

    @property
    def cells(self) -> int:
        """How many measurements that makes, of `seconds` each."""
        return self.runs * len(self.counts) * (2 * len(KINDS) + len(self.holds_us))


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement.

    Fields: kind (of KINDS), threads (True: workers are threads of one process), workers, hold_us (that each holds the
    lock by `heap.lock()`, None: no such lock), seconds, pairs, pairs_per_second, latency_us (percentiles of a pair),
    acquisitions (of heaps' mutexes), contended, waited_s (for mutexes, all workers together), worked_s (from the
    beginning to each one's end, which is late for who waits then), voluntary and involuntary (context switches).
    """

    kind: str
    threads: bool
    workers: int
    hold_us: int | None
    seconds: float
    pairs: int
    pairs_per_second: float
    latency_us: dict[str, float]
    acquisitions: int
    contended: int
    waited_s: float
    worked_s: float
    voluntary: int
    involuntary: int

    @property
    def contended_share(self) -> float:
        """Of the acquisitions that may have to wait; what a critical section allocates and frees cannot, inside."""
        could_wait = self.acquisitions // (1 if self.hold_us is None else _TAKEN_IN_SECTION)
        return self.contended / could_wait if could_wait else 0.0

    @property
    def waited_share(self) -> float:
        """Of the workers' time."""
        return self.waited_s / self.worked_s

    def to_plain(self) -> dict[str, object]:
        """As JSON has it."""
        return asdict(self) | {"contended_share": self.contended_share, "waited_share": self.waited_share}


# -- one worker ------------------------------------------------------------------------------------------------------
class Work:
    """What one worker did. Fields: pairs (that were done in time), worked_ns (to the end of the last pair), latencies
    (of a pair, ns)."""

    def __init__(self) -> None:
        self.pairs = 0
        self.worked_ns = 0
        self.latencies = Histogram()

    def run(self, heap: hc.Heap, start: Start, seconds: float, hold_us: int | None) -> None:
        """Allocate and free until the time is over."""
        self._step(heap, hold_us)  # what caches there are, fill
        self.latencies = Histogram()
        begin = start()
        end = begin + int(seconds * 1e9)
        sleep_until(begin)
        while True:
            done = self._step(heap, hold_us)
            now = time.monotonic_ns()
            if now >= end:
                self.worked_ns = now - begin
                return
            self.pairs += done

    def _step(self, heap: hc.Heap, hold_us: int | None) -> int:
        """Returns: pairs."""
        return self._batch(heap) if hold_us is None else self._held(heap, hold_us)

    def _batch(self, heap: hc.Heap) -> int:
        before = time.perf_counter_ns()
        block = heap.alloc(_SIZE)
        block.free()
        self.latencies.add(time.perf_counter_ns() - before)
        for _ in range(_BATCH - 1):
            block = heap.alloc(_SIZE)
            block.free()
        return _BATCH

    def _held(self, heap: hc.Heap, hold_us: int) -> int:
        """A pair in a critical section that takes at least `hold_us`."""
        before = time.perf_counter_ns()
        with heap.lock():
            until = time.perf_counter_ns() + hold_us * 1000
            heap.alloc(_SIZE).free()
            while time.perf_counter_ns() < until:
                pass
        self.latencies.add(time.perf_counter_ns() - before)
        return 1


@dataclass(frozen=True, slots=True)
class Order:
    """What a member of the crew is to do: kind, seconds, hold_us, threads (in the one process; 0: itself)."""

    kind: str
    seconds: float
    hold_us: int | None
    threads: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a member did: pairs, worked_ns (of its workers together), latencies (plain histogram), locks (what its own
    heaps' mutexes counted), voluntary and involuntary (context switches)."""

    pairs: int
    worked_ns: int
    latencies: list[int]
    locks: tuple[int, int, int]
    voluntary: int
    involuntary: int


def prepare(index: int, endpoint: str, shared: dict[str, str]) -> Duty:
    """A member of the crew, on a CPU of its own as far as there are enough, unless it works in threads.

    Args: index (of the member), shared (names of the shared heaps by kind).
    """
    session = hc.connect(endpoint, autostart=False)
    heaps = {kind: session.open_heap(name) for kind, name in shared.items()}
    own: list[hc.Heap] = []

    def duty(order: Order, start: Start) -> Report:
        pin(None if order.threads else index)
        workers = max(order.threads, 1)
        while len(own) < workers:
            own.append(session.create_heap())
        mine = own[:workers] if order.kind == "own" else [heaps[order.kind]] * workers
        return _report(order, mine, start)

    return duty


def _report(order: Order, heaps: list[hc.Heap], start: Start) -> Report:
    is_own = order.kind == "own"
    before = [heap.statistics() for heap in heaps]
    works = [Work() for _ in heaps]
    ready = _Ready(len(heaps), start)
    runs = [
        partial(work.run, heap, ready.wait, order.seconds, order.hold_us)
        for work, heap in zip(works, heaps, strict=True)
    ]
    if order.threads:
        _in_threads(runs, ready)
    else:
        runs[0]()
    switched = resource.getrusage(resource.RUSAGE_SELF)
    after = [heap.statistics() for heap in heaps]  # also in a shared heap: its counters get what was counted here
    latencies = Histogram()
    for work in works:
        latencies.merge(work.latencies)
    return Report(
        pairs=sum(work.pairs for work in works),
        worked_ns=sum(work.worked_ns for work in works),
        latencies=latencies.to_plain(),
        locks=_locks(zip(before, after, strict=True)) if is_own else (0, 0, 0),
        voluntary=switched.ru_nvcsw - ready.usage.ru_nvcsw,
        involuntary=switched.ru_nivcsw - ready.usage.ru_nivcsw,
    )


class _Ready:
    """Where the workers of a process wait until all are ready, of this process and then of all others.

    Fields: usage (of the process, when its own were ready).
    """

    def __init__(self, workers: int, start: Start) -> None:
        self._barrier = threading.Barrier(workers, self._all_ready, _START_DEADLINE_S)
        self._start = start
        self._begin = 0
        self.usage = resource.getrusage(resource.RUSAGE_SELF)

    def _all_ready(self) -> None:
        self._begin = self._start()
        self.usage = resource.getrusage(resource.RUSAGE_SELF)

    def wait(self) -> int:
        """The moment to begin. Raises: BrokenBarrierError if another worker failed."""
        self._barrier.wait()
        return self._begin

    def give_up(self) -> None:
        """Have nobody wait for a worker that failed."""
        self._barrier.abort()


def _in_threads(runs: Sequence[Callable[[], None]], ready: _Ready) -> None:
    errors: list[BaseException] = []

    def guarded(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)
            ready.give_up()

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _locks(pairs: Iterator[tuple[HeapStatistics, HeapStatistics]]) -> tuple[int, int, int]:
    """Acquisitions, contended ones, nanoseconds waited, between two looks at each heap."""
    found = [
        (
            after.acquisitions - before.acquisitions,
            after.contended - before.contended,
            after.waited_ns - before.waited_ns,
        )
        for before, after in pairs
    ]
    acquisitions, contended, waited = (sum(column) for column in zip(*found, strict=True))
    return acquisitions, contended, waited


# -- all of them -----------------------------------------------------------------------------------------------------
def measure(plan: Plan, tell: Callable[[int], object]) -> list[Cell]:
    """Do all measurements; `tell` hears how many are done. Returns: one cell each.

    Raises: WorkloadError, HeapdError.
    """
    found: dict[tuple[object, ...], list[Cell]] = {}
    done = 0
    with hc.connect(plan.endpoint, autostart=False) as session:
        heaps = {kind: session.create_heap(f"sync-{kind}", serialize=kind == "serialized") for kind in list(KINDS)[:2]}
        names = {kind: str(heap.name) for kind, heap in heaps.items()}
        with Crew(max(plan.counts), prepare, plan.endpoint, names) as crew:
            for what in plan.runs * list(_cells(plan)):
                threads, count, kind, hold_us = what
                cell = _measure_cell(plan, crew, heaps.get(kind), threads, count, kind, hold_us)
                found.setdefault(what, []).append(cell)
                done += 1
                tell(done)
        for heap in heaps.values():
            heap.close()
    return [_middle(cells) for cells in found.values()]


def _middle(cells: list[Cell]) -> Cell:
    return sorted(cells, key=lambda cell: cell.pairs_per_second)[len(cells) // 2]


def _cells(plan: Plan) -> Iterator[tuple[bool, int, str, int | None]]:
    """What is measured, as (threads, count, kind, hold_us)."""
    for threads in (False, True):
        for count in plan.counts:
            for kind in KINDS:
                yield threads, count, kind, None
    for hold_us in plan.holds_us:
        for count in plan.counts:
            yield False, count, "serialized", hold_us


def _measure_cell(
    plan: Plan, crew: Crew, shared: hc.Heap | None, threads: bool, count: int, kind: str, hold_us: int | None
) -> Cell:
    before = shared.statistics() if shared else None
    order = Order(kind, plan.seconds, hold_us, count if threads else 0)
    reports: list[Report] = crew.run(order, 1 if threads else count, plan.seconds)
    locks = _locks(iter([(before, shared.statistics())])) if shared and before else (0, 0, 0)
    for report in reports:
        locks = (locks[0] + report.locks[0], locks[1] + report.locks[1], locks[2] + report.locks[2])
    return _cell(plan, reports, locks, threads, count, kind, hold_us)


def _cell(
    plan: Plan, reports: list[Report], locks: tuple[int, ...], threads: bool, count: int, kind: str, hold_us: int | None
) -> Cell:
    latencies = Histogram()
    for report in reports:
        latencies.merge(Histogram.from_plain(report.latencies))
    pairs = sum(report.pairs for report in reports)
    percentiles: dict[str, float] = {f"p{percent}": latencies.percentile(percent) / 1e3 for percent in (50, 90, 99)}
    return Cell(
        kind=kind,
        threads=threads,
        workers=count,
        hold_us=hold_us,
        seconds=plan.seconds,
        pairs=pairs,
        pairs_per_second=pairs / plan.seconds,
        latency_us=percentiles | {"max": latencies.maximum / 1e3},
        acquisitions=locks[0],
        contended=locks[1],
        waited_s=locks[2] / 1e9,
        worked_s=sum(report.worked_ns for report in reports) / 1e9,
        voluntary=sum(report.voluntary for report in reports),
        involuntary=sum(report.involuntary for report in reports),
    )


def as_json(cells: list[Cell]) -> list[dict[str, Any]]:
    """The measurements as JSON has them."""
    return [cell.to_plain() for cell in cells]
