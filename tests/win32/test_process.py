"""What a Win32 process is here: attached or not, its process heap, forks, its end."""

from __future__ import annotations

import gc
import os
import platform
import signal
from pathlib import Path
from typing import Any

import pytest

import heapd_client as hc
from heapd_client import win32
from tests.client.programs import in_child, run
from tests.conftest import StartDaemon
from tests.harness import Daemon
from tests.win32.tools import BEYOND, KIB, MIB, busy, expect, new_heap, read, summary, walk, write


# -- attach and detach -----------------------------------------------------------------------------------------------
def test_a_call_attaches_to_the_default_daemon(shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """$HEAPD_ENDPOINT; and after a detach again."""
    monkeypatch.setenv("HEAPD_ENDPOINT", shared_daemon.endpoint)
    win32.detach()
    for _ in range(2):
        heap = win32.HeapCreate(0, 0, 0)
        assert win32.HeapFree(heap, 0, win32.HeapAlloc(heap, 0, 10))
        win32.detach()
        expect(0, win32.ERROR_INVALID_HANDLE, win32.HeapAlloc, heap, 0, 10)
        win32.detach()
        win32.detach()


def test_a_second_attach_replaces_the_first(attached: str) -> None:
    """The heaps made before are gone; one that fails leaves what was attached."""
    heap = win32.HeapCreate(0, 0, 0)
    with pytest.raises(hc.HeapdError):
        win32.attach("tcp://127.0.0.1:1")
    assert win32.HeapAlloc(heap, 0, 10)
    win32.attach(attached)
    expect(0, win32.ERROR_INVALID_HANDLE, win32.HeapAlloc, heap, 0, 10)


def test_a_session_can_be_attached_and_stays_open(attached: str) -> None:
    """Its heaps are heaps of the process, whichever way they were made; closed, the next call attaches anew."""
    with hc.connect(attached, autostart=False) as session:
        pictures = session.create_heap()
        block = pictures.alloc(100)
        win32.attach(session)
        handles = [0] * 2
        assert win32.GetProcessHeaps(2, handles) == 2
        assert busy(handles[1]) == [(block.address, 100)]
        assert win32.HeapFree(handles[1], 0, block.address)
        with pytest.raises(hc.StaleHandleError):
            block.view  # noqa: B018 - the attribute is the call
        win32.detach()
        assert not session.is_closed


# -- the process heap ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("setting", "reserve", "commit"),
    [
        (None, 1_048_576, 4_096),
        ((2 * MIB, 64 * KIB), 2 * MIB, 64 * KIB),
        ((4 * MIB - 3, 0), 4 * MIB, 4_096),
        ((1, 0), 64 * KIB, 4_096),
    ],
)
def test_the_process_heap_is_reserved_and_committed_as_asked_for(
    attached: str, setting: tuple[int, int] | None, reserve: int, commit: int
) -> None:
    """H-DEFAULT-01: 1 MiB and 4 KiB if nobody says otherwise; rounded up to 4 bytes, then to whole pages."""
    win32.attach(attached, heap=setting)
    found = summary(win32.GetProcessHeap())
    assert (found.cbReserved, found.cbCommitted) == (reserve, commit)


@pytest.mark.parametrize(("text", "reserve"), [("4MiB,16KiB", 4 * MIB), ("2097152", 2 * MIB), ("", MIB)])
def test_the_environment_sets_the_process_heap(
    attached: str, monkeypatch: pytest.MonkeyPatch, text: str, reserve: int
) -> None:
    """$HEAPD_HEAP is "reserve[,commit]"; what attach is given comes first."""
    monkeypatch.setenv("HEAPD_HEAP", text)
    win32.attach(attached)
    assert summary(win32.GetProcessHeap()).cbReserved == reserve
    win32.attach(attached, heap=(8 * MIB, 0))
    assert summary(win32.GetProcessHeap()).cbReserved == 8 * MIB


