"""Attaching: only the very segment that the daemon named, and only if nobody else can have made it."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.layout import H_VERSION
from heapd_client import errors
from heapd_client.mapping import Mapping
from tests.harness import Daemon, unique_name

SIZE = 1 << 20


@pytest.fixture
def impostor() -> Iterator[Path]:
    """A file in /dev/shm that is no arena."""
    path = Path("/dev/shm") / f"heapd-{unique_name()}"
    path.write_bytes(b"")
    path.chmod(0o600)
    os.truncate(path, SIZE)
    yield path
    path.unlink(missing_ok=True)


def test_a_segment_that_is_missing_is_refused() -> None:
    """SegmentError, an OSError."""
    with pytest.raises(OSError, match="cannot be opened"):
        Mapping("heapd-none-such", SIZE, bytes(16))


def test_a_segment_without_an_arena_is_refused(impostor: Path) -> None:
    """Zeros are no header."""
    with pytest.raises(errors.SegmentError, match="no arena"):
        Mapping(impostor.name, SIZE, bytes(16))


def test_a_segment_that_others_can_reach_is_refused(impostor: Path) -> None:
    """Open to others, of a second name, of another size, removed, or a symlink."""
    impostor.chmod(0o666)
    with pytest.raises(errors.SegmentError, match="private"):
        Mapping(impostor.name, SIZE, bytes(16))
    impostor.chmod(0o600)
    twin = impostor.with_name(impostor.name + "-twin")
    try:
        os.link(impostor, twin)
        with pytest.raises(errors.SegmentError, match="second name"):
            Mapping(impostor.name, SIZE, bytes(16))
        twin.unlink()
        twin.symlink_to(impostor)
        with pytest.raises(errors.SegmentError, match="cannot be opened"):
            Mapping(twin.name, SIZE, bytes(16))
    finally:
        twin.unlink(missing_ok=True)
    with pytest.raises(errors.SegmentError, match="bytes"):
        Mapping(impostor.name, 2 * SIZE, bytes(16))
    with pytest.raises(errors.SegmentError):
        Mapping("../shm/" + impostor.name, SIZE, bytes(16))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a file away")
def test_another_users_segment_is_refused(impostor: Path) -> None:
    """A name that somebody else made first is not trusted."""
    os.chown(impostor, 65_534, -1)
    with pytest.raises(errors.SegmentError, match="private"):
        Mapping(impostor.name, SIZE, bytes(16))


def test_another_daemons_arena_is_refused(session: hc.Session) -> None:
    """The instance must be the one of hello."""
    with pytest.raises(errors.SegmentError, match="another"):
        Mapping(session.segment, session.arena.size, bytes(16))


def test_another_layout_is_refused(session: hc.Session) -> None:
    """VersionError says which one is where."""
    words = session.arena.words
    version = words[H_VERSION]
    words[H_VERSION] = version + 1
    try:
        with pytest.raises(errors.VersionError, match=str(version + 1)):
            Mapping(session.segment, session.arena.size, session.instance)
    finally:
        words[H_VERSION] = version


def test_a_refused_segment_leaks_no_descriptor(impostor: Path) -> None:
    """Whatever was wrong with it."""
    before = len(os.listdir("/proc/self/fd"))
    for size in (SIZE, 2 * SIZE):
        for _ in range(5):
            with pytest.raises(errors.SegmentError):
                Mapping(impostor.name, size, bytes(16))
    assert len(os.listdir("/proc/self/fd")) == before


def test_sessions_leak_neither_descriptors_nor_mappings(shared_daemon) -> None:  # type: ignore[no-untyped-def]
    """Opened and closed many times, a process is as it was."""
    import gc

    def traces() -> tuple[int, int]:
        gc.collect()
        with open("/proc/self/maps") as file:
            return len(os.listdir("/proc/self/fd")), sum("/dev/shm/heapd-" in line for line in file)

    def use() -> None:
        with hc.connect(shared_daemon.endpoint, autostart=False) as session, session.create_heap().alloc(8) as block:
            block.view[:] = b"x" * 8

    use()
    before = traces()
    for _ in range(10):
        use()
    assert traces() == before


def test_closed_sessions_do_not_pile_up(shared_daemon: Daemon) -> None:
    """However many are opened and closed, few of their mappings and descriptors are left, also where the collector is
    off: a process may have 1024 files open, and some 2000 arenas of 64 GiB mapped."""
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for turn in range(100):
            with hc.connect(shared_daemon.endpoint, autostart=False) as session:
                for size in (100, 100_000):
                    block = session.create_heap().alloc(size)
                    block.view[0] = 1
                    block.free()
            if turn % 10 == 0:
                gc.collect(1)
            assert len(os.listdir("/proc/self/fd")) <= before + 40
    finally:
        gc.enable()


def test_an_arena_that_finds_no_address_space_is_told_of(shared_daemon: Daemon) -> None:
    """With its size, and what to do; the limit is the process's own."""
    script = """
import resource, sys
import heapd_client as hc
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
try:
    hc.connect(sys.argv[1], autostart=False)
except hc.errors.SegmentError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, shared_daemon.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"no address space left for the \S+ GiB of the arena .*ulimit -v.*--reserve", done.stdout)
