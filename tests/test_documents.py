"""The documents in docs/ say what is there: every metric, a unit that systemd accepts and commands that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from heapd.cli import main
from heapd.service.exposition import _COUNTERS, _GAUGES
from heapd.wire import Access

DOCS = Path(__file__).parent.parent / "docs"
MONITORING = (DOCS / "monitoring.md").read_text()


@pytest.mark.parametrize(
    "name", [*(name for name, _ in _GAUGES.values()), *(f"{n}_total" for n, _ in _COUNTERS.values())]
)
def test_every_metric_is_documented(name: str) -> None:
    """By the name that a scrape shows."""
    assert f"`{name}`" in MONITORING


def test_no_other_metric_is_documented() -> None:
    """A name in the table or in an alert is one that exists."""
    known = {name for name, _ in _GAUGES.values()} | {f"{name}_total" for name, _ in _COUNTERS.values()}
    known |= {"heapd_info", "heapd_request_duration_seconds", "heapd_request_duration_seconds_bucket"}
    assert set(re.findall(r"\bheapd_\w+", MONITORING)) <= known


# -- security ------------------------------------------------------------------------------------------------------
def test_the_threat_model_names_the_permissions_that_are_set() -> None:
    """Sockets and arena, for a user alone and for a group; the other tests compare files with the same figures."""
    rows = [line.split("|") for line in (DOCS / "security.md").read_text().splitlines() if line.startswith("| ")]
    cells = {row[1].strip(): [cell.strip().partition(":")[0] for cell in row[2:4]] for row in rows}
    modes = [f"{Access(0).file_mode:04o}", f"{Access(0, 1).file_mode:04o}"]
    assert cells["`NAME.control`, `NAME.work` (sockets)"] == modes
    assert cells["arena, `/dev/shm/heapd-NAME...`"] == modes
    assert cells["runtime directory"] == ["0700", "0750"]


# -- the unit ------------------------------------------------------------------------------------------------------
UNIT = DOCS / "heapd.service"


def test_the_units_command_is_one_that_heapd_knows() -> None:
    """Every option in ExecStart exists."""
    [line] = re.findall(r"^ExecStart=%h/\.local/bin/heapd (\w+) (.*)$", UNIT.read_text(), re.MULTILINE)
    command, options = line
    text = CliRunner().invoke(main, [command, "--help"]).output
    for option in re.findall(r"--[\w-]+", options):
        assert f"{option} " in text


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """Without a word of complaint."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("%h/.local/bin/heapd", "/bin/true"))  # it wants a program that is there
    ended = subprocess.run(
        [analyze, "verify", "--user", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")
