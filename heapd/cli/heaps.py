"""`heapd heaps`: every heap of the daemon, how it was made and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

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
from heapd.records import HeapInfo, HeapStatistics
from heapd.units import format_size
from heapd.wire import Endpoint

__all__ = ["heaps"]


@click.command("heaps")
@click.option("--pid", type=click.IntRange(min=1), help="Only the heaps that this process has open, its default first.")
@json_option
@endpoint_option
def heaps(pid: int | None, as_json: bool, endpoint: Endpoint) -> None:
    """List the heaps and what they hold.

    open: in how many sessions. fixed: it does not grow beyond that. orphaned: blocks whose session has ended.
    """
    with hc.connect(str(endpoint), autostart=False) as session:
        found = list(_with_statistics(session, session.heaps(pid)))
    if as_json:
        print_json([_plain(info, statistics) for info, statistics in found])
    elif found:
        _print(found)
    else:
        console().print(f"process {pid} has no heap open" if pid else "no heaps")


def _with_statistics(session: hc.Session, infos: list[HeapInfo]) -> Iterator[tuple[HeapInfo, HeapStatistics]]:
    for info in infos:
        with suppress(NoSuchHeapError, HeapDestroyedError), opened_info(session, info) as heap:  # gone meanwhile: skip
            yield info, heap.statistics()


def _plain(info: HeapInfo, statistics: HeapStatistics) -> dict[str, object]:
    return {**asdict(info), "options": flag_names(info), "statistics": asdict(statistics)}


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
