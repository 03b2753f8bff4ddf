"""`heapd gc`: list and remove what killed daemons and jobs left behind."""

from __future__ import annotations

from dataclasses import asdict

import click

from heapd.cli.exit_codes import FAILED, OK
from heapd.cli.params import json_option
from heapd.cli.tables import print_json
from heapd.server import Leftover, find_leftovers, remove_leftover
from heapd.units import format_size

__all__ = ["gc"]


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--dry-run", "-n", is_flag=True, help="List only.")
@click.option(
    "--force",
    is_flag=True,
    help="Also arenas that clients have mapped, that a restart would bring back, or would refuse.",
)
@click.option("--runtime-dir", "directories", type=click.Path(file_okay=False, resolve_path=True), multiple=True,
              help="Look for sockets in this directory, too; may be given several times.")  # fmt: skip
@json_option
def gc(names: tuple[str, ...], dry_run: bool, force: bool, directories: tuple[str, ...], as_json: bool) -> int:
    """Remove what daemons and jobs that were killed left behind: segments in /dev/shm, sockets, lock files, folders.

    Only this user's, and only of the daemons NAMEd, if any are. Nothing of a daemon that lives is touched, nor of one
    that its supervisor is about to start again. An arena whose daemon was killed is kept if clients still have it
    mapped, if the next start of that daemon would bring persistent heaps back, or if it may hold some and that start
    would refuse it; --force removes it all the same.
    """
    outcomes = [(leftover, _deal_with(leftover, dry_run, force)) for leftover in find_leftovers(names, directories)]
    if as_json:
        print_json([{**asdict(leftover), "outcome": outcome} for leftover, outcome in outcomes])
    elif outcomes:
        _print(outcomes)
    else:
        click.echo("nothing is left behind")
    return FAILED if any(outcome.startswith("failed") for _, outcome in outcomes) else OK


def _deal_with(leftover: Leftover, dry_run: bool, force: bool) -> str:
    """What became of it: "removed", "kept", "would be removed", or "failed: ..."."""
    if leftover.wanted and not force:
        return "kept"
    if dry_run:
        return "would be removed"
    try:
        return "removed" if remove_leftover(leftover, force=force) else "kept"
    except OSError as error:
        return f"failed: {error.strerror or error}"


def _print(outcomes: list[tuple[Leftover, str]]) -> None:
    for leftover, outcome in outcomes:
        click.echo(f"{outcome}: {leftover.path} ({format_size(leftover.size)})")
        click.echo(f"    {leftover.what}{'; ' if leftover.wanted else ''}{leftover.wanted}")
    for word in ("removed", "would be removed", "kept"):
        of = [leftover for leftover, outcome in outcomes if outcome == word]
        if of:
            hint = "; --force removes it" if word == "kept" else ""
            click.echo(f"{len(of)} {word}, {format_size(sum(leftover.size for leftover in of))}{hint}")
