"""What scripts/test answers: its exit status is all that a CI looks at."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run_with_stand_ins(tmp_path: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of scripts/test whose set-up does nothing and whose Python is this shell text."""
    scripts, interpreter = tmp_path / "scripts", tmp_path / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    scripts.mkdir()
    shutil.copy(ROOT / "scripts/test", scripts)
    for path, text in ((scripts / "setup", ""), (scripts / "check", ""), (interpreter, python)):
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HEAPD_")}
    return subprocess.run([scripts / "test"], env=environ, capture_output=True, text=True, timeout=20, check=False)


def test_it_succeeds_when_both_halves_do(tmp_path: Path) -> None:
    """Both halves' output is shown, and the status is 0."""
    told = run_with_stand_ins(tmp_path, 'case "$*" in *--ignore*) echo one;; *) echo other;; esac')
    assert (told.returncode, told.stdout, told.stderr) == (0, "one\nother\n", "")


@pytest.mark.parametrize("half", ["--ignore", "no:cacheprovider"])
def test_it_fails_when_a_half_does(tmp_path: Path, half: str) -> None:
    """Whichever it is."""
    told = run_with_stand_ins(tmp_path, f'case "$*" in *{half}*) exit 3;; esac')
    assert told.returncode == 3
