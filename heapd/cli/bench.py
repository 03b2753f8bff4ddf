"""`heapd bench NAME`: run a benchmark of a source checkout, where scripts/bench is the same without installation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

import heapd

__all__ = ["bench"]

_ROOT = Path(heapd.__file__).parents[1]
_FOLDER = _ROOT / "scripts" / "benchmarks"


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("name", required=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def bench(name: str | None, options: tuple[str, ...]) -> int:
    """Run the benchmark NAME with its OPTIONS; without a name, list them."""
    names = sorted(path.stem for path in _FOLDER.glob("[a-z]*.py"))
    if not names:
        raise click.ClickException("the benchmarks come with the sources, not with the installed package")
    if name is None or name in ("-h", "--help"):
        click.echo("usage: heapd bench NAME [OPTIONS]\n\nbenchmarks: " + ", ".join(names))
        return 0
    if name not in names:
        raise click.UsageError(f"there is no benchmark {name!r}; there are: {', '.join(names)}")
    return subprocess.run([sys.executable, "-m", f"scripts.benchmarks.{name}", *options], cwd=_ROOT).returncode
