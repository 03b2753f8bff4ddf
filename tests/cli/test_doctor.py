"""`heapd doctor`: lines for people, JSON for programs, an exit status for scripts."""

from __future__ import annotations

import pytest

from heapd.cli import doctor
from heapd.server import Finding
from tests.cli.conftest import Heapd

FINDINGS = [
    Finding("python", "ok", "CPython 3.11"),
    Finding("memory", "warning", "little", "add some"),
    Finding("kernel", "problem", "none", "install [one]"),
]


def test_a_sound_machine_has_exit_status_0(heapd: Heapd) -> None:
    """This one: a daemon runs in the next test. Each check has a line."""
    out = heapd("doctor").out
    for check in ("python", "kernel", "locks", "shared memory", "descriptors", "directory", "leftovers"):
        assert check in out
    assert "0 problems" in out


@pytest.mark.parametrize(("count", "status"), [(1, 0), (2, 0), (3, 1)])
def test_problems_alone_make_it_fail(heapd: Heapd, monkeypatch: pytest.MonkeyPatch, count: int, status: int) -> None:
    """A warning is for people to read, a problem is for a script to stop at."""
    monkeypatch.setattr(doctor, "check_up", lambda: iter(FINDINGS[:count]))
    out = heapd("doctor", status=status).out
    assert ("1 problem, 1 warning, 1 in order" in out) == (count == 3)
    for finding in FINDINGS[:count]:
        assert finding.found in out
        assert finding.advice in out


def test_programs_get_it_as_json(heapd: Heapd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every finding with its four fields."""
    monkeypatch.setattr(doctor, "check_up", lambda: iter(FINDINGS))
    answer = heapd("doctor", "--json", status=1).json
    assert answer[1] == {"check": "memory", "level": "warning", "found": "little", "advice": "add some"}
    assert len(answer) == 3
