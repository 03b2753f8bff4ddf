"""Fixtures for all tests. What they are made of is in harness.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import harness

if TYPE_CHECKING:
    import heapd_client

harness.mark_run()

StartDaemon = Callable[..., harness.Daemon]


@pytest.fixture(autouse=True)
def leakcheck() -> Iterator[None]:
    """Fail a test that leaves a segment, a process or a ZeroMQ context that was not there before it."""
    before = harness.Traces.now()
    yield
    left = harness.Traces.now() - before
    if left:
        try:  # what was told to end may take a moment
            harness.wait_until(lambda: not (harness.Traces.now() - before), 3)
        except AssertionError:
            left = harness.Traces.now() - before
            left.remove()
            pytest.fail(f"the test left behind:\n{left}")


@pytest.fixture
def wait_until() -> Callable[..., Any]:
    """`wait_until(condition, deadline_s)`: poll until it is true; fail past the deadline."""
    return harness.wait_until


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty runtime directory with a path short enough for sockets; $HEAPD_RUNTIME_DIR names it."""
    path = Path(tempfile.mkdtemp(prefix="heapd-", dir="/tmp"))
    monkeypatch.setenv("HEAPD_RUNTIME_DIR", str(path))
    monkeypatch.delenv("HEAPD_ENDPOINT", raising=False)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def common_place() -> Iterator[Path]:
    """A directory that everybody can enter."""
    path = Path(tempfile.mkdtemp(prefix="heapd-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_daemon(runtime_dir: Path) -> Iterator[StartDaemon]:
    """`start_daemon("--commit-limit", "64MiB", name="x")`: a daemon that answers; each must end cleanly."""
    daemons: list[harness.Daemon] = []

    def start(*arguments: str, name: str | None = None) -> harness.Daemon:
        daemon = harness.Daemon(runtime_dir, name or harness.unique_name(), arguments)
        daemons.append(daemon)
        daemon.status()
        return daemon

    yield start
    failures = [failure for daemon in daemons if (failure := _end(daemon))]
    assert not failures, "\n".join(failures)


def _end(daemon: harness.Daemon) -> str:
    """Why the daemon did not end cleanly, "" if it did."""
    try:
        daemon.check_clean_end()
    except Exception as error:
        return f"{daemon.endpoint}: {error}"
    return ""


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> harness.Daemon:
    """A daemon of its own for the test."""
    return start_daemon()


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[harness.Daemon]:
    """A daemon that the module's tests share; it must end cleanly after them."""
    harness.mark_run()
    directory = Path(tempfile.mkdtemp(prefix="heapd-", dir="/tmp"))
    daemon = harness.Daemon(directory, harness.unique_name())
    daemon.status()
    yield daemon
    daemon.check_clean_end()
    shutil.rmtree(directory)


@pytest.fixture
def session(daemon: harness.Daemon) -> Iterator[heapd_client.Session]:
    """A session to `daemon`."""
    import heapd_client

    with heapd_client.connect(daemon.endpoint, autostart=False) as session:
        yield session
