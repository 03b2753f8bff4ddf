"""The facts of Win32 heap behaviour, as checks that any attached process can run, named by the ids of docs/win32.md.

Each check makes what it needs and gives it back, so that many can run at once over one daemon: a test each in
test_facts.py, and all of them in three processes at the same time.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Fact", "all_facts", "holds"]


@dataclass(frozen=True)
class Fact:
    """ids (that the check shows to hold), check (raises AssertionError if they do not)."""

    ids: tuple[str, ...]
    check: Callable[[], None]

    @property
    def name(self) -> str:
        return self.check.__name__


_found: list[Fact] = []


def holds(*ids: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Say of a function which facts it checks."""

    def note(check: Callable[[], None]) -> Callable[[], None]:
        _found.append(Fact(ids, check))
        return check

    return note


def all_facts() -> list[Fact]:
    """Every check of the modules of this package."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return list(_found)
