"""One daemon a module: these tests are about its clients, and starting one for each would take most of the time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import heapd_client as hc
from tests.harness import Daemon


@pytest.fixture
def session(shared_daemon: Daemon) -> Iterator[hc.Session]:
    """A session with the shared daemon, of this test alone."""
    with hc.connect(shared_daemon.endpoint, autostart=False) as session:
        yield session


@pytest.fixture
def heap(session: hc.Session) -> hc.Heap:
    """An anonymous, serialized heap."""
    return session.create_heap()


@pytest.fixture
def free_heap(session: hc.Session) -> hc.Heap:
    """An anonymous heap that is not serialized."""
    return session.create_heap(serialize=False)


@pytest.fixture
def other(shared_daemon: Daemon, session: hc.Session) -> Iterator[hc.Session]:
    """A second session, as another process would have it."""
    with hc.connect(shared_daemon.endpoint, autostart=False) as other:
        yield other


@pytest.fixture(params=["serialized", "unserialized"])
def shared(request: pytest.FixtureRequest, session: hc.Session) -> hc.Heap:
    """A heap that others may open by its name, "shared"."""
    return session.create_heap("shared", serialize=request.param == "serialized")


@pytest.fixture
def theirs(other: hc.Session, shared: hc.Heap) -> hc.Heap:
    """The shared heap, in the other session."""
    return other.open_heap("shared")
