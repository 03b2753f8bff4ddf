"""The demo's files: which are found, how they are cut into batches, what examining one finds."""

from __future__ import annotations

import hashlib
import os
import random
from itertools import chain
from pathlib import Path

import pytest

from heapd.units import MIB
from heapd.workloads import WorkloadError
from heapd.workloads.corpus import (
    Finding,
    batches,
    check_folder,
    examine,
    pack_findings,
    scan,
    standard_library,
    unpack_findings,
)


@pytest.mark.parametrize("data", [b"", b"one", b"one two\nthree \t four\n\n", bytes(range(256)), b"\n" * 7])
def test_examine_agrees_with_bytes_methods(data: bytes) -> None:
    """Lines, words and digest, of bytes and of a view alike."""
    expected = Finding(data.count(b"\n"), len(data.split()), hashlib.sha256(data).digest())
    assert examine(data) == examine(memoryview(bytearray(data))) == expected


def test_findings_survive_packing() -> None:
    """Packed and unpacked they are the same, by file index."""
    findings = {index: examine(os.urandom(index * 10)) for index in (0, 5, 70_000)}
    assert unpack_findings(pack_findings(findings.items())) == findings


def test_batches_cover_every_file_once_in_order() -> None:
    """No file is left out or twice; a batch is at most 64 files, and more than 1 MiB only if it is one file."""
    rng = random.Random(4)
    for count in (0, 1, 2, 63, 64, 65, 3000):
        sizes = [int(2 ** rng.uniform(0, 22)) for _ in range(count)]
        found = list(batches(sizes))
        assert list(chain.from_iterable(found)) == list(range(count))
        for batch in found:
            assert 1 <= len(batch) <= 64
            assert len(batch) == 1 or sum(sizes[index] for index in batch) <= MIB


def test_scan_finds_files_and_skips_what_cannot_be_read(tmp_path: Path) -> None:
    """Regular files of all subfolders, sorted; links that lead nowhere and pipes are counted."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"12345")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    found = scan(tmp_path, sources_only=False)
    assert [os.path.relpath(path, tmp_path) for path in found.paths] == ["a", "link", "b/x"]
    assert (found.sizes, found.total, found.skipped) == ([0, 0, 5], 5, 2)


def test_sources_only_leaves_out_installed_packages(tmp_path: Path) -> None:
    """*.py files, and nothing below site-packages."""
    (tmp_path / "site-packages").mkdir()
    for name in ("a.py", "b.txt", "site-packages/c.py"):
        (tmp_path / name).write_text("x")
    assert [Path(path).name for path in scan(tmp_path, sources_only=True).paths] == ["a.py"]


def test_the_standard_library_is_where_os_is() -> None:
    """The default folder holds this Python's own sources."""
    assert (standard_library() / "os.py").is_file()


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    """Missing, a file, empty: each has its own sentence."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkloadError, match="there is no folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(WorkloadError, match="is no folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(WorkloadError, match="holds no file"):
        scan(tmp_path / "empty", sources_only=False)
