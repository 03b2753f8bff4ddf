"""Arenas of a test's own, and commits that fail when the test says so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any, TypeVar

import pytest

from heapd.arena import Arena, remove_segment
from heapd.errors import HeapFullError
from heapd.units import MIB
from tests.harness import unique_name

Stage = TypeVar("Stage")

RESERVE = 256 * MIB


@contextmanager
def private_arena(*, reserve: int = RESERVE, commit_limit: int | None = 200 * MIB) -> Iterator[Arena]:
    """An arena in a segment of its own, always unlinked."""
    name = f"heapd-{unique_name()}"
    arena = Arena.create(name, reserve=reserve, commit_limit=commit_limit)
    try:
        yield arena
    finally:
        if remove_segment(name):
            arena.segment.close()


def finish(outcome: Any, between: Callable[[], object] = lambda: None) -> Any:
    """The answer of an operation: what it returned, or what its job returns once it has run to the end.

    `between` is called at every pause of the job, as others' requests are.
    """
    if not isinstance(outcome, Generator):
        return outcome
    while True:
        try:
            next(outcome)
        except StopIteration as end:
            return end.value
        between()


class Commits:
    """Stands in for posix_fallocate: counts calls, and fails those it is told to with ENOSPC, as a full tmpfs does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = os.posix_fallocate
        self._fails: Callable[[int], bool] = lambda number: False
        self.calls = 0
        self.failed = 0
        monkeypatch.setattr(os, "posix_fallocate", self)

    def __call__(self, fd: int, offset: int, size: int) -> None:
        self.calls += 1
        if self._fails(self.calls):
            self.failed += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._real(fd, offset, size)

    def fail(self, nth: int, *, persistent: bool) -> None:
        """Fail the `nth` call from now on (1: the next), or that one and every later one."""
        self.calls = self.failed = 0
        self._fails = (lambda number: number >= nth) if persistent else (lambda number: number == nth)

    def work(self) -> None:
        """Fail no more."""
        self._fails = lambda number: False


def fail_each_commit(
    commits: Commits,
    stage: Callable[[], AbstractContextManager[Stage]],
    operate: Callable[[Stage], Any],
    look: Callable[[Stage], Any],
    check: Callable[[Stage], Any],
) -> int:
    """Fail the first commit of an operation, then the second, ... until none fails, once and from then on.

    Each time on a fresh stage: a failed operation must leave what `look` sees as it was and `check` content, and must
    succeed when it is done again. Returns: commits that were failed.
    """
    total = 0
    for persistent in (False, True):
        for nth in count(1):
            with stage() as it:
                before = look(it)
                commits.fail(nth, persistent=persistent)
                try:
                    operate(it)
                except HeapFullError:
                    commits.work()
                    check(it)
                    assert look(it) == before, f"commit {nth} failed (persistent: {persistent}) and left a trace"
                    operate(it)
                commits.work()
                check(it)
            if not commits.failed:
                break
            total += 1
    assert total, "the operation commits nothing: there is nothing to fail"
    return total
