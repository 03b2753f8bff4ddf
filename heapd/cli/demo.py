"""`heapd demo [FOLDER]`: real processes index a folder over one shared heap, beside the same job through a queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import click
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from heapd.cli.exit_codes import FAILED, OK
from heapd.cli.tables import console, make_table, statistics_text
from heapd.units import format_size
from heapd.workloads import WorkloadError
from heapd.workloads.corpus import Corpus, check_folder, scan, standard_library
from heapd.workloads.demo import Outcome, Run, run_demo
from heapd.workloads.picture import render
from heapd.workloads.private import terminations_raise

__all__ = ["demo"]

_NOTE = (
    "One process reads and indexes; queue: a loader sends the bytes to the workers through a multiprocessing.Queue; "
    "shared heap: the loader reads into blocks, and the workers index them there. Seconds are the median of {rounds} "
    "rounds in turn, each from the start signal, with every process up and connected, to the last worker's result: "
    "reading (from the page cache), handing over, indexing, and the daemon's work. Starting is not in them."
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True, help="Processes that index.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="How often; medians count.")
def demo(folder: Path | None, workers: int, rounds: int) -> int:
    """Index a FOLDER (default: the sources of Python's standard library) with several processes.

    One process reads each file into a block of a shared heap and publishes lists of the blocks' handles; the workers
    find lines, words and SHA-256 of each file right there. The result is compared with one process doing it all, and
    timed beside the same job with the bytes sent through a multiprocessing.Queue. It runs a daemon of its own, which
    is gone afterwards.
    """
    screen = console()
    try:
        with terminations_raise():
            outcome = _run(screen, folder, workers, rounds)
    except WorkloadError as error:
        raise click.ClickException(str(error)) from error
    _show(screen, outcome)
    return OK if outcome.difference is None else FAILED


def _run(screen: Console, folder: Path | None, workers: int, rounds: int) -> Outcome:
    root = folder or standard_library()
    check_folder(root)
    with _bars(screen) as bars:
        task = bars.add_task("reading once, to warm the page cache", total=None)
        corpus = scan(
            root,
            sources_only=folder is None,
            seen=lambda count: bars.update(task, completed=count),
        )
        bars.update(task, total=len(corpus.paths), completed=len(corpus.paths))

        def stage(name: str) -> Callable[[int], object]:
            task = bars.add_task(f"indexing: {name}", total=rounds * len(corpus.paths))
            return lambda count: bars.advance(task, count)

        return run_demo(corpus, workers, rounds, stage)


@contextmanager
def _bars(screen: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("files"),
    )  # fmt: skip
    with Progress(*columns, console=screen) as bars:
        yield bars


def _show(screen: Console, outcome: Outcome) -> None:
    corpus, seen = outcome.corpus, outcome.snapshot
    skipped = f", {corpus.skipped} that cannot be read skipped" if corpus.skipped else ""
    screen.print(f"\n{corpus.root}: {len(corpus.paths):,} files, {format_size(corpus.total)}{skipped}", soft_wrap=True)
    screen.print(
        Group(
            _runs_table(corpus, outcome.runs),
            _NOTE.format(rounds=len(outcome.runs[0].seconds)),
            "",
            statistics_text(seen.heap),
            f"arena {format_size(seen.arena.size)}, committed {format_size(seen.arena.committed)}: "
            f"heaps {format_size(seen.arena.heaps)}, tables {format_size(seen.arena.tables)}",
            "",
            render(seen.picture, screen.width),
            "",
        )
    )
    if outcome.difference is None:
        screen.print(f"[green]equal[/green]: all {len(corpus.paths):,} findings agree, one process, queue, shared heap")
    else:
        screen.print(f"[red]different[/red]: {outcome.difference}", soft_wrap=True)


def _runs_table(corpus: Corpus, runs: list[Run]) -> Table:
    table = make_table("way", "procs", "files", "bytes", "blocks", "seconds", "MB/s", "speed")
    alone = median(runs[0].seconds)
    for run in runs:
        seconds = median(run.seconds)
        table.add_row(
            run.way,
            str(run.processes),
            f"{len(corpus.paths):,}",
            f"{corpus.total:,}",
            f"{run.blocks:,}" if run.blocks else "-",
            f"{seconds:.2f}",
            f"{corpus.total / 1e6 / seconds:,.0f}",
            f"{alone / seconds:.2f} x",
        )
    return table