@pytest.mark.parametrize("text", ["x", "1MiB,2MiB", "1,2,3", "-1", "0,2MiB", ","])
def test_figures_that_are_none_are_refused(attached: str, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """With a message that names the variable, by attach and by a call that attaches."""
    monkeypatch.setenv("HEAPD_HEAP", text)
    with pytest.raises(hc.InvalidArgumentError, match=r"HEAPD_HEAP|process heap"):
        win32.attach(attached)
    assert win32.GetProcessHeap()  # what was attached still is


@pytest.mark.parametrize("heap", [5, (1,), (1.5, 1), ("1MiB", "4KiB"), (4_096, -1), (4_096, 8_192), (1 << 60, 0)])
def test_figures_that_attach_cannot_use_are_refused(attached: str, heap: Any) -> None:
    """Also more than the arena, at once and not at the first use of the process heap."""
    with pytest.raises(hc.InvalidArgumentError, match=r"heap=|process heap"):
        win32.attach(attached, heap=heap)
    assert win32.GetProcessHeap()  # what was attached still is


def test_an_endpoint_of_another_type_is_refused(attached: str) -> None:
    """A TypeError that says what an endpoint is."""
    with pytest.raises(TypeError, match="an endpoint is a str"):
        win32.attach(5)  # type: ignore[arg-type]


def test_a_process_heap_that_finds_no_memory_is_null(start_daemon: StartDaemon) -> None:
    """H-PROC-01: with ERROR_NOT_ENOUGH_MEMORY, and not an exception; once there is memory again, it is made."""
    win32.attach(start_daemon("--commit-limit", "64MiB").endpoint)
    try:
        full = win32.HeapCreate(0, 0, 0)
        for size in (MIB, 4 * KIB):
            while win32.HeapAlloc(full, 0, size):
                pass
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.GetProcessHeap)
        win32.HeapDestroy(full)
        assert win32.GetProcessHeap()
    finally:
        win32.detach()


# -- other processes -------------------------------------------------------------------------------------------------
def test_a_handle_means_the_same_heap_in_every_process(attached: str) -> None:
    """H-CREATE-16, departed from: another process that uses a handle opens the heap, and frees what this one made."""
    with new_heap() as heap:
        block, kept = win32.HeapAlloc(heap, 0, 100), win32.HeapAlloc(heap, 0, 50)
        write(block, b"hello")

        def use() -> None:
            win32.detach()
            win32.attach(attached)
            assert read(block, 5) == b"hello"
            assert win32.HeapSize(heap, 0, block) == 100
            assert win32.HeapFree(heap, 0, block)
            assert win32.HeapReAlloc(heap, 0, kept, 40) == kept
            assert heap in handles()

        assert in_child(use) == 0
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapFree, heap, 0, block)
        assert win32.HeapSize(heap, 0, kept) == 40
        assert busy(heap) == [(kept, 40)]


def handles() -> list[int]:
    found = [0] * win32.GetProcessHeaps(0, None)
    win32.GetProcessHeaps(len(found), found)
    return found


def test_memory_given_out_again_is_not_mistaken(attached: str) -> None:
    """Freed elsewhere and allocated here once more: the address is the new block's, and is freed once."""
    with new_heap() as heap:
        block = win32.HeapAlloc(heap, 0, 100)

        def free() -> None:
            win32.detach()
            win32.attach(attached)
            assert win32.HeapFree(heap, 0, block)

        assert in_child(free) == 0
        again = [win32.HeapAlloc(heap, 0, 100) for _ in range(20)]
        for address in again:
            assert win32.HeapSize(heap, 0, address) == 100
            assert win32.HeapFree(heap, 0, address)
        assert busy(heap) == []


def test_a_forked_child_has_a_process_heap_of_its_own(attached: str) -> None:
    """And no objects in it; the handles of its parent's heaps go on working."""
    heap, default, handle = win32.HeapCreate(0, 0, 0), win32.GetProcessHeap(), win32.GlobalAlloc(win32.GHND, 10)

    def child() -> None:
        assert win32.GetProcessHeap() != default
        assert handles()[0] == win32.GetProcessHeap()
        expect(0, win32.ERROR_INVALID_HANDLE, win32.GlobalLock, handle)
        assert win32.HeapFree(heap, 0, win32.HeapAlloc(heap, 0, 10))

    assert in_child(child) == 0
    assert win32.GlobalLock(handle)
    assert win32.GetProcessHeap() == default


def test_the_heaps_of_a_process_that_dies_go_with_it(attached: str) -> None:
    """S-04: its private heaps are given back; a lock that it held on another one is free, and the heap in order."""
    with new_heap() as heap:
        reading, writing = os.pipe()

        def die() -> None:
            win32.detach()
            win32.attach(attached)
            own = win32.HeapCreate(0, 0, 0)
            win32.HeapAlloc(heap, 0, 77)
            win32.HeapLock(heap)
            os.write(writing, str(own).encode())
            os.kill(os.getpid(), signal.SIGKILL)

        assert in_child(die) == -signal.SIGKILL
        own = int(os.read(reading, 40))
        os.close(reading)
        os.close(writing)
        assert win32.HeapLock(heap)
        assert win32.HeapValidate(heap, 0, None)
        assert [size for _, size in busy(heap)] == [77]
        assert win32.HeapUnlock(heap)
        expect(0, win32.ERROR_INVALID_HANDLE, win32.HeapAlloc, own, 0, 10)


