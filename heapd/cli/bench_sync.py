"""`heapd bench sync`: pairs a second of processes and threads over shared and own heaps, and what waiting costs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from heapd.cli.exit_codes import OK
from heapd.cli.params import ENDPOINT, OUTPUT_FILE, Seconds, json_option
from heapd.cli.tables import console, make_table, print_json
from heapd.wire import Endpoint
from heapd.workloads import WorkloadError
from heapd.workloads import sync_bench as work
from heapd.workloads.machine import conditions
from heapd.workloads.private import private_daemon, terminations_raise

__all__ = ["sync"]

_DEFAULT_COUNTS = "1,2,4,8,16"
_MOST_WORKERS = 256
_NAMES = {"serialized": "serialized", "unserialized": "unserialized", "own": "one each"}  # short: 80 columns


def _numbers(text: str, most: int) -> tuple[int, ...]:
    """Numbers between commas, in order, each once."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers between commas") from None
    if not found or not 0 <= found[0] <= found[-1] <= most:
        raise click.BadParameter(f"each number is at least 0 and at most {most}")
    return tuple(found)


def _counts(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    found = _numbers(text, _MOST_WORKERS)
    if found[0] == 0:
        raise click.BadParameter("at least one process has to do the work")
    return found


def _holds(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    return _numbers(text, 1_000_000) if text else ()


@click.command()
@click.option(
    "--processes", "counts", default=_DEFAULT_COUNTS, show_default=True, callback=_counts, help="Also threads."
)
@click.option("--seconds", type=Seconds(0.01, 60), default=0.3, show_default=True, help="Each measurement.")
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True, help="The median one is shown.")
@click.option("--holds", default="0,10,100", show_default=True, callback=_holds, help="Microseconds the lock is held.")
@click.option("--svg", type=OUTPUT_FILE, help="Write the figure there.")
@click.option("--png", type=OUTPUT_FILE, help="Write the figure there.")
@click.option("--save", type=OUTPUT_FILE, help="Write the JSON there, too.")
@click.option("--endpoint", "-e", type=ENDPOINT, help="A running daemon.  [default: one of its own]")
@json_option
def sync(
    counts: tuple[int, ...],
    seconds: float,
    runs: int,
    holds: tuple[int, ...],
    svg: Path | None,
    png: Path | None,
    save: Path | None,
    endpoint: Endpoint | None,
    as_json: bool,
) -> int:
    """Measure what serialization costs.

    Processes, and then threads inside one process, allocate and free 64 bytes on one shared serialized heap, on one
    shared heap without serialization, and on a heap each. Last, each pair is done with the shared heap's lock held
    for some microseconds.
    """
    figures = {kind: path for kind, path in (("svg", svg), ("png", png)) if path}
    if figures:
        from heapd.workloads.sync_figure import check_matplotlib

        check_matplotlib()
    head = conditions("heapd") | {
        "runs": f"{runs} of {seconds:g} s for each line, in turn, the median one shown; processes are pinned to CPUs"
    }
    screen = console()
    where = nullcontext(str(endpoint)) if endpoint else private_daemon("sync")
    try:
        with terminations_raise(), where as place:
            cells = _measured(screen, work.Plan(place, counts, seconds, holds, runs), is_shown=not as_json)
    except WorkloadError as error:
        raise click.ClickException(str(error)) from error
    plain = {"conditions": head, "cells": work.as_json(cells)}
    if as_json:
        print_json(plain)
    else:
        _show(screen, head, cells)
    if save:
        save.write_text(json.dumps(plain, indent=1) + "\n")
    if figures:
        from heapd.workloads.sync_figure import draw

        draw(cells, head, figures)
    return OK


def _measured(screen: Console, plan: work.Plan, *, is_shown: bool) -> list[work.Cell]:
    columns = TextColumn("measuring"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=screen, transient=True, disable=not is_shown) as progress:
        task = progress.add_task("", total=plan.cells)
        return work.measure(plan, lambda done: progress.update(task, completed=done))


def _show(screen: Console, head: dict[str, str], cells: list[work.Cell]) -> None:
    for what, text in head.items():
        screen.print(f"{what:<9} {text}", soft_wrap=True)
    for title, threads, held in (
        ("Processes", False, False),
        ("Threads inside one process", True, False),
        ("Processes, the lock of a shared heap held round each pair", False, True),
    ):
        shown = [cell for cell in cells if cell.threads == threads and (cell.hold_us is not None) == held]
        if shown:
            screen.print(_table(title, shown, held))
    screen.print(
        "serialized, unserialized: one shared heap; one each: a serialized heap for each worker.\n"
        "contended: share of the lock's acquisitions that found it taken (alloc and free inside a section are none);\n"
        "waiting: share of the workers' time; it ends when the worker runs again, lock in hand.\n"
        "vol., invol.: context switches, voluntary (it went to sleep) and involuntary (others wanted the CPU).",
        soft_wrap=True,
    )


def _table(title: str, cells: list[work.Cell], held: bool) -> Table:
    headings = ("workers", "pairs/s", "p50", "p99", "max", "contended", "waiting", "vol./s", "invol./s")
    table = make_table("held" if held else "heap", *headings, title=title)
    before = None
    for cell in sorted(cells, key=lambda cell: (cell.hold_us or 0, list(work.KINDS).index(cell.kind), cell.workers)):
        name = f"{cell.hold_us} us" if held else _NAMES[cell.kind]
        has_lock = cell.acquisitions > 0
        table.add_row(
            name if name != before else "",
            str(cell.workers),
            f"{cell.pairs_per_second:,.0f}",
            *(_time_text(cell.latency_us[key]) for key in ("p50", "p99", "max")),
            f"{cell.contended_share:.2%}" if has_lock else "-",
            f"{cell.waited_share:.1%}" if has_lock else "-",
            f"{cell.voluntary / cell.seconds:,.0f}",
            f"{cell.involuntary / cell.seconds:,.0f}",
        )
        before = name
    return table


def _time_text(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1000 else f"{microseconds / 1000:.1f} ms"
