"""A daemon started by its first client."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import heapd_client as hc
from heapd_client import autostart, errors
from tests.client.programs import run
from tests.harness import wait_until


@pytest.fixture
def endpoint(runtime_dir: Path) -> Iterator[str]:
    """An endpoint where nobody is; a daemon started there is stopped."""
    endpoint = f"ipc://{runtime_dir}/auto"
    yield endpoint
    try:
        hc.stop_daemon(endpoint)
    except errors.DaemonError:
        return


def test_a_missing_daemon_is_started(endpoint: str) -> None:
    """connect starts one; it outlives the client's call, is nobody's child and keeps no terminal."""
    with hc.connect(endpoint) as session:
        with session.create_heap().alloc(8) as block:
            block.view[:] = b"it works"
        stat = Path(f"/proc/{session.daemon_pid}/stat").read_text().rpartition(")")[2].split()
        assert int(stat[1]) != os.getpid()
        assert int(stat[3]) != os.getsid(0)
        pid = session.daemon_pid
    with hc.connect(endpoint, autostart=False) as again:
        assert again.daemon_pid == pid


def test_a_daemon_that_was_started_so_is_supervised(endpoint: str) -> None:
    """Its server is started again when it dies, and its clients go on."""
    with hc.connect(endpoint) as session:
        heap = session.create_heap()
        block = heap.alloc(100)
        block.view[:4] = b"kept"
        os.kill(session.daemon_pid, signal.SIGKILL)
        assert heap.validate() == []
        assert session.incarnation == 2
        assert session.open(block.handle).view[:4] == b"kept"


def test_a_daemon_is_started_with_its_directory(runtime_dir: Path) -> None:
    """The runtime directory is made, for this user alone, if it is not there."""
    where = runtime_dir / "new"
    endpoint = f"ipc://{where}/auto"
    with hc.connect(endpoint):
        assert where.stat().st_mode & 0o777 == 0o700
    hc.stop_daemon(endpoint)


def test_several_starters_get_one_daemon(endpoint: str) -> None:
    """However many start at once, they meet at the same daemon."""
    import subprocess
    import sys

    program = (
        "import sys, heapd_client as hc\nwith hc.connect(sys.argv[1], timeout=40) as session: print(session.daemon_pid)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", program, endpoint],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(5)
    ]
    answers = [starter.communicate(timeout=60) for starter in starters]
    assert len({output for output, _ in answers}) == 1, answers
    assert all(not complaint for _, complaint in answers), answers


def test_a_started_daemon_ends_when_idle(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some seconds after its last session it is gone, segment and all."""
    monkeypatch.setattr(autostart, "IDLE_EXIT_S", 0.2)
    with hc.connect(endpoint) as session:
        segment = session.segment
    wait_until(lambda: segment not in os.listdir("/dev/shm"), 10)
    with pytest.raises(errors.DaemonNotFoundError):
        hc.connect(endpoint, autostart=False)


def test_a_program_that_started_one_ends_quietly(endpoint: str) -> None:
    """Nothing on stderr, no zombie, no waiting."""
    done = run("import sys, heapd_client as hc; session = hc.connect(sys.argv[1]); print('ok')", endpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def test_a_directory_that_cannot_be_trusted_is_refused(runtime_dir: Path) -> None:
    """One that others may write to, or a link: nothing is started there."""
    where = runtime_dir / "open"
    where.mkdir(mode=0o777)
    where.chmod(0o777)
    with pytest.raises(errors.SegmentError):
        hc.connect(f"ipc://{where}/auto")
    (runtime_dir / "link").symlink_to(runtime_dir)
    with pytest.raises(errors.SegmentError):
        hc.connect(f"ipc://{runtime_dir}/link/auto")


def test_a_daemon_that_does_not_come_up_is_explained(
    endpoint: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error carries the last line of its log."""
    monkeypatch.setattr(autostart, "IDLE_EXIT_S", "nonsense")
    with pytest.raises(errors.DaemonNotFoundError, match="idle-exit"):
        hc.connect(endpoint)


@pytest.mark.parametrize("obstacle", ["directory", "symlink"])
def test_a_log_that_cannot_be_written_is_named(runtime_dir: Path, endpoint: str, obstacle: str) -> None:
    """No daemon is started whose words nobody could read."""
    log = Path(f"{endpoint.removeprefix('ipc://')}.log")
    if obstacle == "directory":
        log.mkdir()
    else:
        log.symlink_to("/nonexistent")
    with pytest.raises(errors.DaemonNotFoundError, match=f"none could be started: its log {log} cannot be written: "):
        hc.connect(endpoint)


def test_a_system_that_starts_no_process_is_told_of(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its reason."""

    def refuse(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.run", refuse)
    with pytest.raises(errors.DaemonNotFoundError, match=r"none could be started: .*Resource temporarily unavailable"):
        hc.connect(endpoint)
