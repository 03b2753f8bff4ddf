"""What `heapd bench sync` measures, and how it shows it."""

from __future__ import annotations

import builtins
import json
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heapd.workloads import sync_bench
from heapd.workloads.machine import conditions
from heapd.workloads.sync_bench import KINDS, Cell, Plan, Work
from heapd.workloads.sync_figure import draw
from tests.cli.conftest import Heapd

SMALL = ("bench", "sync", "--processes", "1,2", "--seconds", "0.02", "--runs", "1")


def test_every_measurement_is_in_the_json(heapd: Heapd) -> None:
    """Each kind of heap, processes and threads, and each hold of the critical section has its cell."""
    found = heapd(*SMALL, "--holds", "0,20", "--json").json
    cells = {(cell["kind"], cell["threads"], cell["workers"], cell["hold_us"]): cell for cell in found["cells"]}
    expected = {(kind, threads, count, None) for kind in KINDS for threads in (False, True) for count in (1, 2)}
    expected |= {("serialized", False, count, hold) for count in (1, 2) for hold in (0, 20)}
    assert set(cells) == expected
    # On a loaded machine a worker may not be let in such a short time.
    assert sum(cell["pairs"] > 0 for cell in cells.values()) > len(cells) / 2
    assert len(cells) == Plan("", (1, 2), 0.02, (0, 20)).cells


def test_acquisitions_are_counted_where_there_is_a_lock(heapd: Heapd) -> None:
    """A pair on a serialized heap takes the mutex twice; on an unserialized one never."""
    cells = heapd(*SMALL, "--holds", "", "--json").json["cells"]
    for cell in cells:
        if cell["kind"] == "unserialized":
            assert cell["acquisitions"] == 0
        else:
            assert cell["acquisitions"] >= 2 * cell["pairs"]
            assert 0 <= cell["contended"] <= cell["acquisitions"]


class _Instant:
    """A heap on which nothing takes any time."""

    def alloc(self, size: int) -> _Instant:
        return self

    def free(self) -> None: ...


@pytest.mark.parametrize(("late_ms", "batches"), [(0, 9), (4, 5), (9, 0), (20, 0)])
def test_a_worker_that_is_let_late_has_less_done(monkeypatch: pytest.MonkeyPatch, late_ms: int, batches: int) -> None:
    """All work in one time: the rates of threads that begin one after another do not add up to more than there was."""
    ticks = count(late_ms * 1_000_000, 1_000_000)  # a clock that goes on by 1 ms with each look, one a batch
    clock = SimpleNamespace(monotonic_ns=lambda: next(ticks), perf_counter_ns=lambda: 0)
    monkeypatch.setattr(sync_bench, "time", clock)
    monkeypatch.setattr(sync_bench, "sleep_until", lambda moment: next(ticks))
    work = Work()
    work.run(_Instant(), lambda: 0, 0.01, None)  # type: ignore[arg-type]
    assert work.pairs == 64 * batches
    assert work.worked_ns == max(10, late_ms + 1) * 1_000_000


def test_the_critical_section_lasts_as_long_as_asked(heapd: Heapd) -> None:
    """Nobody does more sections a second than fit when each takes its time, however many there are."""
    cells = heapd(*SMALL, "--holds", "1000", "--json").json["cells"]
    held = [cell for cell in cells if cell["hold_us"] == 1000]
    assert len(held) == 2
    assert all(cell["pairs_per_second"] < 1000 * 1.2 for cell in held)


