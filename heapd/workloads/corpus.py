"""Files of a folder and what the demo finds out about each: lines, words, SHA-256."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from heapd.units import KIB, MIB
from heapd.workloads import WorkloadError

__all__ = [
    "Corpus",
    "Finding",
    "batches",
    "check_folder",
    "examine",
    "pack_findings",
    "scan",
    "standard_library",
    "unpack_findings",
]

_NEWLINE = re.compile(rb"\n")
_WORD = re.compile(rb"\S+")
_RECORD = struct.Struct("<IQQ32s")
_SMALLEST_BATCH, _LARGEST_BATCH = 256 * KIB, MIB
_MOST_FILES = 64


class Finding(NamedTuple):
    """What examining a file gives: lines (newlines), words (runs of non-blank bytes), digest (SHA-256, 32 bytes)."""

    lines: int
    words: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of a folder that could be read.

    Fields: root, paths (sorted), sizes (bytes, one a path), skipped (files that could not be read).
    """

    root: Path
    paths: list[str]
    sizes: list[int]
    skipped: int

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)


def standard_library() -> Path:
    """The folder of the running Python's own sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def check_folder(root: Path) -> None:
    """Raises: WorkloadError if there is no such folder, or it cannot be read."""
    if not root.is_dir():
        raise WorkloadError(f"{root} is no folder" if root.exists() else f"there is no folder {root}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise WorkloadError(f"the folder {root} cannot be read")


def scan(root: Path, *, sources_only: bool, seen: Callable[[int], object] = lambda count: None) -> Corpus:
    """Read every regular file under `root` once: finds those that can be read, and warms the page cache.

    Args:    sources_only (only *.py, without installed packages), seen (called with the files found so far).
    Raises:  WorkloadError if there is no file in it.
    """
    paths, sizes, skipped = [], [], 0
    for path in _files(root, sources_only):
        size = _read_once(path)
        if size is None:
            skipped += 1
            continue
        paths.append(path)
        sizes.append(size)
        seen(len(paths))
    if not paths:
        left_out = f" that can be read ({skipped} cannot)" if skipped else ""
        raise WorkloadError(f"{root} holds no file{left_out}")
    return Corpus(root, paths, sizes, skipped)


def _files(root: Path, sources_only: bool) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        if sources_only:
            subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
            names = [name for name in names if name.endswith(".py")]
        subfolders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))


def _read_once(path: str) -> int | None:
    """Bytes in the file, None if it cannot be read or is no regular file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb", buffering=0) as file:
            return sum(iter(lambda: len(file.read(1 << 20)), 0))
    except OSError:
        return None


def batches(sizes: list[int]) -> Iterator[range]:
    """Cut the files into stretches of indices that are worth one message: up to 64 files or 1 MiB (both arbitrary),
    less towards the end, so that the last ones keep all workers busy."""
    left = sum(sizes)
    start = held = 0
    for index, size in enumerate(sizes):
        most_bytes = max(_SMALLEST_BATCH, min(_LARGEST_BATCH, left // 16))
        if index > start and (index - start == _MOST_FILES or held + size > most_bytes):
            yield range(start, index)
            left -= held
            start, held = index, 0
        held += size
    if start < len(sizes):
        yield range(start, len(sizes))


def examine(data: bytes | memoryview) -> Finding:
    """Index one file where its bytes are; a memoryview is not copied as a whole."""
    return Finding(len(_NEWLINE.findall(data)), len(_WORD.findall(data)), hashlib.sha256(data).digest())


def pack_findings(findings: Iterable[tuple[int, Finding]]) -> bytes:
    """(file index, finding) pairs as bytes."""
    return b"".join(_RECORD.pack(index, *finding) for index, finding in findings)


def unpack_findings(data: bytes | memoryview) -> dict[int, Finding]:
    """The inverse of `pack_findings`."""
    return {index: Finding(*rest) for index, *rest in _RECORD.iter_unpack(data)}
