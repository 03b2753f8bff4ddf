"""Fixtures for the tests of the arena."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from heapd.arena import Arena
from tests.arenas import Commits, private_arena


@pytest.fixture
def arena() -> Iterator[Arena]:
    """256 MiB of address space, 200 MiB of which may be committed."""
    with private_arena() as arena:
        yield arena


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    """Commits that can be made to fail."""
    return Commits(monkeypatch)
