"""`heapd gc`: what it prints, what it removes, and when it fails."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import heapd_client as hc
from heapd.cli import gc
from tests.cli.conftest import Heapd
from tests.conftest import StartDaemon
from tests.harness import Daemon, unique_name


@pytest.fixture
def killed(start_daemon: StartDaemon) -> Daemon:
    daemon = start_daemon()
    daemon.kill()
    return daemon


def test_a_dry_run_lists_and_removes_nothing(heapd: Heapd, killed: Daemon) -> None:
    """What would go, with its size; then it goes, and then there is nothing."""
    options = (killed.name, "--runtime-dir", killed.directory)
    out = heapd("gc", *options, "--dry-run").out
    assert f"/dev/shm/{min(killed.segments())}" in out
    assert killed.endpoint in out
    assert "2 would be removed" in out
    assert killed.segments()
    assert "2 removed" in heapd("gc", *options).out
    assert killed.segments() == []
    assert heapd("gc", *options).out == "nothing is left behind\n"


def test_what_is_wanted_is_kept_unless_by_force(heapd: Heapd, start_daemon: StartDaemon) -> None:
    """With who wants it, and how to remove it all the same."""
    daemon = start_daemon()
    session = hc.connect(daemon.endpoint, autostart=False)
    try:
        daemon.kill()
        out = heapd("gc", daemon.name).out
        assert f"kept: /dev/shm/{session.segment} (" in out
        assert "has it mapped" in out
        assert "1 kept" in out
        assert "--force removes it" in out
        assert daemon.segments()
        assert "removed" in heapd("gc", daemon.name, "--force").out
        assert daemon.segments() == []
    finally:
        session.close()


def test_programs_get_it_as_json(heapd: Heapd, killed: Daemon) -> None:
    """Kind, path, files, size in bytes, who wants it, outcome."""
    answer = heapd("gc", killed.name, "--dry-run", "--json").json
    [arena] = [leftover for leftover in answer if leftover["kind"] == "arena"]
    assert arena["outcome"] == "would be removed"
    assert (arena["wanted"], arena["pids"]) == ("", [])
    assert sorted(arena["files"]) == sorted(f"/dev/shm/{name}" for name in killed.segments())
    assert heapd("gc", unique_name(), "--json").json == []


def test_what_cannot_be_removed_makes_it_fail(heapd: Heapd, killed: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 1 and the system's reason; the others are removed all the same."""

    def refuse(leftover: Any, **options: Any) -> bool:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(gc, "remove_leftover", refuse)
    assert "failed: Read-only file" in heapd("gc", killed.name, status=1).out
