"""Processes that wait for orders."""

from __future__ import annotations

from typing import Any

import pytest

from heapd.workloads.crew import Crew, Duty
from heapd.workloads.team import WorkloadError


def member(answer: str) -> Duty:
    """A member that answers, fails or dies, as told."""

    def duty(order: Any, begin: int) -> str:
        if order == "fail":
            raise WorkloadError("it was told to")
        if order == "die":
            raise SystemExit(3)
        return f"{answer} {order}"

    return duty


def test_a_crew_does_one_order_after_another() -> None:
    """Each order goes to as many members as asked, and each of them answers."""
    with Crew(2, member, "yes") as crew:
        assert crew.run("one", 1, 0.0) == ["yes one"]
        assert crew.run("two", 2, 0.0) == ["yes two", "yes two"]


@pytest.mark.parametrize(("order", "complaint"), [("fail", "it was told to"), ("die", "died")])
def test_a_member_that_fails_is_told_of(order: str, complaint: str) -> None:
    """A member that raises, and one that dies, end the measurement with a sentence, and no process is left."""
    with pytest.raises(WorkloadError, match=complaint), Crew(2, member, "yes") as crew:
        crew.run(order, 2, 0.0)
