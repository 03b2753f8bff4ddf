"""`heapd stress`: a short run, its JSON, and what users do wrong."""

from __future__ import annotations

import pytest

import heapd_client as hc
from tests.cli.conftest import Heapd
from tests.harness import Daemon


@pytest.mark.usefixtures("runtime_dir")
def test_a_short_stress_run_is_clean(heapd: Heapd) -> None:
    """Four clients, two seconds: operations of every kind, no fault, status 0."""
    answer = heapd("stress", "--clients", 4, "--seconds", 2, "--seed", 7, "--json").json
    assert answer["faults"] == []
    assert answer["is_clean"] is True
    assert answer["operations"] > 100
    assert {"alloc", "free", "write", "check", "realloc", "open", "lock"} <= set(answer["latencies"])
    for figures in answer["latencies"].values():
        assert 0 < figures["p50_ns"] <= figures["p90_ns"] <= figures["p99_ns"] <= figures["max_ns"]
    assert answer["counts"]["handed over"] == answer["counts"]["taken over"] > 0
    assert answer["counts"]["stale handles refused"] > 0


def test_stress_on_a_running_daemon_leaves_it_as_it_was(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """With --endpoint no daemon is started; the run's heaps are gone afterwards, others stay."""
    session.create_heap("mine").alloc(10)
    out = heapd("stress", "--clients", 2, "--seconds", 0.3, "--heaps", 1, "-e", daemon.endpoint).out
    assert "0 errors; 1 heaps validated, 0 slabs and runs left" in out
    assert [info.name for info in session.heaps()] == ["mine"]


def test_one_client_alone_is_fine(heapd: Heapd, daemon: Daemon) -> None:
    """With nobody to hand blocks to the rest still runs."""
    assert heapd("stress", "--clients", 1, "--seconds", 0.2, "-e", daemon.endpoint, "--json").json["faults"] == []


@pytest.mark.parametrize(
    "arguments", [("--clients", "501"), ("--clients", "0"), ("--seconds", "0"), ("--seed", "x"), ("--heaps", "0")]
)
def test_figures_out_of_range_are_refused(heapd: Heapd, arguments: tuple[str, ...]) -> None:
    """Status 2 and the allowed range, before anything is started."""
    assert "Invalid value" in heapd("stress", *arguments, status=2).err


@pytest.mark.usefixtures("runtime_dir")
def test_stress_without_the_daemon_it_was_told_to_use_says_so(heapd: Heapd) -> None:
    """An endpoint where nobody answers: status 3."""
    assert "no daemon answers" in heapd("stress", "-e", "nobody", status=3).err
