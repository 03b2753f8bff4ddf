"""`heapd stress`: many client processes, random operations, every block checked by its last owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from heapd.cli.exit_codes import FAILED, OK
from heapd.cli.params import ENDPOINT, Seconds, json_option
from heapd.cli.tables import console, make_table, print_json
from heapd.wire import Endpoint
from heapd.workloads import WorkloadError
from heapd.workloads import stress as work
from heapd.workloads.private import private_daemon, terminations_raise
from heapd.workloads.stress_client import Plan

__all__ = ["faults_of", "stress"]

_SHOWN_FAULTS = 20
_PHASES = {"start": "clients up", "run": "running", "finish": "clients done"}


@click.command()
@click.option("--clients", type=click.IntRange(1, work.MOST_CLIENTS), default=8, show_default=True, help="Processes.")
@click.option("--seconds", type=Seconds(0.1, 86_400), default=10.0, show_default=True, help="How long.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides what clients do.")
@click.option("--heaps", type=click.IntRange(1, 64), default=4, show_default=True, help="Shared heaps.")
@click.option("--endpoint", "-e", type=ENDPOINT, help="A running daemon.  [default: one of its own]")
@json_option
def stress(clients: int, seconds: float, seed: int, heaps: int, endpoint: Endpoint | None, as_json: bool) -> int:
    """Let CLIENTS processes allocate, write, check, resize, free and hand over blocks at random.

    Each second heap is unserialized. Every block carries a checksum that its last owner checks, across processes.
    Afterwards everything is freed; then no page may be in use and no invariant broken. Exit status 1 if anything was
    found.
    """
    screen = console()
    where = nullcontext(str(endpoint)) if endpoint else private_daemon("stress")
    try:
        with terminations_raise(), where as place:
            plan = Plan(place, clients, seconds, seed, heaps, work.bytes_a_client(clients))
            with _bar(screen, is_shown=not as_json) as progress:
                outcome = work.run_stress(plan, progress)
    except WorkloadError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json(_plain(outcome))
    else:
        _show(screen, outcome)
    return OK if outcome.is_clean else FAILED


@contextmanager
def _bar(screen: Console, *, is_shown: bool) -> Iterator[Callable[[work.Progress], object]]:
    """A bar for each phase, with operations, live blocks and errors beside it."""
    columns = (
        SpinnerColumn(), TextColumn("{task.description:<12}"), BarColumn(bar_width=24), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=screen, disable=not is_shown) as bars:

        def show(now: work.Progress) -> None:
            if now.phase not in tasks:
                tasks[now.phase] = bars.add_task(_PHASES[now.phase], note="")
            note = f"{now.operations:,} operations, {now.live:,} blocks, {now.errors} errors"
            if now.phase == "start":
                note = f"{now.done:.0f} of {now.total:.0f}"
            bars.update(tasks[now.phase], completed=now.done, total=now.total, note=note)

        yield show


def _show(screen: Console, outcome: work.StressOutcome) -> None:
    screen.print(_latency_table(outcome))
    counts = outcome.report.counts
    words = [f"{what} {count:,}" for what, count in sorted(counts.items()) if not what.startswith("guard")]
    if words:
        screen.print("; ".join(words))
    screen.print(_heap_table(outcome))
    rate = outcome.operations / outcome.seconds if outcome.seconds else 0
    plan = outcome.plan
    screen.print(
        f"{outcome.operations:,} operations in {outcome.seconds:.1f} s by {plan.clients} clients, seed {plan.seed}: "
        f"{rate:,.0f} a second"
    )
    faults = list(faults_of(outcome))
    for fault in faults[:_SHOWN_FAULTS]:
        screen.print(f"[red]FAULT[/red] {fault}", soft_wrap=True)
    if len(faults) > _SHOWN_FAULTS:
        screen.print(f"... and {len(faults) - _SHOWN_FAULTS} more")
    heaps = len(outcome.heaps)
    verdict = f"[red]{len(faults)} faults[/red]" if faults else "[green]0 errors[/green]"
    left = sum(heap.pages_in_use for heap in outcome.heaps)
    screen.print(f"{verdict}; {heaps} heaps validated, {left} slabs and runs left")


def _latency_table(outcome: work.StressOutcome) -> Table:
    table = make_table("operation", "count", "p50", "p90", "p99", "max")
    for kind, histogram in sorted(outcome.report.latencies.items()):
        values = [histogram.percentile(percent) for percent in (50, 90, 99)] + [histogram.maximum]
        table.add_row(kind, f"{histogram.count:,}", *(_time_text(value) for value in values))
    return table


def _heap_table(outcome: work.StressOutcome) -> Table:
    """The heaps after everybody freed everything, and what their locks have seen."""
    table = make_table("heap", "serial", "allocs", "left", "faults", "locked", "contended", "waited", left=2)
    for heap in outcome.heaps:
        found = heap.statistics
        table.add_row(
            heap.name,
            "yes" if heap.serialized else "no",
            f"{found.allocations:,}",
            f"{heap.pages_in_use:,}",
            f"{len(heap.violations):,}",
            f"{found.acquisitions:,}",
            f"{found.contended / max(found.acquisitions, 1):.0%}" if found.contended else "-",
            _time_text(found.waited_ns) if found.waited_ns else "-",
        )
    return table


def _time_text(nanoseconds: int) -> str:
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1e3:.1f} us"
    return f"{nanoseconds / 1e6:.1f} ms" if nanoseconds < 1_000_000_000 else f"{nanoseconds / 1e9:.2f} s"


def faults_of(outcome: work.StressOutcome) -> Iterator[str]:
    """Everything that was found, a sentence each."""
    yield from outcome.dead
    yield from outcome.report.errors
    for heap in outcome.heaps:
        for violation in heap.violations:
            yield f"{heap.name}: {violation}"
        if heap.statistics.busy_blocks:
            yield f"{heap.name}: {heap.statistics.busy_blocks} blocks are still allocated"
        if heap.pages_in_use:
            yield f"{heap.name}: {heap.pages_in_use} slabs and runs are left after everything was freed"
        if heap.lost_increments:
            yield f"{heap.name}: {heap.lost_increments} increments under its lock were lost: it did not exclude"


def _plain(outcome: work.StressOutcome) -> dict[str, object]:
    latencies = {
        kind: {"count": histogram.count, "max_ns": histogram.maximum}
        | {f"p{percent}_ns": histogram.percentile(percent) for percent in (50, 90, 99)}
        for kind, histogram in outcome.report.latencies.items()
    }
    return {
        "clients": outcome.plan.clients,
        "seed": outcome.plan.seed,
        "seconds": outcome.seconds,
        "operations": outcome.operations,
        "operations_per_second": outcome.operations / outcome.seconds if outcome.seconds else 0.0,
        "latencies": latencies,
        "counts": {what: count for what, count in outcome.report.counts.items() if not what.startswith("guard")},
        "faults": list(faults_of(outcome)),
        "is_clean": outcome.is_clean,
    }
