"""`heapd doctor`: is this machine fit for a daemon, and what to do where it is not."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.text import Text

from heapd.cli.exit_codes import FAILED, OK
from heapd.cli.params import json_option
from heapd.cli.tables import console, make_table, print_json
from heapd.server import Finding, check_up

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Check this machine: kernel, C library, /dev/shm, limits, directories, leftovers; say what to do for each.

    A warning: a daemon works, with less memory, fewer clients or without executable heaps. A problem: it does not
    start, or may lose what it was given; the exit status is 1 then. Nothing is changed.
    """
    findings = list(check_up())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    return FAILED if any(finding.level == "problem" for finding in findings) else OK


def _print(findings: list[Finding]) -> None:
    table = make_table("check", "", "found", left=3)
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n-> {finding.advice}")
        table.add_row(finding.check, Text(finding.level, style=_STYLES[finding.level]), text)
    screen = console()
    screen.print(table)
    counts = {level: sum(finding.level == level for finding in findings) for level in _STYLES}
    faults = [f"{counts[level]} {level}{'' if counts[level] == 1 else 's'}" for level in ("problem", "warning")]
    screen.print(f"{', '.join(faults)}, {counts['ok']} in order")
