"""What every benchmark shares: what it ran on, figures with a bar, a table on screen and the raw figures as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from heapd.workloads.machine import conditions
from heapd.workloads.private import private_daemon, terminations_raise

__all__ = ["RESULTS", "Benchmark", "Figure", "daemon", "percentiles"]

RESULTS = Path(os.environ.get("HEAPD_RESULTS") or Path(__file__).parent / "results")


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the result: what, the value, its unit; and the bar it must meet, if it has one."""

    what: str
    value: float
    unit: str
    bar: float | None = None
    at_most: bool = True  # False: at least

    @property
    def passes(self) -> bool:
        if self.bar is None:
            return True
        return self.value <= self.bar if self.at_most else self.value >= self.bar


@dataclass(slots=True)
class Benchmark:
    """A benchmark's result as it comes in.

    Fields: name, runs (a sentence: what was repeated how often), figures, raw (samples, for the JSON file),
    caveats (what the figures do not measure).
    """

    name: str
    runs: str
    figures: list[Figure] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)
    conditions: dict[str, str] = field(default_factory=lambda: conditions(f"scripts/bench {Path(sys.argv[0]).stem}"))

    def add(self, what: str, value: float, unit: str, *, at_most: float | None = None, at_least: float | None = None) -> None:  # fmt: skip  # noqa: E501
        """Note a figure, with its bar if it has one."""
        self.figures.append(Figure(what, value, unit, at_least if at_most is None else at_most, at_least is None))

    def add_samples(self, what: str, samples_ns: Sequence[int]) -> None:
        """Note the percentiles of latencies (nanoseconds) as microseconds, and keep the samples."""
        self.raw[what] = list(samples_ns)
        for label, value in percentiles(samples_ns).items():
            self.add(f"{what}, {label}", value / 1e3, "us")

    def report(self, *, strict: bool) -> int:
        """Print everything, write the JSON file. Returns: the exit code, 1 only if strict and a bar was missed."""
        console = Console()
        console.print(f"[bold]{self.name}[/bold]: {self.runs}")
        for key, value in self.conditions.items():
            console.print(f"  {key:<9} {value}", highlight=False)
        console.print(self._table())
        for caveat in self.caveats:
            console.print(f"Not measured: {caveat}", highlight=False)
        console.print(f"Raw figures: {self._write()}", highlight=False, soft_wrap=True)
        return int(strict and not all(figure.passes for figure in self.figures))

    def _table(self) -> Table:
        table = Table()
        for heading in ("figure", "value", "bar", ""):
            table.add_column(heading, justify="left" if heading == "figure" else "right")
        for figure in self.figures:
            sign = "" if figure.bar is None else f"{'<=' if figure.at_most else '>='} {figure.bar:g} {figure.unit}"
            verdict = "" if figure.bar is None else "[green]pass[/green]" if figure.passes else "[red]FAIL[/red]"
            table.add_row(figure.what, f"{_rounded(figure.value)} {figure.unit}", sign, verdict)
        return table

    def _write(self) -> Path:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
        figures = [asdict(figure) | {"passes": figure.passes} for figure in self.figures]
        path.write_text(json.dumps(asdict(self) | {"figures": figures}, indent=1) + "\n")
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def percentiles(samples: Sequence[int]) -> dict[str, float]:
    """Median, p90, p99 and maximum."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median": median(ordered),
        "p90": ordered[round(0.90 * last)],
        "p99": ordered[round(0.99 * last)],
        "max": ordered[-1],
    }


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@contextmanager
def daemon(*arguments: str) -> Iterator[str]:
    """A private daemon for the benchmark, with more arguments to `heapd serve`. Yields: its endpoint."""
    with terminations_raise(), private_daemon("bench", *arguments) as endpoint:
        yield endpoint