def test_a_handle_left_over_never_becomes_another_heaps(attached: str) -> None:
    """Another process makes a heap where one of this process was: the old handle is no handle to it, until the session
    opens it. And nobody destroys what it has not opened."""
    with hc.connect(attached, autostart=False) as other:
        heap = win32.HeapCreate(0, 0, 0)
        block = win32.HeapAlloc(heap, 0, 100)
        win32.HeapDestroy(heap)
        theirs = other.create_heap()
        assert theirs.info.base == heap
        kept = theirs.alloc(100)
        assert kept.address == block
        for is_attached_anew in (False, True):
            if is_attached_anew:
                win32.attach(attached)
            expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapDestroy, heap)
            expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapFree, heap, 0, block)
        strange = other.create_heap()
        expect(False, win32.ERROR_INVALID_HANDLE, win32.HeapDestroy, strange.info.base)
        win32.process.process().session.open_heap_id(theirs.id)
        assert win32.HeapSize(heap, 0, block) == 100


def test_a_block_of_another_heap_opens_nothing(attached: str) -> None:
    """Asked for by the wrong handle, a block of a heap of another session is refused, and that heap not opened."""
    with hc.connect(attached, autostart=False) as session, new_heap() as heap:
        theirs = session.create_heap().alloc(100)
        count = win32.GetProcessHeaps(0, None)
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapFree, heap, 0, theirs.address)
        assert win32.GetProcessHeaps(0, None) == count
        assert theirs.view.nbytes == 100


# -- the process's end -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["win32.HeapFree(heap, 0, block)", "win32.HeapReAlloc(heap, 0, block + 16, 10)"])
def test_corruption_ends_a_process_that_asked_for_it(attached: str, call: str) -> None:
    """H-INFO-13: from then on, and only such calls; it says why."""
    program = f"""
        import sys
        from heapd_client import win32
        win32.attach(sys.argv[1])
        heap = win32.HeapCreate(0, 0, 0)
        block = win32.HeapAlloc(heap, 0, 100)
        assert win32.HeapFree(heap, 0, block) and not win32.HeapFree(heap, 0, block)
        assert win32.HeapSetInformation(None, win32.HeapEnableTerminationOnCorruption, None, 0)
        assert not win32.HeapFree(heap, 0, {BEYOND}) and not win32.HeapAlloc(heap, 0, -1)
        {call}
    """
    done = run(program, attached)
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert "heap corruption" in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the code is x86-64's")
def test_only_an_executable_heap_executes(attached: str) -> None:
    """H-CREATE-15, S-07: code in its block runs; in any other heap's it ends the process."""
    program = """
        import ctypes, sys
        from heapd_client import win32
        win32.attach(sys.argv[1])
        heap = win32.HeapCreate(int(sys.argv[2]), 0, 0)
        block = win32.HeapAlloc(heap, 0, 64)
        win32.memory(block, 6)[:] = bytes.fromhex("b82a000000c3")  # mov eax, 42; ret
        print(ctypes.CFUNCTYPE(ctypes.c_int)(win32.pointer(block))())
    """
    done = run(program, attached, str(int(win32.HEAP_CREATE_ENABLE_EXECUTE)))
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert run(program, attached, "0").returncode == -signal.SIGSEGV


def test_where_nothing_may_be_executed_create_says_so(attached: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NULL, access denied, and a warning that tells of /dev/shm."""

    def refuse(self: object) -> None:
        raise hc.errors.ExecuteError("/dev/shm is mounted noexec")

    monkeypatch.setattr("heapd_client.mapping.Mapping.check_executable", refuse)
    with pytest.warns(RuntimeWarning, match="noexec"):
        expect(0, win32.ERROR_ACCESS_DENIED, win32.HeapCreate, win32.HEAP_CREATE_ENABLE_EXECUTE, 0, 0)


def test_a_daemon_that_is_gone_is_an_exception(start_daemon: object, tmp_path: Path) -> None:
    """No last error stands for it: the call says what happened and to whom."""
    daemon = start_daemon()  # type: ignore[operator]
    win32.attach(daemon.endpoint)
    heap = win32.HeapCreate(0, 0, 0)
    daemon.stop()
    with pytest.raises(hc.DaemonError):
        win32.HeapCreate(0, 0, 0)
    with pytest.raises(hc.DaemonError):
        walk(heap)
    win32.detach()


def test_a_lock_held_at_detach_is_given_up(attached: str) -> None:
    """Also in a heap that was destroyed; the thread goes on to take others."""
    for is_destroyed in (False, True):
        heap = win32.HeapCreate(0, 0, 0)
        for _ in range(2):
            assert win32.HeapLock(heap)
        if is_destroyed:
            assert win32.HeapDestroy(heap)
        win32.detach()
        gc.collect()
        win32.attach(attached)
        with new_heap() as other:
            assert win32.HeapLock(other)
            assert win32.HeapUnlock(other)
