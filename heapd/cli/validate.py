"""`heapd validate HEAP`: check every invariant of a heap; exit code 1 if any is broken."""

from __future__ import annotations

from dataclasses import asdict

import click

import heapd_client as hc
from heapd.cli.exit_codes import FAILED, OK
from heapd.cli.params import endpoint_option, json_option
from heapd.cli.tables import console, make_table, opened, print_json
from heapd.records import Violation
from heapd.wire import Endpoint

__all__ = ["validate"]


@click.command("validate")
@click.argument("heap")
@json_option
@endpoint_option
def validate(heap: str, as_json: bool, endpoint: Endpoint) -> int:
    """Check HEAP (a name or an id). Exit code 0: clean; 1: violations, listed."""
    with hc.connect(str(endpoint), autostart=False) as session, opened(session, heap) as found:
        violations = found.validate()
        blocks = found.statistics().busy_blocks
    if as_json:
        print_json([asdict(violation) for violation in violations])
    elif violations:
        _print(heap, violations)
    else:
        console().print(f"heap {heap}: no violations, {blocks:,} blocks", markup=False)
    return FAILED if violations else OK


def _print(heap: str, violations: list[Violation]) -> None:
    table = make_table("what", "address", "session", "detail", title=f"heap {heap}: {len(violations)} violations")
    table.columns[3].justify = "left"
    for violation in violations:
        session = str(violation.session) if violation.session else "-"
        table.add_row(violation.what, f"{violation.address:#x}", session, violation.detail)
    console().print(table)
