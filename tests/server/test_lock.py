"""The lock that keeps daemons single."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from heapd.errors import DaemonRunningError, SegmentError
from heapd.server.credentials import start_time_of
from heapd.server.lock import DaemonLock
from heapd.wire import Endpoint


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(str(tmp_path), "x")


def test_the_second_is_told_who_holds_it(endpoint: Endpoint) -> None:
    """By process id."""
    lock = DaemonLock.acquire(endpoint)
    with pytest.raises(DaemonRunningError, match=f"process {os.getpid()} serves {endpoint}") as caught:
        DaemonLock.acquire(endpoint)
    assert caught.value.details["pid"] == os.getpid()
    lock.release()


def test_a_released_lock_leaves_no_file(endpoint: Endpoint) -> None:
    """And can be taken again, and released twice."""
    lock = DaemonLock.acquire(endpoint)
    lock.release()
    lock.release()
    assert not os.path.exists(endpoint.lock_path)
    DaemonLock.acquire(endpoint).release()


def test_the_lock_of_a_dead_process_is_free(endpoint: Endpoint) -> None:
    """The kernel lets it go; the file with the old process id is left and taken over."""
    program = (
        "import os, sys; from heapd.server.lock import DaemonLock; from heapd.wire import Endpoint\n"
        "DaemonLock.acquire(Endpoint(sys.argv[1], 'x')); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, endpoint.directory], cwd=Path(__file__).parents[2], check=False)
    assert os.path.exists(endpoint.lock_path)
    lock = DaemonLock.acquire(endpoint)
    assert endpoint.holder() == (os.getpid(), start_time_of(os.getpid()))
    lock.release()


def test_a_holder_that_has_not_written_who_it_is_is_another_process(endpoint: Endpoint) -> None:
    """Between locking and writing."""
    lock = DaemonLock.acquire(endpoint)
    Path(endpoint.lock_path).write_text("")
    with pytest.raises(DaemonRunningError, match="another process"):
        DaemonLock.acquire(endpoint)
    lock.release()


def test_a_holder_that_is_no_daemon_is_waited_for(endpoint: Endpoint) -> None:
    """`heapd gc` and `heapd doctor` hold it for a moment, which keeps no daemon from its start."""
    Path(endpoint.lock_path).write_text("")
    looking = os.open(endpoint.lock_path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    done = threading.Timer(0.2, os.close, [looking])
    done.start()
    try:
        DaemonLock.acquire(endpoint).release()
    finally:
        done.join()


def test_whoever_keeps_daemons_out_for_a_moment_is_none(endpoint: Endpoint) -> None:
    """Nobody is told that it serves, and who starts one then waits until it may."""
    lock = DaemonLock.acquire(endpoint, is_daemon=False)
    assert endpoint.holder() is None
    done = threading.Timer(0.2, lock.release)
    done.start()
    try:
        DaemonLock.acquire(endpoint).release()
    finally:
        done.join()


def test_a_lock_whose_file_was_removed_does_not_count(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opened the file just before its holder removed it has locked nothing, and begins again."""
    real = fcntl.flock
    removed: list[str] = []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        if not removed:
            removed.append(endpoint.lock_path)
            os.unlink(endpoint.lock_path)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = DaemonLock.acquire(endpoint)
    with pytest.raises(DaemonRunningError):
        DaemonLock.acquire(endpoint)
    lock.release()
    assert removed


def test_a_release_leaves_the_file_of_another(endpoint: Endpoint) -> None:
    """Somebody removed ours, and another daemon made a new one."""
    lock = DaemonLock.acquire(endpoint)
    os.unlink(endpoint.lock_path)
    other = DaemonLock.acquire(endpoint)
    lock.release()
    assert os.path.exists(endpoint.lock_path)
    other.release()


def test_a_symlink_in_the_files_place_is_refused(endpoint: Endpoint, tmp_path: Path) -> None:
    """What it points to is not touched."""
    (tmp_path / "mine").write_text("mine")
    os.symlink(tmp_path / "mine", endpoint.lock_path)
    with pytest.raises(SegmentError, match=r"cannot be opened: .*; remove what is there"):
        DaemonLock.acquire(endpoint)
    assert (tmp_path / "mine").read_text() == "mine"
