"""The stress run's own faults are found: what it would overlook, nobody would see."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import heapd_client as hc
from heapd.workloads import stress_client
from heapd.workloads.board import Board, Phase, Row, board_size
from heapd.workloads.latency import Histogram
from heapd.workloads.stress import Progress, bytes_a_client, run_stress
from heapd.workloads.stress_client import CONTROL_HEAP, Plan, Report, StressClient, heap_name
from tests.harness import Daemon


def _plan(daemon: Daemon, **changes: float) -> Plan:
    figures: dict[str, float] = {"clients": 2, "seconds": 0.3, "seed": 5, "heaps": 2, "most_bytes": 1 << 20, **changes}
    whole = {name: int(value) for name, value in figures.items() if name != "seconds"}
    return Plan(daemon.endpoint, seconds=figures["seconds"], **whole)


@pytest.fixture
def client(daemon: Daemon, session: hc.Session) -> StressClient:
    """A client of a plan for one, in this process."""
    plan = _plan(daemon, clients=1)
    control = session.create_heap(CONTROL_HEAP)
    for number in range(plan.heaps):
        session.create_heap(heap_name(number), serialize=number == 0)
    control.publish("board", control.alloc(board_size(1, plan.heaps), zero=True))
    return StressClient(plan, 0, session, control)


def done(client: StressClient) -> dict[str, int]:
    """How often a client has done what. Whether a run has room to grow is up to where it lies."""
    counts = {kind: histogram.count for kind, histogram in client.report.latencies.items()}
    counts["realloc"] += client.report.counts.get("refused: resize in place", 0)
    return counts


def test_a_thousand_steps_are_clean_and_follow_from_the_seed(daemon: Daemon, client: StressClient) -> None:
    """No fault in any operation; the counts of what was done are those of another run with the same seed."""
    for _ in range(1000):
        client.step()
    assert client.report.errors == []
    counts = done(client)
    with hc.connect(daemon.endpoint, autostart=False) as session:
        again = StressClient(_plan(daemon, clients=1), 0, session, session.open_heap(CONTROL_HEAP))
        for _ in range(1000):
            again.step()
    assert done(again) == counts


def test_a_scribbled_block_is_found(client: StressClient) -> None:
    """A byte that somebody else changed is an error that names the client, and the block is dropped."""
    while not client._held:
        client.step()
    victim = client._held[0]
    victim.block.view[40] ^= 1
    for _ in range(300):
        client.step()
        if client.report.errors:
            break
    (error,) = client.report.errors
    assert error.startswith("client 0: ")
    assert "CheckError" in error
    assert victim not in client._held


def test_a_full_heap_is_no_error(daemon: Daemon, session: hc.Session) -> None:
    """A refused allocation is counted, and the client makes room and goes on."""
    plan = _plan(daemon, clients=1, heaps=1, most_bytes=1 << 22)
    control = session.create_heap(CONTROL_HEAP)
    session.create_heap(heap_name(0), maximum=256 * 1024)
    control.publish("board", control.alloc(board_size(1, 1), zero=True))
    client = StressClient(plan, 0, session, control)
    for _ in range(600):
        client.step()
    assert client.report.counts["refused: memory full"] > 0
    assert client.report.errors == []


def test_a_client_that_is_killed_is_reported(daemon: Daemon) -> None:
    """The run goes on to its end without it, and says which client died of what."""
    plan = _plan(daemon, clients=3, seconds=1.0)
    victims: list[int] = []

    def kill_one(now: Progress) -> None:
        if now.phase == "run" and not victims:
            with hc.connect(daemon.endpoint, autostart=False) as session:
                pids = sorted({info.pid for info in session.sessions()} - {os.getpid()})
            victims.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    outcome = run_stress(plan, kill_one)
    assert not outcome.is_clean
    assert any("was killed by SIGKILL" in text for text in outcome.dead)
    assert len(outcome.dead) == 1


def test_a_client_that_cannot_start_says_why(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the heaps it needs, run_client ends with 1 and a sentence, no traceback."""
    monkeypatch.setattr(stress_client, "PATIENCE_S", 1.0)
    assert stress_client.run_client(_plan(daemon), 0) == 1
    err = capsys.readouterr().err
    assert err.startswith("client 0: NoSuchHeapError")
    assert "Traceback" not in err


def test_a_lock_that_excludes_nobody_would_be_found(daemon: Daemon) -> None:
    """The guard's count and the clients' own sums are compared: what was lost is a fault of that heap."""
    stop = threading.Event()

    def meddle(now: Progress) -> None:
        if now.phase == "finish" and not stop.is_set():
            stop.set()
            with hc.connect(daemon.endpoint, autostart=False) as session:
                view = session.open_heap(CONTROL_HEAP).lookup("board").view
                view.cast("Q")[(2 + 0) * 8] -= 1  # the first guard, behind two rows
                del view

    outcome = run_stress(_plan(daemon, seconds=0.5), meddle)
    assert [heap.lost_increments for heap in outcome.heaps] == [1, 0]
    assert not outcome.is_clean


def test_reports_survive_the_way_through_a_block() -> None:
    """JSON and back is the same; merging adds."""
    report = Report({"alloc": Histogram({5: 2}, 2, 5)}, {"handed over": 3}, ["client 1: x"])
    assert Report.from_json(report.to_json()) == report
    report.merge(Report.from_json(report.to_json()))
    assert report.latencies["alloc"].count == 4
    assert report.counts == {"handed over": 6}
    assert len(report.errors) == 2


def test_all_clients_together_stay_under_half_of_shared_memory() -> None:
    """More clients get less each."""
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    assert bytes_a_client(500) * 500 <= max(free // 2, 500 * 4096)
    assert bytes_a_client(1) >= bytes_a_client(500)


def test_the_board_of_a_run_fits_its_phases() -> None:
    """The parent writes ENDED for a client that died, so that the others stop waiting for it."""
    view = memoryview(bytearray(board_size(2, 1)))
    board = Board(view, 2, 1)
    board.put(0, Row.PHASE, Phase.FREED)
    board.put(1, Row.PHASE, Phase.ENDED)
    assert board.all_reached(Phase.FREED)
