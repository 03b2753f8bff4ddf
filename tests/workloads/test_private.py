"""A daemon of one's own: up inside the block, gone after it, whatever happens inside."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.workloads import WorkloadError
from heapd.workloads.private import private_daemon, terminations_raise
from tests.harness import unique_name


def test_the_daemon_answers_inside_and_leaves_nothing() -> None:
    """It serves inside the block; afterwards neither segment nor folder is there."""
    with private_daemon(unique_name()) as endpoint, hc.connect(endpoint, autostart=False) as session:
        segment = Path("/dev/shm") / session.arena.name
        assert segment.exists()
        folder = Path(endpoint.removeprefix("ipc://")).parent
    assert not segment.exists()
    assert not folder.exists()


def test_an_error_inside_stops_the_daemon_too() -> None:
    """The error comes out as it is, and the segment is gone."""
    segments: list[str] = []
    with pytest.raises(ZeroDivisionError), private_daemon(unique_name()) as endpoint:  # noqa: PT012
        segments.append(str(hc.daemon_status(endpoint)["segment"]))
        raise ZeroDivisionError
    assert not (Path("/dev/shm") / segments[0]).exists()


def test_a_daemon_that_was_killed_leaves_nothing_either() -> None:
    """Its segment is removed although it could not do that itself."""
    with private_daemon(unique_name()) as endpoint:
        status = hc.daemon_status(endpoint)
        os.kill(int(status["pid"]), signal.SIGKILL)
    assert not (Path("/dev/shm") / str(status["segment"])).exists()


def test_a_daemon_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of what it wrote is in the error."""
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(WorkloadError, match="the daemon ended with exit code 1"), private_daemon(unique_name()):
        pytest.fail("there is no daemon")


def test_terminations_end_the_block_through_its_cleanup() -> None:
    """SIGTERM raises SystemExit(143) inside, and is as before afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, terminations_raise():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_folder_is_the_system_s_temporary_one() -> None:
    """TMPDIR is honoured, so that nothing is written elsewhere."""
    with private_daemon(unique_name()) as endpoint:
        assert endpoint.startswith(f"ipc://{tempfile.gettempdir()}/heapd-")
