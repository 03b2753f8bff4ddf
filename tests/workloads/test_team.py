"""Teams of processes: results come back, failures have names, nobody is left running."""

from __future__ import annotations

import os
import signal
import time

import pytest

from heapd.workloads import WorkloadError
from heapd.workloads.team import Line, Team


def _work(line: Line, result: bytes, count: int) -> None:
    line.wait_go()
    for _ in range(count):
        line.progress(1)
    line.done(result)


def _fail(line: Line) -> None:
    line.wait_go()
    raise OSError("the disk is gone")


def _die(line: Line) -> None:
    line.wait_go()
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(line: Line) -> None:
    raise SystemExit(3)


def _hang(line: Line) -> None:
    line.wait_go()
    time.sleep(1000)


def _says_whether_interrupts_are_blocked(line: Line) -> None:
    line.wait_go()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    line.done(b"blocked" if signal.SIGINT in blocked else b"open")


def test_results_and_progress_come_back() -> None:
    """Each member's result by its name; the progress adds up to the last unit."""
    counts: list[int] = []
    with Team() as team:
        team.start("a", _work, b"A", 100)
        team.start("b", _work, b"B", 7)
        team.wait_ready()
        seconds, results = team.run(counts.append)
    assert results == {"a": b"A", "b": b"B"}
    assert sum(counts) == 107
    assert seconds > 0


@pytest.mark.parametrize(
    ("target", "message"), [(_fail, "bad: the disk is gone"), (_die, r"bad died \(killed by SIGKILL\)")]
)
def test_a_member_that_fails_is_named_and_the_others_end(target: object, message: str) -> None:
    """The error says who and why; the one that hangs is ended too (leakcheck)."""
    with pytest.raises(WorkloadError, match=message), Team() as team:  # noqa: PT012
        team.start("bad", target, *())  # type: ignore[arg-type]
        team.start("hangs", _hang)
        team.wait_ready()
        team.run(lambda count: None)


def test_a_member_that_ends_early_is_named() -> None:
    """An exit before it was ready is noticed while waiting for it."""
    with pytest.raises(WorkloadError, match=r"early died \(exit code 3\)"), Team() as team:  # noqa: PT012
        team.start("early", _leave)
        team.wait_ready()


def test_members_never_see_ctrl_c() -> None:
    """SIGINT is blocked in every member, the first included, and not in the parent afterwards."""
    with Team() as team:
        for name in "abc":
            team.start(name, _says_whether_interrupts_are_blocked)
        team.wait_ready()
        _, results = team.run(lambda count: None)
    assert set(results.values()) == {b"blocked"}
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
