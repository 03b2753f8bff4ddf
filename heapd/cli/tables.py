"""What the listing commands share: finding a heap, tables, JSON, bytes and flags as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import heapd_client as hc
from heapd.errors import HeapdError, NoSuchHeapError
from heapd.layout import (
    F_EXECUTABLE,
    F_FREE_CHECK,
    F_FREE_ORPHANS,
    F_GENERATE_EXCEPTIONS,
    F_PERSISTENT,
    F_SERIALIZE,
    F_TAIL_CHECK,
)
from heapd.records import HeapInfo, HeapStatistics
from heapd.units import format_size

__all__ = [
    "console",
    "find_heap",
    "flag_legend",
    "flag_letters",
    "flag_names",
    "heap_title",
    "make_table",
    "opened",
    "opened_info",
    "print_json",
    "size_text",
    "statistics_text",
]

_FLAGS = {  # letter, word
    F_SERIALIZE: ("s", "serialized"),
    F_PERSISTENT: ("p", "persistent"),
    F_EXECUTABLE: ("x", "executable"),
    F_GENERATE_EXCEPTIONS: ("e", "exceptions"),
    F_FREE_ORPHANS: ("o", "frees orphans"),
    F_TAIL_CHECK: ("t", "checks tails"),
    F_FREE_CHECK: ("f", "checks free blocks"),
}

_PARTS = ("busy", "padding", "cached", "free", "overhead")  # of what is committed


def console() -> Console:
    """The console on stdout; as wide as the terminal, 100 columns where there is none."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(found.width, 100))


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def make_table(*headings: str, title: str | None = None, left: int = 1) -> Table:
    """A table whose columns after the first `left` are right-aligned."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False
    )
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    return table


def size_text(size: int) -> str:
    """Bytes for a table; nothing for 0, so that what is there stands out."""
    return format_size(size) if size else "-"


def flag_names(info: HeapInfo) -> list[str]:
    """What a heap's flags say, as words."""
    return [word for flag, (_, word) in _FLAGS.items() if info.flags & flag]


def flag_letters(info: HeapInfo) -> str:
    """The same as one letter each, which `flag_legend` explains."""
    return "".join(letter for flag, (letter, _) in _FLAGS.items() if info.flags & flag) or "-"


def flag_legend(infos: Iterable[HeapInfo]) -> str:
    """What the letters mean that these heaps have."""
    flags = 0
    for info in infos:
        flags |= info.flags
    return ", ".join(f"{letter} {word}" for flag, (letter, word) in _FLAGS.items() if flags & flag)


def heap_title(info: HeapInfo) -> str:
    """How a heap is called on screen."""
    if info.name is not None:
        return info.name
    return f"(default of {info.creator})" if info.is_default else "(no name)"


def find_heap(session: hc.Session, text: str) -> HeapInfo:
    """The heap of that name, or else of that id.

    Raises: NoSuchHeapError that says what heaps there are.
    """
    infos = session.heaps()
    for info in infos:
        if info.name == text:
            return info
    for info in infos:
        if str(info.heap_id) == text:
            return info
    names = [info.name or str(info.heap_id) for info in infos]
    known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
    raise NoSuchHeapError(f"there is no heap {text[:300]!r} by name or id; heaps here: {known}")


@contextmanager
def opened_info(session: hc.Session, info: HeapInfo) -> Iterator[hc.Heap]:
    """A heap, opened to look at it and closed again; after an error by the session: who is lost is waited for once."""
    heap = session.open_heap_id(info.heap_id)
    yield heap
    with suppress(HeapdError):  # it may have gone meanwhile
        heap.close()


@contextmanager
def opened(session: hc.Session, text: str) -> Iterator[hc.Heap]:
    """A heap by name or id, opened to look at it and closed again."""
    with opened_info(session, find_heap(session, text)) as heap:
        yield heap


def statistics_text(statistics: HeapStatistics) -> Text:
    """A heap's bytes as a sum, and its counts; as many lines as it takes."""
    parts = [f"{part} {format_size(getattr(statistics, part))}" for part in _PARTS if getattr(statistics, part)]
    return Text(
        f"reserved {format_size(statistics.reserved)} = committed {format_size(statistics.committed)} "
        f"+ uncommitted {format_size(statistics.uncommitted)}\n"
        f"committed = {' + '.join(parts) or 'nothing'}\n"
        f"{statistics.busy_blocks:,} blocks, {statistics.regions} regions, {statistics.slabs} slabs, "
        f"{statistics.runs} runs; lock taken {statistics.acquisitions:,} times, {statistics.contended:,} had to wait"
    )
