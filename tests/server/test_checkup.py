"""The machine's check-up: on a sound machine everything is in order, and each fault is named with what to do."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from heapd.arena import Headroom
from heapd.errors import SegmentError
from heapd.server import checkup
from heapd.server.checkup import OK, PROBLEM, WARNING, Finding, check_up
from heapd.units import GIB, KIB, MIB

Patch = pytest.MonkeyPatch


def found(check: str) -> list[Finding]:
    return [finding for finding in check_up() if finding.check == check]


def worst(check: str) -> Finding:
    """The finding of the highest level."""
    return max(found(check), key=lambda finding: (OK, WARNING, PROBLEM).index(finding.level))


def refuse(error: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return call


def test_every_check_finds_something_and_faults_come_with_advice() -> None:
    """Whatever this machine is; and nothing is left of what was tried (leakcheck)."""
    findings = list(check_up())
    assert {finding.check for finding in findings} == set(checkup._CHECKS)
    for finding in findings:
        assert finding.found
        assert bool(finding.advice) == (finding.level != OK), finding


def test_a_machine_that_runs_these_tests_has_no_problem() -> None:
    """A daemon works here, so its check-up says so."""
    assert [finding for finding in check_up() if finding.level == PROBLEM] == []


# -- faults --------------------------------------------------------------------------------------------------------
def statvfs(size: int, left: int, flags: int = 0) -> Callable[[str], Any]:
    return lambda path: SimpleNamespace(f_blocks=size, f_bavail=left, f_frsize=1, f_flag=flags)


@pytest.mark.parametrize(
    ("size", "left", "flags", "level", "advice"),
    [
        (64 * MIB, 64 * MIB, 0, WARNING, "--shm-size"),
        (GIB, 8 * MIB, 0, PROBLEM, "heapd gc"),
        (GIB, GIB, os.ST_NOEXEC, WARNING, "remount,exec"),
        (GIB, GIB, 0, OK, ""),
    ],
)
def test_shared_memory_that_is_small_full_or_noexec(
    monkeypatch: Patch, size: int, left: int, flags: int, level: str, advice: str
) -> None:
    """As in a container, after crashes, on a hardened machine."""
    monkeypatch.setattr(checkup.os, "statvfs", statvfs(size, left, flags))
    monkeypatch.setattr(checkup, "_file_system_of", lambda path: "tmpfs")
    finding = worst("shared memory")
    assert finding.level == level
    assert advice in finding.advice


def test_shared_memory_that_is_not_there(monkeypatch: Patch) -> None:
    """The reason, and how to mount it; the other checks go on."""
    monkeypatch.setattr(checkup.os, "statvfs", refuse(2))
    finding = worst("shared memory")
    assert (finding.level, finding.found) == (PROBLEM, "/dev/shm: No such file or directory")
    assert "mount -t tmpfs" in finding.advice


@pytest.mark.parametrize(
    ("size", "source", "level", "advice"),
    [
        (GIB, "memory", OK, ""),
        (32 * MIB, "cgroup", WARNING, "--memory"),
        (0, "shm", PROBLEM, "/dev/shm"),
        (KIB, "memory", PROBLEM, "other programs"),
    ],
)
def test_the_tightest_bound_on_memory(monkeypatch: Patch, size: int, source: str, level: str, advice: str) -> None:
    """By what a daemon itself would be held to."""
    monkeypatch.setattr(checkup, "measure_headroom", lambda: Headroom(size, source))
    finding = worst("memory")
    assert finding.level == level
    assert advice in finding.advice


@pytest.mark.parametrize(("hard", "level"), [(1024, WARNING), (256, WARNING), (4095, WARNING), (1 << 20, OK)])
def test_descriptors_are_counted_in_clients(monkeypatch: Patch, hard: int, level: str) -> None:
    """A low hard limit means few clients."""
    monkeypatch.setattr(checkup.resource, "getrlimit", lambda which: (256, hard))
    finding = worst("descriptors")
    assert finding.level == level
    assert "about" in finding.found


def test_too_few_descriptors_for_a_daemon(monkeypatch: Patch) -> None:
    """It refuses to start there."""
    monkeypatch.setattr(checkup.resource, "getrlimit", lambda which: (16, 255))
    finding = worst("descriptors")
    assert (finding.level, finding.found) == (PROBLEM, "descriptors: at most 255, and a daemon needs 256")


@pytest.mark.parametrize(("which", "advice"), [(resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_FSIZE, "ulimit -f")])
def test_a_limit_that_an_arena_does_not_fit_in(monkeypatch: Patch, which: int, advice: str) -> None:
    """Each by its name; both are unlimited where nobody set them."""
    real = resource.getrlimit
    monkeypatch.setattr(checkup.resource, "getrlimit", lambda one: (GIB, GIB) if one == which else real(one))
    finding = worst("limits")
    assert finding.level == PROBLEM
    assert advice in finding.advice


def test_an_arena_that_cannot_be_made(monkeypatch: Patch) -> None:
    """The daemon's own words."""

    def create(*arguments: Any, **options: Any) -> Any:
        raise SegmentError("no, said the system")

    monkeypatch.setattr(checkup.Arena, "create", create)
    finding = worst("arena")
    assert finding.level == PROBLEM
    assert "no, said the system" in finding.found


