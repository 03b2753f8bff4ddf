"""One daemon a module, and this process attached to it anew for each test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from heapd_client import win32
from tests.harness import Daemon, mark_run, unique_name


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """A daemon that the module's tests share; it must end cleanly after them."""
    mark_run()
    directory = Path(tempfile.mkdtemp(prefix="heapd-", dir="/tmp"))
    daemon = Daemon(directory, unique_name())
    daemon.status()
    yield daemon
    daemon.check_clean_end()
    shutil.rmtree(directory)


@pytest.fixture
def attached(shared_daemon: Daemon) -> Iterator[str]:
    """This process is attached to the shared daemon; its endpoint."""
    win32.attach(shared_daemon.endpoint)
    win32.SetLastError(0)
    yield shared_daemon.endpoint
    win32.detach()


@pytest.fixture
def heap(attached: str) -> int:
    """A growable heap, just made."""
    return win32.HeapCreate(0, 0, 0)
