"""Each test of this folder runs over every subject."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest

import heapd_client as hc
from tests.arenas import private_arena
from tests.conformance.subjects import InProcess, OverDaemon, Subject
from tests.harness import Daemon


class MakeSubject(Protocol):
    """Makes the one heap of a test."""

    def __call__(self, *, maximum: int = 0, max_block: int = 0) -> Subject: ...


@pytest.fixture(params=["in process", "serialized", "unserialized"])
def make_subject(request: pytest.FixtureRequest, shared_daemon: Daemon) -> Iterator[MakeSubject]:
    with ExitStack() as stack:

        def make(*, maximum: int = 0, max_block: int = 0) -> Subject:
            if request.param == "in process":
                return InProcess(stack.enter_context(private_arena()), maximum=maximum, max_block=max_block)
            session = stack.enter_context(hc.connect(shared_daemon.endpoint, autostart=False))
            serialize = request.param == "serialized"
            return OverDaemon(session.create_heap(maximum=maximum, max_block=max_block, serialize=serialize))

        yield make


@pytest.fixture
def subject(make_subject: MakeSubject) -> Subject:
    """A growable heap with nothing in it."""
    return make_subject()
