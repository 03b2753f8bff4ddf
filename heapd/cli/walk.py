"""`heapd walk HEAP`: every entry of a heap, region by region, written as it comes, so that a million is no problem."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import click

import heapd_client as hc
from heapd.cli.params import endpoint_option, json_option
from heapd.cli.tables import opened
from heapd.records import Entry, EntryKind
from heapd.units import format_size
from heapd.wire import Endpoint

__all__ = ["walk"]

_LINES_AT_ONCE = 500  # each echo flushes
_COLOURS = {
    EntryKind.REGION: "white",
    EntryKind.BUSY: "blue",
    EntryKind.FREE: "green",
    EntryKind.CACHED: "yellow",
    EntryKind.UNCOMMITTED: "bright_black",
    EntryKind.OVERHEAD: "bright_black",
}


@click.command("walk")
@click.argument("heap")
@click.option("--limit", type=click.IntRange(min=0), default=0, help="At most so many entries; 0: all.")
@json_option
@endpoint_option
def walk(heap: str, limit: int, as_json: bool, endpoint: Endpoint) -> None:
    """List the entries of HEAP (a name or an id): its regions, oldest first, each in address order.

    region: a reserved range. busy: an allocated block. free: committed, nobody's. cached: free, in a front end.
    uncommitted: reserved only. overhead: slab heads and remainders.
    orphaned: its session has ended.
    """
    with hc.connect(str(endpoint), autostart=False) as session, opened(session, heap) as found:
        entries = islice(session.walk(found.id), limit or None)
        if as_json:
            _print_json(entries)
        else:
            _print_lines(entries)


def _print_json(entries: Iterator[Entry]) -> None:
    """A JSON array, one entry a line."""
    click.echo("[", nl=False)
    for index, entry in enumerate(entries):
        plain = entry._asdict() | {"kind": EntryKind(entry.kind).name.lower()}
        click.echo((",\n " if index else "\n ") + json.dumps(plain), nl=False)
    click.echo("\n]")


def _print_lines(entries: Iterator[Entry]) -> None:
    counts: Counter[EntryKind] = Counter()
    sizes: Counter[EntryKind] = Counter()
    click.echo(f"{'kind':<11} {'address':>12} {'size':>11} {'extent':>11} {'session':>7} {'generation':>10}")
    while chunk := list(islice(entries, _LINES_AT_ONCE)):
        for entry in chunk:
            counts[entry.kind] += 1
            sizes[entry.kind] += entry.extent
        click.echo("\n".join(map(_line, chunk)))
    click.echo("\n".join(_sums(counts, sizes)))


def _line(entry: Entry) -> str:
    """Sizes in bytes, as they are; what is not there stays blank."""
    kind = entry.kind
    session = str(entry.session) if entry.session else ""
    generation = str(entry.generation) if entry.generation else ""
    text = f"{kind.name.lower():<11} {entry.address:>#12x} {entry.size:>11} {entry.extent:>11}"
    if kind is EntryKind.REGION:
        text += f" #{entry.region}, {format_size(entry.committed)} committed"
    else:
        text += f" {session:>7} {generation:>10}" + (" orphaned" if entry.orphaned else "")
    return click.style(text.rstrip(), fg=_COLOURS[kind], bold=kind is EntryKind.REGION)


def _sums(counts: Counter[EntryKind], sizes: Counter[EntryKind]) -> Iterator[str]:
    for kind, count in sorted(counts.items()):
        yield f"{count:,} {kind.name.lower()}, {format_size(sizes[kind])}"
