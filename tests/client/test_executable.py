"""Executable heaps: machine code runs in their blocks, and nowhere else."""

from __future__ import annotations

import ctypes
import platform

import pytest

import heapd_client as hc
from heapd_client import errors, mapping

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