def test_a_kernel_without_pidfds(monkeypatch: Patch) -> None:
    """Or a sandbox that refuses them: no daemon."""
    monkeypatch.setattr(checkup.os, "pidfd_open", refuse(38))
    assert worst("kernel").level == PROBLEM


def test_a_kernel_without_peers_pidfds(monkeypatch: Patch) -> None:
    """Before Linux 6.5: a daemon that believes process ids."""
    monkeypatch.setattr(checkup, "SO_PEERPIDFD", 9999)
    finding = worst("kernel")
    assert finding.level == WARNING
    assert "6.5" in finding.advice


def test_locks_that_do_not_come_back(monkeypatch: Patch) -> None:
    """A C library that does not tell of a dead holder would lose a heap with it."""
    monkeypatch.setattr(checkup.Mutex, "acquire", lambda self, timeout_s=None: False)
    monkeypatch.setattr(checkup.Mutex, "release", lambda self: None)
    assert worst("locks").level == PROBLEM


@pytest.mark.parametrize(("machine", "level"), [("x86_64", OK), ("aarch64", WARNING)])
def test_processors_are_told_apart_by_their_stores(monkeypatch: Patch, machine: str, level: str) -> None:
    """The protocol counts on their order."""
    monkeypatch.setattr(checkup.platform, "machine", lambda: machine)
    assert worst("processor").level == level


def test_another_python(monkeypatch: Patch) -> None:
    """PyPy counts no references."""
    monkeypatch.setattr(checkup.platform, "python_implementation", lambda: "PyPy")
    assert worst("python").level == PROBLEM


def test_a_slow_clock_and_a_wrong_one(monkeypatch: Patch) -> None:
    """Both are warnings: a daemon works."""
    ticks = iter(range(0, 10**12, 10**7))
    monkeypatch.setattr(checkup.time, "perf_counter_ns", lambda: next(ticks))
    monkeypatch.setattr(checkup.time, "time", lambda: 1e9)
    assert [finding.level for finding in found("clock")] == [WARNING, WARNING]


def test_extras_that_are_missing_are_said_and_are_no_fault(monkeypatch: Patch) -> None:
    """With the command that installs them."""
    monkeypatch.setattr(checkup.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'heapd[numpy,plot,metrics]'" in found("libraries")[-1].found
    assert worst("libraries").level == OK


def test_a_runtime_directory_that_others_can_write_to(monkeypatch: Patch, tmp_path: Path) -> None:
    """A problem: no daemon starts there."""
    monkeypatch.setenv("HEAPD_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    finding = worst("directory")
    assert finding.level == PROBLEM
    assert "chmod 700" in finding.found
    tmp_path.chmod(0o700)
    assert "this user's alone" in found("directory")[0].found


@pytest.mark.parametrize(("make", "level"), [(None, PROBLEM), (0o777, WARNING), (0o700, OK)])
def test_the_desktops_runtime_directory(monkeypatch: Patch, tmp_path: Path, make: int | None, level: str) -> None:
    """Named, and gone (after su, or in cron); or open to others."""
    monkeypatch.setenv("HEAPD_RUNTIME_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    if make is not None:
        (tmp_path / "xdg").mkdir()
        (tmp_path / "xdg").chmod(make)
    assert worst("directory").level == level


@pytest.mark.parametrize(
    ("uid", "lingers", "setting", "level"),
    [
        (1000, False, None, WARNING),
        (1000, True, None, OK),
        (1000, False, "RemoveIPC=no", OK),
        (1000, False, "#RemoveIPC=no", WARNING),
        (0, False, None, OK),
    ],
)
def test_shared_memory_that_goes_with_the_last_logout(
    monkeypatch: Patch, uid: int, lingers: bool, setting: str | None, level: str
) -> None:
    """systemd's default for ordinary users, which surprises everybody once."""
    monkeypatch.setattr(checkup.os, "getuid", lambda: uid)
    monkeypatch.setattr(checkup.os.path, "isdir", lambda path: True)
    monkeypatch.setattr(checkup.os.path, "exists", lambda path: lingers)
    monkeypatch.setattr(checkup.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(checkup, "_read", lambda path: setting if path.endswith("logind.conf") else None)
    findings = list(checkup._logout())
    assert findings[0][0] == level
    assert level == OK or "loginctl enable-linger me" in findings[0][2]


def test_a_check_that_cannot_look_says_so(monkeypatch: Patch) -> None:
    """A machine without /proc is a finding, not a traceback."""
    monkeypatch.setattr(socket, "socketpair", refuse(24))
    finding = worst("kernel")
    assert (finding.level, finding.found) == (PROBLEM, "cannot be looked at: [Errno 24] Too many open files")
    assert time.time() > 0
