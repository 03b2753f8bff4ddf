"""The demo: a folder indexed three ways by real processes, the findings compared, the times side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import heapd_client as hc
from heapd.records import ArenaStatistics, HeapStatistics
from heapd.workloads import jobs
from heapd.workloads.corpus import Corpus, Finding, unpack_findings
from heapd.workloads.picture import Picture, cell_size_for, picture_of_walk
from heapd.workloads.private import private_daemon
from heapd.workloads.team import Team

__all__ = ["Outcome", "Progress", "Run", "Snapshot", "first_difference", "run_demo"]

Progress = Callable[[int], object]  # told how many files more are done
_PICTURE_CELLS = 64 * 20
_Found = dict[int, Finding]


@dataclass(frozen=True, slots=True)
class Run:
    """One way of doing the job: way, processes, blocks (in a shared heap), seconds (of each round, from go to the
    last result)."""

    way: str
    processes: int
    blocks: int
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The heap when the last worker was done: statistics of heap and arena, picture of the heap."""

    heap: HeapStatistics
    arena: ArenaStatistics
    picture: Picture


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found: corpus, runs (one a way), difference (the first between two findings, None if all are
    equal), snapshot (of the last round)."""

    corpus: Corpus
    runs: list[Run]
    difference: str | None
    snapshot: Snapshot


def run_demo(corpus: Corpus, workers: int, rounds: int, stage: Callable[[str], Progress]) -> Outcome:
    """Index the corpus alone, through a queue and through a shared heap of a private daemon, in turn.

    Args:   rounds (of the three ways, >= 1), stage (from a way's name to what counts its files).
    Raises: WorkloadError, HeapdError; every process has ended and the daemon is gone, as it is after success.
    """
    bars = [stage(way) for way in ("one process", "queue", "shared heap")]
    alone, queue, shared = Run("one process", 1, 0, []), Run("queue", workers + 1, 0, []), []
    difference: str | None = None
    with private_daemon("demo") as endpoint, hc.connect(endpoint, autostart=False) as session:
        for _ in range(rounds):
            expected = _run_alone(corpus, alone, bars[0])
            queued = _run_queue(corpus, workers, queue, bars[1])
            found, seconds, snapshot = _run_shared(corpus, workers, session, bars[2])
            shared.append(seconds)
            difference = difference or first_difference(corpus, expected, found, "shared heap")
            difference = difference or first_difference(corpus, expected, queued, "queue")
    runs = [alone, queue, Run("shared heap", workers + 1, snapshot.heap.busy_blocks, shared)]
    return Outcome(corpus, runs, difference, snapshot)


def _run_alone(corpus: Corpus, run: Run, progress: Progress) -> _Found:
    with Team() as team:
        team.start("reader", jobs.index_alone, corpus.paths)
        team.wait_ready()
        seconds, results = team.run(progress)
    run.seconds.append(seconds)
    return unpack_findings(results["reader"])


def _run_queue(corpus: Corpus, workers: int, run: Run, progress: Progress) -> _Found:
    found: _Found = {}
    with Team() as team:
        queue: Any = team.context.Queue()
        team.start("queue loader", jobs.load_queue, queue, corpus.paths, workers)
        for number in range(workers):
            team.start(f"queue worker {number}", jobs.index_queue, queue)
        team.wait_ready()
        seconds, results = team.run(progress)
        for packed in results.values():
            found.update(unpack_findings(packed))
    run.seconds.append(seconds)
    return found


def _run_shared(
    corpus: Corpus, workers: int, session: hc.Session, progress: Progress
) -> tuple[_Found, float, Snapshot]:
    """Returns: (findings, seconds, how the heap was when the last worker was done). The heap is gone afterwards."""
    heap = session.create_heap(jobs.HEAP_NAME)
    heap.publish("cursor", heap.alloc(8, zero=True))
    with Team() as team:
        team.start("loader", jobs.load_blocks, session.endpoint, corpus.paths, corpus.sizes, workers)
        for number in range(workers):
            team.start(f"worker {number}", jobs.index_blocks, session.endpoint, number)
        team.wait_ready()
        seconds, _ = team.run(progress)
        found: _Found = {}
        for number in range(workers):
            found.update(unpack_findings(heap.lookup(jobs.result_name(number)).view))
        snapshot = _look(session, heap)
    heap.destroy()
    return found, seconds, snapshot


def _look(session: hc.Session, heap: hc.Heap) -> Snapshot:
    statistics = heap.statistics()
    cells = cell_size_for(statistics.reserved, statistics.committed, _PICTURE_CELLS)
    picture = picture_of_walk(f"heap {jobs.HEAP_NAME!r}", heap.walk(), cells)
    return Snapshot(statistics, session.statistics(), picture)


def first_difference(corpus: Corpus, expected: dict[int, Finding], found: dict[int, Finding], way: str) -> str | None:
    """The first file whose finding differs from the expected one, as a sentence; None if there is none."""
    for index, path in enumerate(corpus.paths):
        if found.get(index) != expected.get(index):
            return f"{path}: one process found {_said(expected.get(index))}, {way}: {_said(found.get(index))}"
    return None


def _said(finding: Finding | None) -> str:
    if finding is None:
        return "nothing"
    return f"{finding.lines} lines, {finding.words} words, SHA-256 {finding.digest.hex()[:16]}..."
