"""The demo: a folder indexed three ways by real processes, the findings compared, the times side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import heapd_client as hc
from heapd.records import ArenaStatistics, HeapStatistics
from heapd.workloads import jobs
from heapd.workloads.corpus import Corpus, Finding, unpack_findings
from heapd.workloads.picture import Picture, cell_size_for, picture_of_walk
from heapd.workloads.private import private_daemon
from heapd.workloads.team import Team

__all__ = ["Outcome", "Run", "Stage", "first_difference", "run_demo"]

Stage = Callable[[str], Callable[[int], object]]  # from a way's name to what counts its files
_PICTURE_CELLS = 64 * 20


@dataclass(frozen=True, slots=True)
class Run:
    """One way of doing the job: name, processes, blocks (in a shared heap), seconds (go to last result)."""

    name: str
    processes: int
    blocks: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found.

    Fields: corpus, runs, difference (the first between two findings, None if all are equal), heap and arena
    (statistics when the last worker was done), picture (of the heap at that moment), picture_of (the heap's name).
    """

    corpus: Corpus
    runs: list[Run]
    difference: str | None
    heap: HeapStatistics
    arena: ArenaStatistics
    picture: Picture
    picture_of: str = jobs.HEAP_NAME


def run_demo(corpus: Corpus, workers: int, stage: Stage) -> Outcome:
    """Index the corpus alone, through a queue and through a shared heap of a private daemon.

    Raises: WorkloadError, HeapdError; every process has ended and the daemon is gone, as it is after success.
    """
    alone, expected = _run_alone(corpus, stage("one process"))
    queued, from_queue = _run_queue(corpus, workers, stage("multiprocessing.Queue"))
    with private_daemon("demo") as endpoint, hc.connect(endpoint, autostart=False) as session:
        heap = session.create_heap(jobs.HEAP_NAME)
        with _loaded(endpoint, corpus, workers, heap) as team:
            seconds, _ = team.run(stage("shared heap"))
            shared = _collect(heap, workers)
            statistics = heap.statistics()
            run = Run("shared heap", workers + 1, statistics.busy_blocks, seconds)
            title = f"heap {jobs.HEAP_NAME!r}"
            picture = picture_of_walk(title, heap.walk(), cell_size_for(statistics.committed, _PICTURE_CELLS))
            arena = session.statistics()
    difference = first_difference(corpus, expected, shared, "shared heap") or first_difference(
        corpus, expected, from_queue, "queue"
    )
    return Outcome(corpus, [alone, queued, run], difference, statistics, arena, picture)


def _run_alone(corpus: Corpus, progress: Callable[[int], object]) -> tuple[Run, dict[int, Finding]]:
    with Team() as team:
        team.start("reader", jobs.index_alone, corpus.paths)
        team.wait_ready()
        seconds, results = team.run(progress)
    return Run("one process", 1, 0, seconds), unpack_findings(results["reader"])


def _run_queue(corpus: Corpus, workers: int, progress: Callable[[int], object]) -> tuple[Run, dict[int, Finding]]:
    with Team() as team:
        queue: Any = team.context.Queue()
        team.start("queue loader", jobs.load_queue, queue, corpus.paths, workers)
        for number in range(workers):
            team.start(f"queue worker {number}", jobs.index_queue, queue)
        team.wait_ready()
        seconds, results = team.run(progress)
        found: dict[int, Finding] = {}
        for packed in results.values():
            found.update(unpack_findings(packed))
    return Run("multiprocessing.Queue", workers + 1, 0, seconds), found


@contextmanager
def _loaded(endpoint: str, corpus: Corpus, workers: int, heap: hc.Heap) -> Iterator[Team]:
    """A team of one loader and the workers, ready to go; their blocks are theirs until the team is left."""
    cursor = heap.alloc(8, zero=True)
    heap.publish("cursor", cursor)
    with Team() as team:
        team.start("loader", jobs.load_blocks, endpoint, corpus.paths, corpus.sizes, workers)
        for number in range(workers):
            team.start(f"worker {number}", jobs.index_blocks, endpoint, number)
        team.wait_ready()
        yield team


def _collect(heap: hc.Heap, workers: int) -> dict[int, Finding]:
    found: dict[int, Finding] = {}
    for number in range(workers):
        found.update(unpack_findings(heap.lookup(jobs.result_name(number)).view))
    return found


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
