"""One daemon a module, and this process attached to it anew for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from heapd_client import win32
from tests.harness import Daemon


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
