"""`heapd bench NAME`: what serialization costs; and in a source checkout the benchmarks of scripts/bench."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click

import heapd
from heapd.cli.bench_sync import sync

__all__ = ["bench"]

_ROOT = Path(heapd.__file__).parents[1]
_FOLDER = _ROOT / "scripts" / "benchmarks"


class _Benchmarks(click.Group):
    """The commands of this package, and one for each script where there are scripts."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        scripts = {path.stem for path in _FOLDER.glob("[a-z]*.py")}
        return sorted(scripts | set(super().list_commands(ctx)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        if own is not None or cmd_name not in self.list_commands(ctx):
            return own
        return _script(cmd_name)


def _script(name: str) -> click.Command:
    """The command that runs a script; its options are the script's own."""
    first_line = (_FOLDER / f"{name}.py").read_text().partition("\n")[0].strip('"')

    @click.command(
        name,
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
        help=first_line,
        short_help=first_line.partition(":")[0].rstrip("."),
    )
    @click.argument("options", nargs=-1, type=click.UNPROCESSED)
    def run(options: tuple[str, ...]) -> Any:
        return subprocess.run([sys.executable, "-m", f"scripts.benchmarks.{name}", *options], cwd=_ROOT).returncode

    return run


@click.group(cls=_Benchmarks, context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure: what serialization costs; from a source checkout also requests, memory, frames and others."""


bench.add_command(sync)
