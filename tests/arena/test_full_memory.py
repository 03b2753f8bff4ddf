"""A real /dev/shm that is really full: a small tmpfs mounted over it in a namespace of the test's own.

Full memory must be an error at alloc, whole and with advice; never a SIGBUS, never a block half there.
"""

from __future__ import annotations

import pytest

from tests.small_machine import run_with_small_shm

PRELUDE = """
import os, sys
from heapd.arena import Arena, Budget, Headroom
from heapd.errors import HeapFullError
from heapd.heap import Heap
from heapd.units import MIB, PAGE_SIZE
from tests.invariants import check_arena, check_heap
from tests.arenas import finish

assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 8 * MIB

def new_heap(arena, maximum=0):
    arena.prepare_control(0)
    return Heap(arena, 0, maximum=maximum)

def blind(arena):
    "A budget that believes in plenty: what refuses is the system itself, by ENOSPC."
    arena.budget._measure = lambda: Headroom(1 << 40, "shm")
    arena.budget._allowance = 1 << 40
    arena.budget._read_ns = 1 << 62

def fill_up(heap, size, grants):
    try:
        while True:
            grant = heap.alloc(size, 1)
            heap.arena.segment.buffer[grant.address:grant.address + size] = b"x" * size
            grants.append(grant)
    except HeapFullError as error:
        return error
"""


def run_full(body: str) -> None:
    """Run a script with an 8 MiB /dev/shm of its own."""
    run_with_small_shm(PRELUDE + body)


@pytest.mark.parametrize("sees", ["the budget", "the system"])
@pytest.mark.parametrize("size", [500, 3000, 8192, 100_000, 1 << 20])
def test_allocs_until_it_is_full_end_in_an_error_and_every_block_can_be_written(size: int, sees: str) -> None:
    """Refused by the budget beforehand or by ENOSPC: the heap is sound, its blocks are whole, and a free makes room."""
    run_full(
        f"""
arena = Arena.create("heapd-full", reserve=64 * MIB, commit_limit=1 << 40)
if {sees!r} == "the system":
    blind(arena)
heap, grants = new_heap(arena), []
error = fill_up(heap, {size}, grants)
assert error.bound == "memory" and "free blocks" in str(error), error
check_heap(heap)
check_arena(arena, [heap])
assert len(grants) * {size} > 5 * MIB, len(grants)
for grant in grants:
    assert bytes(arena.segment.buffer[grant.address:grant.address + {size}]) == b"x" * {size}
for grant in grants[: len(grants) // 2]:
    heap.free(grant.address, grant.generation)
again = []
fill_up(heap, {size}, again)
assert len(again) >= 0.98 * (len(grants) // 2) - 1, (len(again), len(grants))
for grant in again + grants[len(grants) // 2:]:
    heap.free(grant.address, grant.generation)
finish(heap.compact())
check_arena(arena, [heap])
arena.stop()
print("ok")
"""
    )


def test_a_block_larger_than_what_is_left_is_refused_whole() -> None:
    """posix_fallocate rolls back; so do we, slices and all; others are served."""
    run_full(
        """
arena = Arena.create("heapd-full", reserve=256 * MIB, commit_limit=1 << 40)
blind(arena)
heap = new_heap(arena)
small = heap.alloc(MIB, 1)
arena.segment.buffer[small.address:small.address + MIB] = b"y" * MIB
before = heap.space.committed
for size in (8 * MIB, 20 * MIB, 100 * MIB):
    try:
        finish(heap.alloc_in_slices(size, 1) if size > 16 * MIB else heap.alloc(size, 1))
    except HeapFullError:
        arena.settle_all()
        check_heap(heap)
        check_arena(arena, [heap])
        assert heap.space.committed == before
    else:
        raise AssertionError(size)
heap.alloc(5 * MIB, 1)
assert bytes(arena.segment.buffer[small.address:small.address + MIB]) == b"y" * MIB
print("ok")
"""
    )


def test_memory_that_others_fill_up_is_seen() -> None:
    """Another program's file in /dev/shm: refused while it is there, with fitting advice, served when it is gone."""
    run_full(
        """
arena = Arena.create("heapd-full", reserve=64 * MIB, commit_limit=1 << 40)
heap = new_heap(arena)
heap.alloc(100, 1)
with open("/dev/shm/stranger", "wb") as stranger:
    os.posix_fallocate(stranger.fileno(), 0, 6 * MIB)
try:
    heap.alloc(4 * MIB, 1)
except HeapFullError as error:
    assert "--shm-size" in str(error) and "/dev/shm" in str(error), error
else:
    raise AssertionError("granted")
check_heap(heap)
os.unlink("/dev/shm/stranger")
heap.alloc(4 * MIB, 1)
check_arena(arena, [heap])
print("ok")
"""
    )


def test_an_arena_that_does_not_fit_is_not_made() -> None:
    """Not even its tables: no segment is left."""
    run_full(
        """
with open("/dev/shm/stranger", "wb") as stranger:
    os.posix_fallocate(stranger.fileno(), 0, 8 * MIB)
try:
    Arena.create("heapd-full", reserve=64 * MIB, commit_limit=1 << 40)
except HeapFullError:
    assert os.listdir("/dev/shm") == ["stranger"], os.listdir("/dev/shm")
print("ok")
"""
    )


def test_the_default_limit_fits_a_small_dev_shm() -> None:
    """As in a container with docker's default of 64 MiB: told at the limit, before anything is full."""
    run_full(
        """
arena = Arena.create("heapd-full", reserve=64 * MIB)
assert 6 * MIB < arena.budget.limit < 8 * MIB
heap, grants = new_heap(arena), []
error = fill_up(heap, 8192, grants)
assert error.bound == "commit", error
check_arena(arena, [heap])
print("ok")
"""
    )
