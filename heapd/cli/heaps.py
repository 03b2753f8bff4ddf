"""`heapd heaps`: every heap of the daemon, how it was made and what it holds; on request block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from typing import Final

import click
from rich.text import Text

import heapd_client as hc
from heapd.cli.params import endpoint_option, json_option
from heapd.cli.tables import (
    console,
    flag_legend,
    flag_letters,
    flag_names,
    heap_title,
    make_table,
    opened_info,
    print_json,
    size_text,
)
from heapd.errors import HeapDestroyedError, NoSuchHeapError
from heapd.records import Entry, EntryKind, HeapInfo, HeapStatistics
from heapd.units import format_size
from heapd.wire import Endpoint

__all__ = ["heaps"]

_LINES_AT_ONCE: Final = 500  # each echo flushes


@click.command("heaps")
@click.option(
    "--pid", type=click.IntRange(1, 2**31 - 1), help="Only the heaps that this process has open, its default first."
)
@click.option("--blocks", is_flag=True, help="Also every allocated block's address and size.")
@json_option
@endpoint_option
def heaps(pid: int | None, blocks: bool, as_json: bool, endpoint: Endpoint) -> None:
    """List the heaps and what they hold.

    open: in how many sessions. fixed: it does not grow beyond that. orphaned: blocks whose session has ended.
    """
    with hc.connect(str(endpoint), autostart=False) as session:
        found = list(_with_statistics(session, session.heaps(pid)))
        if as_json:
            print_json([_plain(session, info, statistics, blocks) for info, statistics in found])
        elif found:
            _print(found)
            if blocks:
                _print_blocks(session, [info for info, _ in found])
        else:
            console().print(f"process {pid} has no heap open" if pid else "no heaps")


def _with_statistics(session: hc.Session, infos: list[HeapInfo]) -> Iterator[tuple[HeapInfo, HeapStatistics]]:
    for info in infos:
        with suppress(NoSuchHeapError, HeapDestroyedError), opened_info(session, info) as heap:  # gone meanwhile: skip
            yield info, heap.statistics()


def _blocks(session: hc.Session, info: HeapInfo) -> Iterator[Entry]:
    """The allocated blocks of a heap; they end where it is destroyed meanwhile."""
    with suppress(NoSuchHeapError, HeapDestroyedError), opened_info(session, info) as heap:
        yield from (entry for entry in session.walk(heap.id) if entry.kind is EntryKind.BUSY)


def _plain(session: hc.Session, info: HeapInfo, statistics: HeapStatistics, has_blocks: bool) -> dict[str, object]:
    plain: dict[str, object] = {**asdict(info), "options": flag_names(info), "statistics": asdict(statistics)}
    if has_blocks:
        kept = ("address", "size", "extent", "session", "orphaned")
        plain["blocks"] = [{name: getattr(entry, name) for name in kept} for entry in _blocks(session, info)]
    return plain


def _print_blocks(session: hc.Session, infos: list[HeapInfo]) -> None:
    """Address and size (bytes) of every block, heap by heap; a million lines are no problem."""
    for info in infos:
        click.echo(f"\nheap {info.heap_id}, {heap_title(info)}")
        count = size = 0
        blocks = _blocks(session, info)
        while chunk := list(islice(blocks, _LINES_AT_ONCE)):
            count += len(chunk)
            size += sum(entry.size for entry in chunk)
            click.echo("\n".join(f"  {entry.address:#14x} {entry.size:>14}{_note(entry)}" for entry in chunk))
        click.echo(f"  {count:,} blocks, {format_size(size)}")


def _note(entry: Entry) -> str:
    return "  orphaned" if entry.orphaned else ""


def _print(found: list[tuple[HeapInfo, HeapStatistics]]) -> None:
    table = make_table("heap", "id", "options", "open", "reserved", "committed", "busy", "blocks", left=3)
    for info, statistics in found:
        table.add_row(
            Text(heap_title(info)),
            str(info.heap_id),
            flag_letters(info),
            str(info.sessions),
            format_size(statistics.reserved) + (" fixed" if info.maximum else ""),
            size_text(statistics.committed),
            size_text(statistics.busy),
            f"{statistics.busy_blocks:,}"
            + (f" ({statistics.orphaned_blocks:,} orphaned)" if statistics.orphaned_blocks else ""),
        )
    console().print(table)
    legend = flag_legend(info for info, _ in found)
    if legend:
        console().print(f"options: {legend}")