def test_the_table_says_what_it_was_measured_on(heapd: Heapd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine, versions, date, command and runs stand above the tables."""
    monkeypatch.setattr(sys, "argv", ["/bin/heapd", *SMALL])
    out = heapd(*SMALL, "--holds", "").out
    assert "command   heapd bench sync --processes" in out
    for word in ("machine", "versions", "date", "command", "runs", "Processes", "Threads inside one process"):
        assert word in out


def test_figures_are_written_in_both_formats(heapd: Heapd, tmp_path: Path) -> None:
    """--svg and --png write the figure, --save the JSON."""
    pytest.importorskip("matplotlib")
    svg, png, save = tmp_path / "figure.svg", tmp_path / "figure of any name", tmp_path / "figures.json"
    heapd(*SMALL, "--svg", svg, "--png", png, "--save", save)
    assert "<svg" in svg.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(save.read_text())["cells"]


def test_every_axis_of_the_figure_is_labelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each chart has a title, both axes a label, every line a name in a legend that fits the chart."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **more: (drawn.append(self), save(self, *rest, **more)))
    draw(made_up_cells(), conditions("made up") | {"runs": "none"}, {"png": tmp_path / "figure.png"})
    (figure,) = drawn
    assert len(figure.axes) == 6
    for chart in figure.axes:
        assert all((chart.get_title(), chart.get_xlabel(), chart.get_ylabel()))
        legend = chart.get_legend()
        named = [line for line in chart.get_lines() if len(line.get_xdata()) > 2]
        assert {str(line.get_label()) for line in named} <= {text.get_text() for text in legend.get_texts()}
        assert chart.get_window_extent().x0 <= legend.get_window_extent().x0
        assert legend.get_window_extent().x1 <= chart.get_window_extent().x1


def test_a_figure_of_one_number_of_processes_can_be_drawn(tmp_path: Path) -> None:
    """One point a line, no critical section, nothing contended: no warning, and a chart that says that it is empty."""
    pytest.importorskip("matplotlib")
    cells = [cell for cell in made_up_cells() if cell.workers == 1 and cell.hold_us is None]
    draw(cells, conditions("made up") | {"runs": "none"}, {"svg": tmp_path / "figure.svg"})
    assert "not measured" in (tmp_path / "figure.svg").read_text()


def made_up_cells() -> list[Cell]:
    """Measurements of 1, 2 and 4 workers, with figures as they may be."""

    def cell(kind: str, threads: bool, workers: int, hold_us: int | None) -> Cell:
        rate = 1e6 if hold_us is None else 9e5 / max(hold_us, 4)
        latencies = {"p50": 1e6 / rate, "p90": 2e6 / rate, "p99": 5e6 / rate, "max": 1e3}
        return Cell(
            kind, threads, workers, hold_us, 1.0, int(rate), rate, latencies, int(2 * rate), 50 * (workers - 1),
            0.8 * (workers - 1), float(workers), 100 * workers, 50 * workers,
        )  # fmt: skip

    free = [cell(kind, threads, count, None) for kind in KINDS for threads in (False, True) for count in (1, 2, 4)]
    return free + [cell("serialized", False, count, hold) for hold in (0, 10, 100) for count in (1, 2, 4)]


def test_without_matplotlib_the_error_says_what_to_install(
    heapd: Heapd,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A figure without matplotlib fails before anything is measured, and names the pip command."""
    real = builtins.__import__

    def no_matplotlib(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    answer = heapd(*SMALL, "--svg", tmp_path / "figure.svg", status=1)
    assert "pip install 'heapd[plot]'" in answer.err
    assert not (tmp_path / "figure.svg").exists()


@pytest.mark.parametrize("option", ["--svg", "--png", "--save"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(heapd: Heapd, option: str) -> None:
    """With the folder's name, as a mistake on the command line."""
    answer = heapd("bench", "sync", "--seconds", "60", option, "/no/such/folder/file", status=2)
    assert "'/no/such/folder' does not exist" in " ".join(answer.err.split())


@pytest.mark.parametrize("wrong", ["0", "1,x", "", "1000"])
def test_a_wrong_list_of_processes_is_refused(heapd: Heapd, wrong: str) -> None:
    """Numbers of processes are at least one, at most 256, and numbers."""
    assert "Invalid value" in heapd("bench", "sync", "--processes", wrong, status=2).err


def test_shares_of_a_cell_are_of_its_own_totals() -> None:
    """Contended is a share of acquisitions, waiting a share of what all workers had of time. Of the three acquisitions
    of a critical section only the first may have to wait."""
    cell = Cell("serialized", False, 2, None, 0.5, 100, 200.0, {}, 200, 50, 0.25, 1.0, 1, 2)
    assert cell.contended_share == 0.25
    assert cell.waited_share == 0.25
    held = Cell("serialized", False, 2, 10, 0.5, 100, 200.0, {}, 300, 50, 0.25, 1.0, 1, 2)
    assert held.contended_share == 0.5
    assert Cell("unserialized", False, 2, None, 0.5, 100, 200.0, {}, 0, 0, 0.0, 1.0, 1, 2).contended_share == 0
