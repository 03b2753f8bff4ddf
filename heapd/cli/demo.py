"""`heapd demo [FOLDER]`: real processes index a folder over one shared heap, beside the same job through a queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from heapd.cli.exit_codes import FAILED, OK
from heapd.cli.tables import console, heap_statistics_table, make_table
from heapd.units import format_size
from heapd.workloads import WorkloadError
from heapd.workloads.corpus import Corpus, scan, standard_library
from heapd.workloads.demo import Outcome, Run, run_demo
from heapd.workloads.picture import render
from heapd.workloads.private import terminations_raise

__all__ = ["demo"]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Processes that index.")
def demo(folder: Path | None, workers: int) -> int:
    """Index a FOLDER (default: the sources of Python's standard library) with several processes.

    One process reads each file into a block of a shared heap and publishes lists of the blocks' handles; the workers
    find lines, words and SHA-256 of each file right there. The result is compared with one process doing it all, and
    timed beside the same job with the bytes sent through a multiprocessing.Queue. It runs a daemon of its own, which
    is gone afterwards.
    """
    screen = console()
    try:
        with terminations_raise():
            outcome = _run(screen, folder, workers)
    except WorkloadError as error:
        raise click.ClickException(str(error)) from error
    _show(screen, outcome)
    return OK if outcome.difference is None else FAILED


def _run(screen: Console, folder: Path | None, workers: int) -> Outcome:
    with _bars(screen) as bars:
        task = bars.add_task("reading once, to warm the page cache", total=None)
        corpus = scan(
            folder or standard_library(),
            sources_only=folder is None,
            seen=lambda count: bars.update(task, completed=count),
        )
        bars.update(task, total=len(corpus.paths), completed=len(corpus.paths))

        def stage(name: str) -> Callable[[int], object]:
            task = bars.add_task(f"indexing: {name}", total=len(corpus.paths))
            return lambda count: bars.advance(task, count)

        return run_demo(corpus, workers, stage)


@contextmanager
def _bars(screen: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("files"),
        TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=screen) as bars:
        yield bars


def _show(screen: Console, outcome: Outcome) -> None:
    corpus = outcome.corpus
    skipped = f", {corpus.skipped} that cannot be read skipped" if corpus.skipped else ""
    screen.print(f"\n{corpus.root}: {len(corpus.paths):,} files, {format_size(corpus.total)}{skipped}", soft_wrap=True)
    screen.print(
        Group(
            _runs_table(corpus, outcome.runs),
            "Seconds are from the start signal, with every process up and connected, to the last worker's result: "
            "reading the files (from the page cache), handing over, indexing. Starting processes and daemon is not "
            "in them.",
            "",
            heap_statistics_table([(f"heap {outcome.picture_of}", outcome.heap)]),
            f"arena: {format_size(outcome.arena.committed)} committed, tables {format_size(outcome.arena.tables)}",
            "",
            render(outcome.picture, screen.width),
            "",
        )
    )
    if outcome.difference is None:
        screen.print(f"[green]equal[/green]: all {len(corpus.paths):,} findings agree, one process, queue, shared heap")
    else:
        screen.print(f"[red]different[/red]: {outcome.difference}", soft_wrap=True)


def _runs_table(corpus: Corpus, runs: list[Run]) -> Table:
    table = make_table("way", "processes", "files", "bytes", "blocks", "seconds", "MB/s", "vs one process")
    alone = runs[0].seconds
    for run in runs:
        table.add_row(
            run.name,
            str(run.processes),
            f"{len(corpus.paths):,}",
            f"{corpus.total:,}",
            f"{run.blocks:,}" if run.blocks else "-",
            f"{run.seconds:.2f}",
            f"{corpus.total / 1e6 / run.seconds:,.0f}",
            f"{alone / run.seconds:.2f} x",
        )
    return table
