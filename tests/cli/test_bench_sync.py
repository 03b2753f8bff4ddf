"""What `heapd bench sync` measures, and how it shows it."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from heapd.workloads.sync_bench import KINDS, Cell, Plan
from tests.cli.conftest import Heapd

SMALL = ("bench", "sync", "--processes", "1,2", "--seconds", "0.02", "--runs", "1")


def test_every_measurement_is_in_the_json(heapd: Heapd) -> None:
    """Each kind of heap, processes and threads, and each hold of the critical section has its cell."""
    found = heapd(*SMALL, "--holds", "0,20", "--json").json
    cells = {(cell["kind"], cell["threads"], cell["workers"], cell["hold_us"]): cell for cell in found["cells"]}
    expected = {(kind, threads, count, None) for kind in KINDS for threads in (False, True) for count in (1, 2)}
    expected |= {("serialized", False, count, hold) for count in (1, 2) for hold in (0, 20)}
    assert set(cells) == expected
    assert all(cell["pairs"] > 0 for cell in cells.values())
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


def test_the_critical_section_lasts_as_long_as_asked(heapd: Heapd) -> None:
    """Nobody does more sections a second than fit when each takes its time, however many there are."""
    cells = heapd(*SMALL, "--holds", "1000", "--json").json["cells"]
    held = [cell for cell in cells if cell["hold_us"] == 1000]
    assert len(held) == 2
    assert all(cell["pairs_per_second"] < 1000 * 1.2 for cell in held)


def test_the_table_says_what_it_was_measured_on(heapd: Heapd) -> None:
    """Machine, versions, date, command and runs stand above the tables."""
    out = heapd(*SMALL, "--holds", "").out
    for word in ("machine", "versions", "date", "command", "runs", "Processes", "Threads inside one process"):
        assert word in out


def test_figures_are_written_in_both_formats(heapd: Heapd, tmp_path: Path) -> None:
    """--svg and --png write the figure, --save the JSON."""
    pytest.importorskip("matplotlib")
    svg, png, save = tmp_path / "figure.svg", tmp_path / "figure.png", tmp_path / "figures.json"
    heapd(*SMALL, "--svg", svg, "--png", png, "--save", save)
    assert "<svg" in svg.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    assert json.loads(save.read_text())["cells"]


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


@pytest.mark.parametrize("wrong", ["0", "1,x", "", "1000"])
def test_a_wrong_list_of_processes_is_refused(heapd: Heapd, wrong: str) -> None:
    """Numbers of processes are at least one, at most 256, and numbers."""
    assert "Invalid value" in heapd("bench", "sync", "--processes", wrong, status=2).err


def test_shares_of_a_cell_are_of_its_own_totals() -> None:
    """Contended is a share of acquisitions, waiting a share of what all workers had of time."""
    cell = Cell("serialized", False, 2, None, 0.5, 100, 200.0, {}, 200, 50, 0.25, 1, 2)
    assert cell.contended_share == 0.25
    assert cell.waited_share == 0.25
