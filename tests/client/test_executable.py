"""Executable heaps: machine code runs in their blocks, and nowhere else."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap

import pytest

import heapd_client as hc
from heapd.manager import executable
from heapd_client import errors, mapping
from tests.client.programs import in_child, run

RETURN_42 = b"\xb8\x2a\x00\x00\x00\xc3"  # mov eax, 42; ret

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the machine code is x86-64's")


def protections(session: hc.Session, block: hc.Block) -> str:
    """How the kernel has the block's first page mapped here: "rw-s", "rwxs"."""
    pointer = session.arena.pointer + block.address
    with open("/proc/self/maps") as file:
        for line in file:
            span, modes = line.split()[:2]
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= pointer < end:
                return modes
    raise AssertionError("the block is not mapped")


def call(session: hc.Session, block: hc.Block) -> int:
    function = ctypes.CFUNCTYPE(ctypes.c_int)(session.arena.pointer + block.address)
    return int(function())


def call_in_child(session: hc.Session, block: hc.Block) -> int:
    """What becomes of a forked child that calls what is in the block; 0: it got 42."""

    def work() -> None:
        faulthandler.disable()  # pytest's: a fault is what some of these tests are after
        assert call(session, block) == 42

    return in_child(work)


@pytest.mark.parametrize("size", [64, 8_192, 100_000])
def test_code_in_an_executable_heap_runs(session: hc.Session, size: int) -> None:
    """A block of any kind, by alloc, alloc_many and realloc."""
    heap = session.create_heap(executable=True)
    for block in (heap.alloc(size), *heap.alloc_many(size, 2), heap.alloc(8).realloc(size)):
        block.view[: len(RETURN_42)] = RETURN_42
        assert call(session, block) == 42


def test_code_runs_in_another_session_too(session: hc.Session) -> None:
    """A block opened by handle is executable where it is opened."""
    block = session.create_heap("code", executable=True).alloc(64)
    block.view[: len(RETURN_42)] = RETURN_42
    with hc.connect(session.endpoint, autostart=False) as other:
        assert call(other, other.open(block.handle)) == 42


def test_other_heaps_are_not_executable(session: hc.Session) -> None:
    """Neither beside an executable heap, nor in pages that one had before."""
    plain = session.create_heap()
    assert protections(session, plain.alloc(64)) == "rw-s"
    heap = session.create_heap(executable=True)
    assert protections(session, heap.alloc(300_000)) == "rwxs"
    heap.destroy()
    for block in (plain.alloc(64), *plain.alloc_many([100_000] * 20), plain.alloc(500_000).realloc(900_000)):
        assert protections(session, block) == "rw-s"


def test_a_system_that_refuses_is_told_at_create(session: hc.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a noexec /dev/shm the mmap fails; the error says so, and no heap is made."""

    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(mapping.mmap, "mmap", refuse)
    with pytest.raises(errors.ExecuteError, match="noexec"):
        session.create_heap("never", executable=True)
    monkeypatch.undo()
    assert "never" not in {info.name for info in session.heaps()}


# What a user would write: code into a block, a function at its address, a call.
RUN_IN_A_BLOCK = """
    import ctypes, sys
    import heapd_client as hc
    endpoint, is_executable = sys.argv[1], sys.argv[2] == "executable"
    with hc.connect(endpoint, autostart=False) as session:
        block = session.create_heap(executable=is_executable).alloc(64)
        block.view[:6] = bytes.fromhex("b82a000000c3")  # mov eax, 42; ret
        function = ctypes.CFUNCTYPE(ctypes.c_int)(session.arena.pointer + block.address)
        print("called", flush=True)
        print(function())
"""


def test_code_runs_or_kills_as_the_heap_was_made(session: hc.Session) -> None:
    """In a process of its own: the call returns 42 from an executable heap; from another one it is a SIGSEGV, which
    ends that process alone."""
    kept = session.create_heap("kept").alloc(64)
    kept.view[:] = b"k" * 64
    good = run(RUN_IN_A_BLOCK, session.endpoint, "executable")
    assert (good.returncode, good.stdout) == (0, "called\n42\n"), good.stderr
    bad = run(RUN_IN_A_BLOCK, session.endpoint, "plain")
    assert (bad.returncode, bad.stdout) == (-signal.SIGSEGV, "called\n"), bad.stderr
    assert bytes(kept.view) == b"k" * 64
    assert kept.heap.validate() == []


def test_beside_an_executable_heap_others_kill_still(session: hc.Session) -> None:
    """The flag is a heap's, not a process's: in one that has both, only one of them runs code; a forked child is no
    different."""
    code = session.create_heap(executable=True).alloc(64)
    data = session.create_heap().alloc(64)
    for block in (code, data):
        block.view[: len(RETURN_42)] = RETURN_42
    assert call_in_child(session, code) == 0
    assert call_in_child(session, data) == -signal.SIGSEGV


def test_pages_that_ran_code_once_do_so_no_more(session: hc.Session) -> None:
    """A block in what was an executable heap's page kills, in a process that had executed there."""
    first = session.create_heap(executable=True)
    places = {block.address for block in first.alloc_many(50_000, 20)}
    first.destroy()
    reused = [block for block in session.create_heap().alloc_many(50_000, 40) if block.address in places]
    assert reused, "no page came back"
    reused[0].view[: len(RETURN_42)] = RETURN_42
    assert call_in_child(session, reused[0]) == -signal.SIGSEGV


# -- a noexec /dev/shm -------------------------------------------------------------------------------------------------
def run_without_exec(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a mount namespace whose /dev/shm is noexec. Skips the test where that is not allowed."""
    remount = "mount -o remount,bind,noexec /dev/shm"
    if subprocess.run(["unshare", "-rm", "sh", "-c", remount], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace may be made here")
    command = shlex.join([sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{remount} && exec {command}"],
        capture_output=True, text=True, timeout=30, env=environment, check=False,
    )  # fmt: skip


def test_a_noexec_shm_is_told_at_create(session: hc.Session) -> None:
    """A real one: no executable heap is made, an existing one gives no block, others work as ever."""
    heap = session.create_heap("code", executable=True)
    handle = heap.alloc(64).handle
    program = """
        import sys
        import heapd_client as hc
        with hc.connect(sys.argv[1], autostart=False) as session:
            heap = session.open_heap("code")
            for attempt in (
                lambda: session.create_heap("never", executable=True),
                lambda: heap.alloc(64),
                lambda: heap.alloc_many(64, 3),
                lambda: session.open(bytes.fromhex(sys.argv[2])),
            ):
                try:
                    print(attempt())
                except hc.errors.ExecuteError as error:
                    print("refused:", error)
            print(len(session.create_heap().alloc_many(100, 5)), session.heaps()[0].name)
    """
    done = run_without_exec(program, session.endpoint, handle.encode().hex())
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert "/dev/shm is mounted noexec" in lines[0]
    assert "remount it with exec" in lines[0]
    assert [line.split(":")[0] for line in lines] == ["refused"] * 4 + ["5 code"]
    assert "never" not in {info.name for info in session.heaps()}
    heap.trim()
    assert (heap.statistics().busy_blocks, heap.validate()) == (1, [])


def test_a_daemon_on_a_noexec_shm_says_so_itself() -> None:
    """Whoever asks it without asking the system first gets the same answer."""
    executable.check_executable()
    program = """
        from heapd.errors import ExecuteError
        from heapd.manager.executable import check_executable
        try:
            check_executable()
        except ExecuteError as error:
            print(error)
    """
    assert "/dev/shm is mounted noexec" in run_without_exec(program).stdout
