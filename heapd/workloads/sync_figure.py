"""What serialization costs, as a figure of four charts: matplotlib, an extra, is imported when it is wanted."""

from __future__ import annotations

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
_HOLD_STYLES = [("#56b4e9", "o"), ("#e69f00", "s"), ("#cc79a7", "^"), ("#999999", "D")]


def check_matplotlib() -> None:
    """Raises: MissingExtraError with the command that installs it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib is not installed; install it with: pip install 'heapd[plot]'") from None


def draw(cells: list[Cell], conditions: dict[str, str], paths: list[Path]) -> None:
    """Draw the measurements into files, each in the format of its suffix.

    Raises: MissingExtraError without matplotlib; OSError.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    charts = figure.subplots(2, 2)
    _throughput(charts[0][0], cells, threads=False)
    _throughput(charts[0][1], cells, threads=True)
    _waiting(charts[1][0], cells)
    _critical(charts[1][1], cells)
    figure.suptitle("alloc + free of 64 bytes: what serialization costs", fontsize=15)
    note = f"{conditions['machine']}; {conditions['system']}; {conditions['versions']}; {conditions['date']}"
    figure.text(0.5, -0.02, note, ha="center", fontsize=8, color="0.35")
    for path in paths:
        figure.savefig(path, bbox_inches="tight", dpi=150)


def _axis_of_workers(chart: Any, counts: list[int], label: str) -> None:
    chart.set_xscale("log", base=2)
    chart.set_xticks(counts, [str(count) for count in counts])
    chart.set_xticks([], minor=True)
    chart.set_xlabel(label)
    chart.grid(True, color="0.9")
    chart.set_axisbelow(True)


def _throughput(chart: Any, cells: list[Cell], *, threads: bool) -> None:
    shown = [cell for cell in cells if cell.threads == threads and cell.hold_us is None]
    for kind, label in KINDS.items():
        line = sorted((cell.workers, cell.pairs_per_second / 1e6) for cell in shown if cell.kind == kind)
        colour, marker = _STYLES[kind]
        chart.plot(*zip(*line, strict=True), color=colour, marker=marker, label=label)
    what = "threads inside one process" if threads else "processes"
    _axis_of_workers(chart, sorted({cell.workers for cell in shown}), f"number of {what}")
    chart.set_ylim(bottom=0)
    chart.set_ylabel("million pairs a second, all together")
    chart.set_title(f"Throughput of {what}")
    chart.legend()


def _waiting(chart: Any, cells: list[Cell]) -> None:
    """The shared serialized heap: how often its lock was taken by another, and what waiting for it cost."""
    counts: set[int] = set()
    for threads, dashes in ((False, "-"), (True, "--")):
        shown = sorted(
            (cell for cell in cells if cell.kind == "serialized" and cell.threads == threads and cell.hold_us is None),
            key=lambda cell: cell.workers,
        )
        workers = [cell.workers for cell in shown]
        counts.update(workers)
        who = "threads" if threads else "processes"
        contended = [100 * cell.contended_share for cell in shown]
        waited = [100 * cell.waited_share for cell in shown]
        chart.plot(workers, waited, dashes, color="#d55e00", marker="o", label=f"time spent waiting, {who}")
        chart.plot(workers, contended, dashes, color="#0072b2", marker="s", label=f"acquisitions contended, {who}")
    _axis_of_workers(chart, sorted(counts), "number of workers")
    chart.set_ylim(0, 100)
    chart.set_ylabel("per cent")
    chart.set_title("The shared serialized heap: waiting for its lock")
    chart.legend()


def _critical(chart: Any, cells: list[Cell]) -> None:
    """Throughput with the lock held; the dashed line is what a lock held all the time would give."""
    holds = sorted({cell.hold_us for cell in cells if cell.hold_us is not None})
    counts = sorted({cell.workers for cell in cells if cell.hold_us is not None})
    for hold_us, (colour, marker) in zip(holds, _HOLD_STYLES * len(holds), strict=False):
        line = sorted((cell.workers, cell.pairs_per_second) for cell in cells if cell.hold_us == hold_us)
        chart.plot(*zip(*line, strict=True), color=colour, marker=marker, label=f"held for {hold_us} us")
        if hold_us:
            chart.axhline(1e6 / hold_us, color=colour, linestyle=":", linewidth=1)
    _axis_of_workers(chart, counts, "number of processes")
    chart.set_yscale("log")
    chart.set_ylabel("sections a second, all together")
    chart.set_title("A critical section in heap.lock()\n(dotted: the lock held without a gap)")
    if holds:
        chart.legend()
