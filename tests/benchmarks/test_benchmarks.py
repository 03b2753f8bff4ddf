"""Each benchmark runs, in the smallest measure that shows anything; what it measures is not looked at."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACE = """# six blocks, of every kind of event
a 0 100
c 1 5000
m 2 300 64
t 1
r 0 70000
a 3 0
r 3 10
f 1
a 4 70000
f 4
"""


def run(name: str, results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A benchmark as scripts/bench runs it."""
    environment = os.environ | {
        "HEAPD_RESULTS": str(results),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")]),
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", f"scripts.benchmarks.{name}", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def check(done: subprocess.CompletedProcess[str], results: Path) -> dict[str, float]:
    """The figures of a benchmark that ended well; also: it has said what it ran on, and nothing went wrong aside."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (path,) = results.glob("*.json")
    found = json.loads(path.read_text())
    for condition in ("machine", "versions", "date", "command"):
        assert found["conditions"][condition] in " ".join(done.stdout.split()).replace(" \n", " ")
    figures: dict[str, float] = {figure["what"]: figure["value"] for figure in found["figures"]}
    assert all(value == value and value >= 0 for value in figures.values()), figures
    return figures


def test_alloc_prints_a_ratio_for_every_bar(tmp_path: Path) -> None:
    """`alloc` compares 64 bytes and a mix with malloc, and counts requests and bytes."""
    figures = check(run("alloc", tmp_path, "--quick", "--rounds", "1", "--pairs", "100", "--live", "100"), tmp_path)
    assert figures["64 B: heapd / malloc"] > 0
    assert 0 < figures["mixed: payload / committed of the arena, worst look"] < 1


def test_frames_arrive_by_every_way(tmp_path: Path) -> None:
    """`frames` hands frames over by heapd and by each of its rivals, and finds the right bytes in all of them."""
    figures = check(run("frames", tmp_path, "--rounds", "1", "--frames", "3"), tmp_path)
    assert figures["6 MiB: heapd / ring of SharedMemory frames"] > 0
    assert figures["64 KiB: heapd, hop, median"] > 0


def test_trace_replays_every_kind_of_event(tmp_path: Path) -> None:
    """`trace` replays malloc, calloc, realloc, free and aligned allocations, on the heap and on malloc."""
    file = tmp_path / "small.trace.gz"
    file.write_bytes(gzip.compress(TRACE.encode()))
    figures = check(run("trace", tmp_path / "results", str(file), "--runs", "1"), tmp_path / "results")
    assert figures["small: events"] == 9
    assert figures["small: peak live"] == pytest.approx((70_000 + 300 + 10 + 70_000) / 1e6)


def test_trace_tells_where_a_file_is_wrong(tmp_path: Path) -> None:
    """A line that is no event is named by file and number, in one line and without a traceback."""
    file = tmp_path / "bad.trace.gz"
    file.write_bytes(gzip.compress(b"a 0 10\nx 1 2\n"))
    done = run("trace", tmp_path, str(file))
    assert done.returncode == 2
    assert "bad.trace.gz, line 2: 'x 1 2' is no event" in done.stderr
    assert "Traceback" not in done.stderr


def test_scale_measures_every_number_of_processes(tmp_path: Path) -> None:
    """`scale` counts pairs of one and of more processes, on heaps of their own and on a shared one."""
    figures = check(run("scale", tmp_path, "--most", "2", "--rounds", "1", "--seconds", "0.02"), tmp_path)
    assert figures["a heap each: 2 processes / 1"] > 0
    assert figures["one shared heap: 2 processes / 1"] > 0


def test_sync_keeps_its_raw_figures(tmp_path: Path) -> None:
    """`scripts/bench sync` is `heapd bench sync`, with the JSON among the other results."""
    done = run("sync", tmp_path, "--processes", "1", "--seconds", "0.01", "--runs", "1", "--holds", "10")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("sync-*.json")
    assert len(json.loads(path.read_text())["cells"]) == 7


def test_win32_compares_with_the_heap_underneath(tmp_path: Path) -> None:
    """`win32` has a ratio for serialized heaps and for others."""
    figures = check(run("win32", tmp_path, "--rounds", "1", "--pairs", "200"), tmp_path)
    assert figures["serialized: win32 / heap"] > 0
    assert figures["HEAP_NO_SERIALIZE: win32 / heap"] > 0


def test_the_ledger_is_compared_with_none(tmp_path: Path) -> None:
    """`ledger` sets requests with and without it side by side, and times a restart."""
    figures = check(run("ledger", tmp_path, "--quick", "--rounds", "1", "--blocks", "2000"), tmp_path)
    assert figures["alloc: with / without"] > 0
    assert 0 < figures["restart with 2,000 live blocks, longest"] < 2


def test_restart_measures_the_gap_with_few_blocks_and_with_many(tmp_path: Path) -> None:
    """`restart` kills the server under requests, and counts what a client allocates meanwhile."""
    figures = check(run("restart", tmp_path, "--kills", "1", "--age", "0", "--blocks", "5000"), tmp_path)
    assert 0 < figures["gap, median"] <= figures["gap, longest"]
    assert figures["gap with 5,000 live blocks, longest"] > 0
    assert figures["alloc + free while there was no server"] >= 1000
