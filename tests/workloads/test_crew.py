"""Processes that wait for orders."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from heapd.workloads.crew import Crew, Duty, Start, pin, sleep_until
from heapd.workloads.team import WorkloadError


def member(index: int, answer: str) -> Duty:
    """A member that answers, fails or dies, as told, before or after it said that it was ready."""

    def duty(order: Any, start: Start) -> str:
        if order == "fail":
            raise WorkloadError("it was told to")
        start()
        if order == "die":
            raise SystemExit(3)
        return f"{answer} {order}"

    return duty


def test_a_crew_does_one_order_after_another() -> None:
    """Each order goes to as many members as asked, and each of them answers."""
    with Crew(2, member, "yes") as crew:
        assert crew.run("one", 1, 0.0) == ["yes one"]
        assert crew.run("two", 2, 0.0) == ["yes two", "yes two"]


def first_fails(index: int) -> Duty:
    """A member that fails if it is the first to make the file that the order names."""

    def duty(order: Any, start: Start) -> None:
        try:
            os.close(os.open(order, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            start()
        else:
            raise WorkloadError("it was the first")

    return duty


def test_members_that_wait_for_one_that_failed_end_quietly(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error names the member; the others are let go without a word."""
    with pytest.raises(WorkloadError, match="it was the first"), Crew(3, first_fails) as crew:
        crew.run(str(tmp_path / "first"), 3, 0.0)
    assert capfd.readouterr().err == ""


def slow_starter(index: int) -> Duty:
    """A member whose preparation takes as long as the order says; it tells when it was ready, and when it began."""

    def duty(order: Any, start: Start) -> tuple[int, int, int]:
        time.sleep(order * index)
        ready = time.monotonic_ns()
        begin = start()
        sleep_until(begin)
        return ready, begin, time.monotonic_ns()

    return duty


def test_members_begin_at_one_moment_when_all_are_ready() -> None:
    """However long some take to prepare: no member's time is over before another's begins."""
    with Crew(3, slow_starter) as crew:
        results = crew.run(0.1, 3, 0.0)
    assert len({begin for _, begin, _ in results}) == 1
    assert max(ready for ready, _, _ in results) < results[0][1]
    assert all(begin <= began for _, begin, began in results)


def pinned(index: int) -> Duty:
    """A member that says on which CPUs it may run, pinned and then not."""

    def duty(order: Any, start: Start) -> tuple[set[int], set[int]]:
        start()
        pin(index)
        alone = os.sched_getaffinity(0)
        pin(None)
        return alone, os.sched_getaffinity(0)

    return duty


def test_pinned_members_are_spread_over_the_cpus() -> None:
    """One after another has the next CPU to itself, in turn; not pinned any more it may use all."""
    usable = os.sched_getaffinity(0)
    with Crew(len(usable) + 1, pinned) as crew:
        results = crew.run("look", len(usable) + 1, 0.0)
    alone = [cpus for cpus, _ in results]
    assert set().union(*alone) == usable
    assert all(len(cpus) == 1 for cpus in alone)
    assert alone[0] == alone[-1]
    assert all(cpus == usable for _, cpus in results)


@pytest.mark.parametrize(("order", "complaint"), [("fail", "it was told to"), ("die", "died")])
def test_a_member_that_fails_is_told_of(order: str, complaint: str) -> None:
    """A member that raises, and one that dies, end the measurement with a sentence, and no process is left."""
    with pytest.raises(WorkloadError, match=complaint), Crew(2, member, "yes") as crew:
        crew.run(order, 2, 0.0)
