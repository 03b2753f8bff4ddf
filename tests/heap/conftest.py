"""Fixtures for the tests of one heap."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest

from heapd.arena import Arena
from heapd.heap import Heap
from tests.arenas import Commits, private_arena


class MakeHeap(Protocol):
    """Makes a heap with the options of Heap; each has a control block of its own."""

    def __call__(self, *, initial: int = 0, maximum: int = 0, reserve: int = 0, max_block: int = 0) -> Heap: ...


@pytest.fixture
def arena() -> Iterator[Arena]:
    """256 MiB of address space, 200 MiB of which may be committed."""
    with private_arena() as arena:
        yield arena


@pytest.fixture
def make_heap(arena: Arena) -> MakeHeap:
    made = 0

    def make(*, initial: int = 0, maximum: int = 0, reserve: int = 0, max_block: int = 0) -> Heap:
        nonlocal made
        arena.prepare_control(made)
        made += 1
        return Heap(arena, made - 1, initial=initial, maximum=maximum, reserve=reserve, max_block=max_block)

    return make


@pytest.fixture
def heap(make_heap: MakeHeap) -> Heap:
    """A growable heap with nothing in it."""
    return make_heap()


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Commits:
    """Commits that can be made to fail."""
    return Commits(monkeypatch)
