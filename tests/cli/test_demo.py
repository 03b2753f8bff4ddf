"""`heapd demo`: the main job on a tiny folder, and what users do wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heapd.wire import Endpoint
from tests.cli.conftest import Heapd
from tests.harness import SEGMENTS, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some files: text, none, bytes that are no text, one in a subfolder, one that is larger than a size class."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "text").write_text("one two\nthree\n")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "sub" / "large").write_bytes(b"word \n" * 50_000)
    return tmp_path


def test_the_demo_finds_the_same_three_ways_and_leaves_nothing(heapd: Heapd, folder: Path) -> None:
    """Equal findings, a table of three ways, statistics and a picture; no segment is left (leakcheck: no process)."""
    before = set(os.listdir(SEGMENTS))
    out = heapd("demo", folder, "--workers", 2, "--rounds", 1).out
    assert "equal: all 4 findings agree" in out
    for expected in ("one process", "queue", "shared heap", "MB/s", "reserved", "one character is", "█"):
        assert expected in out
    assert not [name for name in set(os.listdir(SEGMENTS)) - before if name.startswith("heapd-demo")]


def test_more_workers_than_files_is_fine(heapd: Heapd, tmp_path: Path) -> None:
    """Workers that find nothing to do end like the others."""
    (tmp_path / "only").write_text("a b c\n")
    assert "equal: all 1 findings agree" in heapd("demo", tmp_path, "--workers", 3, "--rounds", 1).out


def test_files_that_cannot_be_read_are_skipped_and_counted(heapd: Heapd, folder: Path) -> None:
    """A dangling link and a named pipe do not stop the demo, and are said."""
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    out = heapd("demo", folder, "--workers", 1, "--rounds", 1).out
    assert "4 files" in out
    assert "2 that cannot be read skipped" in out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "there is no folder"),
        (lambda path: path / "file", "is no folder"),
        (lambda path: path / "empty", "holds no file"),
    ],
)
def test_a_folder_that_will_not_do_is_a_clear_error(
    heapd: Heapd, tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    """Missing, a file, empty: one sentence, status 1, before any process is started."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert message in heapd("demo", make(tmp_path), status=1).err


class Running:
    """`heapd demo` in the middle of its work, in a session and with a folder for temporary files of its own.

    Field: process.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        self._temporary = temporary
        self.process = subprocess.Popen(
            [sys.executable, "-m", "heapd", "demo", str(folder), "--workers", "2", "--rounds", "100"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip
        self._segment = wait_until(self._find_segment, 20)

    def _find_segment(self) -> Path | None:
        folders = [str(folder) for folder in self._temporary.glob("heapd-demo-*")]
        paths = [SEGMENTS / Endpoint(folder, "demo").unique_segment for folder in folders]
        return next((path for path in paths if path.exists()), None)

    @property
    def has_segment(self) -> bool:
        return self._segment.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_nothing(folder: Path, runtime_dir: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM, the end of the terminal (which all processes see): all end, the segment goes, no traceback."""
    demo = Running(folder, runtime_dir)
    if number == signal.SIGTERM:
        demo.process.send_signal(number)
    else:
        os.killpg(demo.process.pid, number)
    _, err = demo.process.communicate(timeout=20)
    assert demo.process.returncode == 128 + number
    assert err.strip() == ""
    assert not demo.has_segment
    assert list(runtime_dir.iterdir()) == []


def test_a_killed_demo_leaves_a_folder_that_gc_removes(
    heapd: Heapd, folder: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its daemon ends with it, at once and cleanly; its workers, too (leakcheck)."""
    demo = Running(folder, runtime_dir)
    demo.process.kill()
    demo.process.communicate(timeout=20)
    wait_until(lambda: not demo.has_segment, 10)
    monkeypatch.setattr("tempfile.tempdir", str(runtime_dir))
    [left] = runtime_dir.iterdir()
    wait_until(lambda: "removed" in heapd("gc", "demo").out, 10)
    assert not left.exists()
