"""Fixtures for the tests of the manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from heapd.arena import Arena
from heapd.manager import HeapManager, Limits
from tests.arenas import Commits, private_arena
from tests.invariants import check_manager
from tests.manager.clients import Client

NewClient = Callable[[], Client]


class Clock:
    """A clock that the test moves, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> int:
        return self.now

    def pass_ms(self, milliseconds: int) -> None:
        self.now += milliseconds * 1_000_000


@pytest.fixture
def arena() -> Iterator[Arena]:
    """256 MiB of address space, 200 MiB of which may be committed."""
    with private_arena() as arena:
        yield arena


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits() -> Limits:
    """The daemon's own; a test module may have others."""
    return Limits()


@pytest.fixture
def manager(arena: Arena, clock: Clock, limits: Limits) -> Iterator[HeapManager]:
    """A manager; after the test every invariant holds, and the end of all sessions leaves only persistent heaps."""
    manager = HeapManager(arena, clock=clock, limits=limits)
    yield manager
    check_manager(manager)
    for session in manager.sessions:
        for _ in manager.end_session(session):
            pass
    check_manager(manager)
    assert all(shared.is_persistent for shared in manager.heaps.values())


@pytest.fixture
def new_client(manager: HeapManager) -> NewClient:
    """Another client with a session of its own."""
    return lambda: Client(manager)


@pytest.fixture
def client(new_client: NewClient) -> Client:
    return new_client()


@pytest.fixture
def other(new_client: NewClient) -> Client:
    return new_client()


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    """Commits that can be made to fail."""
    return Commits(monkeypatch)
