"""`heapd chaos`: the stress while clients and the server are killed at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from heapd.cli.exit_codes import FAILED, OK
from heapd.cli.params import Seconds, json_option
from heapd.cli.stress import faults_of
from heapd.cli.tables import console, print_json
from heapd.workloads import WorkloadError
from heapd.workloads import stress as stress_work
from heapd.workloads.chaos import ChaosOutcome, run_chaos
from heapd.workloads.private import private_daemon, terminations_raise
from heapd.workloads.stress_client import Plan

__all__ = ["chaos"]

_HEAPS = 4
_RESTARTS = "1000000000"  # a minute; the storm kills more servers than a supervisor should put up with
_SHOWN_FAULTS = 20
_PHASES = {"start": "clients start", "run": "storm", "finish": "clients end"}


@click.command()
@click.option("--minutes", type=Seconds(0.01, 10_000), metavar="M", default=1.0, show_default=True, help="How long.")
@click.option("--clients", type=click.IntRange(1, 200), default=8, show_default=True, help="Processes.")
@click.option("--seed", type=click.IntRange(0), help="Repeats a run, as far as chance allows.  [default: a new one]")
@json_option
def chaos(minutes: float, clients: int, seed: int | None, as_json: bool) -> int:
    """Kill clients and the server at random while CLIENTS processes allocate, write, check and hand over blocks.

    It has a daemon of its own. A client that was killed is replaced by another process, which must find every block
    of the first one as that had left it; the server is started again by its supervisor. Afterwards everything is
    freed; then no byte may be lost, no page in use, no invariant broken. Exit status 1 if anything was found.
    """
    screen = console()
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    try:
        with terminations_raise(), private_daemon("chaos", "--restarts", _RESTARTS, "--log-level", "warning") as place:
            plan = Plan(place, clients, minutes * 60, seed, _HEAPS, stress_work.bytes_a_client(clients))
            with _display(screen, plan, is_shown=not as_json) as progress:
                outcome = run_chaos(plan, progress)
    except WorkloadError as error:
        raise click.ClickException(f"{error} (seed {seed})") from error
    if as_json:
        print_json(_plain(outcome))
    else:
        _show(screen, outcome)
    return OK if outcome.is_clean else FAILED


@contextmanager
def _display(
    screen: Console, plan: Plan, *, is_shown: bool
) -> Iterator[Callable[[stress_work.Progress, ChaosOutcome], object]]:
    """The figures so far, renewed as they change."""
    if not is_shown:
        yield lambda now, outcome: None
        return
    with Live(console=screen, refresh_per_second=4, transient=True) as live:

        def show(now: stress_work.Progress, outcome: ChaosOutcome) -> None:
            unit = " s" if now.phase == "run" else ""
            table = _table(outcome, now.operations)
            table.title = f"{_PHASES[now.phase]}: {now.done:.0f} of {now.total:.0f}{unit}, seed {plan.seed}"
            live.update(table)

        yield show


def _table(outcome: ChaosOutcome, operations: int) -> Table:
    """What happened and what it broke, as two columns."""
    table = Table.grid(padding=(0, 2))
    table.title_justify = "left"
    for what, value in _figures(outcome, operations).items():
        table.add_row(what, value)
    return table


def _figures(outcome: ChaosOutcome, operations: int) -> dict[str, str]:
    recoveries = "none"
    if outcome.recoveries_s:
        recoveries = (
            f"{len(outcome.recoveries_s)}, median {outcome.median_recovery_s * 1e3:,.0f} ms, "
            f"longest {outcome.longest_recovery_s * 1e3:,.0f} ms"
        )
    return {
        "kills of clients": f"{outcome.client_kills:,}",
        "kills of the server": f"{outcome.server_kills:,}",
        "recoveries": recoveries,
        "operations": f"{operations:,}",
        "blocks checked": f"{outcome.checked:,}",
        "bytes lost": f"{outcome.bytes_lost:,}",
        "pages leaked": f"{outcome.pages_leaked:,}",
    }


def _show(screen: Console, outcome: ChaosOutcome) -> None:
    screen.print(_table(outcome, outcome.stress.operations))
    screen.print(f"blocks that killed clients were at work with, freed at the end: {outcome.unfinished:,}")
    faults = _faults(outcome)
    for fault in faults[:_SHOWN_FAULTS]:
        screen.print(f"[red]FAULT[/red] {fault}", soft_wrap=True)
    if len(faults) > _SHOWN_FAULTS:
        screen.print(f"... and {len(faults) - _SHOWN_FAULTS} more")
    plan = outcome.stress.plan
    verdict = "[green]nothing was lost[/green]" if outcome.is_clean else f"[red]{len(faults)} faults[/red]"
    again = f"heapd chaos --minutes {plan.seconds / 60:g} --clients {plan.clients} --seed {plan.seed}"
    screen.print(f"{verdict}; repeat with `{again}`", soft_wrap=True)


def _faults(outcome: ChaosOutcome) -> list[str]:
    found = [*faults_of(outcome.stress), *outcome.faults]
    if outcome.bytes_lost:
        found.append(f"{outcome.bytes_lost} bytes of blocks had changed, or were gone")
    if outcome.pages_leaked and not any(heap.pages_in_use for heap in outcome.stress.heaps):
        found.append(f"{outcome.pages_leaked} pages of memory are behind the arena that the daemon does not know of")
    return found


def _plain(outcome: ChaosOutcome) -> dict[str, object]:
    plan = outcome.stress.plan
    return {
        "minutes": plan.seconds / 60,
        "clients": plan.clients,
        "seed": plan.seed,
        "client_kills": outcome.client_kills,
        "server_kills": outcome.server_kills,
        "recoveries_s": outcome.recoveries_s,
        "median_recovery_s": outcome.median_recovery_s,
        "longest_recovery_s": outcome.longest_recovery_s,
        "operations": outcome.stress.operations,
        "blocks_checked": outcome.checked,
        "bytes_lost": outcome.bytes_lost,
        "pages_leaked": outcome.pages_leaked,
        "unfinished": outcome.unfinished,
        "faults": _faults(outcome),
        "is_clean": outcome.is_clean,
    }
