"""What serialization costs, as a figure of six charts: matplotlib, an extra, is imported when it is wanted.

Above, the three ways to have a heap beside each other; below, what makes the difference: the lock of the shared heap.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from heapd.errors import MissingExtraError
from heapd.workloads.sync_bench import KINDS, Cell

__all__ = ["check_matplotlib", "draw"]

# Okabe and Ito's colours, that colour-blind people tell apart; each line has a marker of its own too.
_STYLES = {
    "serialized": ("#d55e00", "o"),
    "unserialized": ("#0072b2", "s"),
    "own": ("#009e73", "^"),
}
_WIDE = 100  # largest value / smallest, above which a logarithmic axis has a number a decade
_LEGEND_SHARE = 0.4  # of the height of the lines, above them
_FOOT_SHARE = 0.1  # below them, for the mark of the CPUs
_HOLD_STYLES = [("#56b4e9", "o"), ("#e69f00", "s"), ("#cc79a7", "^"), ("#999999", "D")]


def check_matplotlib() -> None:
    """Raises: MissingExtraError with the command that installs it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib is not installed; install it with: pip install 'heapd[plot]'") from None


def draw(cells: list[Cell], conditions: dict[str, str], paths: dict[str, Path]) -> None:
    """Draw the measurements into files, by format: "svg" or "png".

    Raises: MissingExtraError without matplotlib; OSError.
    """
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cpus = len(os.sched_getaffinity(0))
    with rc_context({"svg.hashsalt": "heapd", "font.size": 11, "axes.titlesize": 12, "legend.fontsize": 9.5}):
        figure = Figure(figsize=(16, 9), layout="constrained")
        FigureCanvasAgg(figure)
        charts = figure.subplots(2, 3)
        _throughput(charts[0][0], cells, threads=False)
        _throughput(charts[0][1], cells, threads=True)
        charts[0][1].sharey(charts[0][0])
        charts[0][0].autoscale(axis="y")
        charts[0][0].set_ylim(bottom=0)
        _latency(charts[0][2], cells)
        _waiting(charts[1][0], cells)
        _sleeping(charts[1][1], cells)
        _critical(charts[1][2], cells)
        for chart in (charts[0][0], charts[0][2], charts[1][1], charts[1][2]):
            _mark_cpus(chart, cpus)
        figure.suptitle("What serialization costs: alloc + free of 64 bytes", fontsize=16)
        figure.supxlabel(_conditions_text(conditions, cpus), fontsize=8.5, color="0.35")
        for kind, path in paths.items():
            figure.savefig(path, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)


def _conditions_text(conditions: dict[str, str], cpus: int) -> str:
    usable = "" if cpus == os.cpu_count() else f", {cpus} CPUs usable"
    first = f"{conditions['machine']}{usable}; {conditions['system']}; {conditions['date']}"
    return f"{first}\n{conditions['versions']}; runs: {conditions['runs']}"


def _free(cells: list[Cell], kind: str, *, threads: bool) -> list[Cell]:
    """Cells without a critical section, by number of workers."""
    found = [cell for cell in cells if (cell.kind, cell.threads, cell.hold_us) == (kind, threads, None)]
    return sorted(found, key=lambda cell: cell.workers)


def _axis_of_workers(chart: Any, cells: list[Cell], label: str) -> None:
    counts = sorted({cell.workers for cell in cells})
    chart.set_xscale("log", base=2)
    chart.set_xticks(counts, [str(count) for count in counts])
    chart.set_xticks([], minor=True)
    chart.set_xlabel(label)
    chart.grid(True, color="0.9")
    chart.set_axisbelow(True)


def _mark_cpus(chart: Any, cpus: int) -> None:
    """A line beyond which processes share CPUs."""
    low, high = chart.get_xlim()
    if low < cpus < high:
        chart.axvline(cpus, color="0.6", linestyle=(0, (2, 3)), linewidth=1)
        chart.annotate(
            f"{cpus} CPUs", (cpus, 0), xycoords=("data", "axes fraction"), xytext=(3, 3), textcoords="offset points",
            fontsize=8.5, color="0.4",
        )  # fmt: skip


def _throughput(chart: Any, cells: list[Cell], *, threads: bool) -> None:
    for kind, label in KINDS.items():
        line = _free(cells, kind, threads=threads)
        colour, marker = _STYLES[kind]
        rates = [cell.pairs_per_second / 1e6 for cell in line]
        chart.plot([cell.workers for cell in line], rates, color=colour, marker=marker, label=label)
    _axis_of_workers(chart, cells, "threads" if threads else "processes")
    chart.set_ylabel("million pairs a second, all together")
    chart.set_title("Throughput: threads inside one process" if threads else "Throughput: processes")
    chart.legend(loc="best")


def _latency(chart: Any, cells: list[Cell]) -> None:
    """What a pair takes by the clock, which goes on while others have the lock or the CPU."""
    for percentile, dashes in (("p50", "-"), ("p99", "--")):
        for kind, label in KINDS.items():
            line = _free(cells, kind, threads=False)
            colour, marker = _STYLES[kind]
            fill = colour if percentile == "p50" else "white"
            chart.plot(
                [cell.workers for cell in line], [cell.latency_us[percentile] for cell in line], dashes,
                color=colour, marker=marker, markerfacecolor=fill, label=f"{label}: {percentile}",
            )  # fmt: skip
    _axis_of_workers(chart, cells, "processes")
    _log_axis(chart)
    chart.set_ylabel("microseconds a pair")
    chart.set_title("Latency: processes")
    _legend_above(chart)


def _log_axis(chart: Any) -> None:
    """A logarithmic axis with numbers as people write them."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    chart.set_yscale("log")
    low, high = chart.get_ylim()
    steps = (1, 2, 5) if high / low < _WIDE else (1,)
    chart.yaxis.set_major_locator(LogLocator(subs=steps))
    chart.yaxis.set_major_formatter(EngFormatter(sep="") if high > 1e3 else "{x:g}")
    chart.yaxis.set_minor_formatter(NullFormatter())


def _legend_above(chart: Any) -> None:
    """A legend in two columns over the lines of a logarithmic axis, with room made for it."""
    low, high = chart.get_ylim()
    height = high / low
    chart.set_ylim(low / height**_FOOT_SHARE, high * height**_LEGEND_SHARE)
    chart.legend(loc="upper center", ncols=2)


def _waiting(chart: Any, cells: list[Cell]) -> None:
    """Of the workers' time, how much goes into waiting for the one lock."""
    for threads, dashes, who in ((False, "-", "processes"), (True, "--", "threads")):
        line = _free(cells, "serialized", threads=threads)
        waited = [100 * cell.waited_share for cell in line]
        chart.plot([cell.workers for cell in line], waited, dashes, color="#d55e00", marker="o", label=who)
    counts = sorted({cell.workers for cell in cells})
    one_runs = [100 * (1 - 1 / count) for count in counts]
    chart.plot(counts, one_runs, ":", color="0.5", label="one works, all others wait")
    _axis_of_workers(chart, cells, "processes or threads")
    chart.set_ylim(0, 100)
    chart.set_ylabel("per cent of the workers' time")
    chart.set_title("Shared, serialized: time spent waiting for the lock")
    chart.legend(loc="best")


def _sleeping(chart: Any, cells: list[Cell]) -> None:
    """How often the lock is taken, how often that has to wait, and how often a process goes to sleep."""
    line = _free(cells, "serialized", threads=False)
    workers = [cell.workers for cell in line]
    for label, colour, marker, values in (
        ("acquisitions", "#000000", "D", [cell.acquisitions for cell in line]),
        ("of these contended", "#d55e00", "o", [cell.contended for cell in line]),
        ("switches: it slept", "#0072b2", "s", [cell.voluntary for cell in line]),
        ("switches: preempted", "#56b4e9", "^", [cell.involuntary for cell in line]),
    ):
        rates = [value / cell.seconds or math.nan for value, cell in zip(values, line, strict=True)]
        chart.plot(workers, rates, color=colour, marker=marker, label=label)
    _axis_of_workers(chart, cells, "processes")
    _log_axis(chart)
    chart.set_ylabel("a second, all together")
    chart.set_title("Shared, serialized: lock and context switches")
    _legend_above(chart)


def _critical(chart: Any, cells: list[Cell]) -> None:
    """Throughput with the lock held; the dotted lines are what a lock held without a gap would give."""
    held = [cell for cell in cells if cell.hold_us is not None]
    holds = sorted({cell.hold_us for cell in held if cell.hold_us is not None})
    for hold_us, (colour, marker) in zip(holds, _HOLD_STYLES * len(holds), strict=False):
        line = sorted((cell.workers, cell.pairs_per_second) for cell in held if cell.hold_us == hold_us)
        chart.plot(*zip(*line, strict=True), color=colour, marker=marker, label=f"held for {hold_us} us")
        if hold_us:
            chart.axhline(1e6 / hold_us, color=colour, linestyle=":", linewidth=1.2)
    _axis_of_workers(chart, cells, "processes")
    chart.set_title("A critical section in heap.lock()")
    chart.set_ylabel("sections a second, all together")
    if holds:
        _log_axis(chart)
        chart.plot([], [], ":", color="0.4", label="without a gap")
        _legend_above(chart)
    else:
        chart.text(0.5, 0.5, "not measured", transform=chart.transAxes, ha="center", color="0.5")
