"""A daemon and its clients on a machine whose shared memory is full: errors of the one kind, no signal, nothing lost.

Each test is a script in namespaces of its own, with 16 MiB of /dev/shm.
"""

from __future__ import annotations

import textwrap

import pytest

from tests.small_machine import run_with_small_shm

pytestmark = pytest.mark.usefixtures("runtime_dir")

PRELUDE = """
import os, subprocess, sys
from pathlib import Path
import heapd_client as hc
from heapd.units import KIB, MIB
from tests.harness import Daemon

assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 16 * MIB
directory = Path(os.environ["HEAPD_RUNTIME_DIR"])
daemon = Daemon(directory, "full", ["--commit-limit", "1GiB"])
daemon.status()

def fill_up(heap, size):
    blocks = []
    try:
        while True:
            block = heap.alloc(size)
            block.view[:] = bytes([len(blocks) % 251]) * size
            blocks.append(block)
    except hc.HeapFullError as error:
        return blocks, error

def stranger():
    "Another program takes all that is left."
    left = os.statvfs("/dev/shm")
    with open("/dev/shm/stranger", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize)

def end():
    for session in sessions:
        session.close()
    daemon.check_clean_end()
    assert "Traceback" not in daemon.log, daemon.log
    left = [name for name in os.listdir("/dev/shm") if name != "stranger"]
    assert left == [], left
    print("ok")

sessions = [hc.connect(daemon.endpoint, autostart=False) for _ in range(2)]
one, two = sessions
"""


def run_full(body: str) -> None:
    run_with_small_shm(PRELUDE + textwrap.dedent(body), mebibytes=16)


@pytest.mark.parametrize("size", [3000, 100_000, 3 << 20])
def test_blocks_until_it_is_full(size: int) -> None:
    """HeapFullError says that the machine is short of memory and what to do; every block that was given out is whole,
    the other session's too; what one frees the other can have."""
    run_full(
        f"""
        heap, other = one.create_heap(), two.create_heap(serialize=False)
        theirs = other.alloc_many({size}, 2)
        for block in theirs:
            block.view[:] = b"y" * {size}
        blocks, error = fill_up(heap, {size})
        assert error.bound == "memory" and error.requested >= {size}, error
        assert "/dev/shm" in str(error), error
        assert len(blocks) * {size} >= 6 * MIB, len(blocks)
        for number, block in enumerate(blocks):
            assert block.view == bytes([number % 251]) * {size}
        for block in theirs:
            assert block.view == b"y" * {size}
        assert len(fill_up(other, {size})[0]) <= 1  # a page of its own that was begun
        heap.free_many(blocks[: len(blocks) // 2])
        heap.trim()
        again, _ = fill_up(other, {size})
        assert len(again) >= 0.95 * (len(blocks) // 2) - 1, (len(again), len(blocks))
        assert heap.validate() == other.validate() == []
        end()
        """
    )


def test_every_operation_while_another_program_has_it_all() -> None:
    """What needs memory is refused, whatever it is; what needs none is done; and all of it is done later."""
    run_full(
        """
        heap = one.create_heap("x")
        cached = heap.alloc_many(64, 100)
        heap.free_many(cached)
        block, large = heap.alloc(500), heap.alloc(2 * MIB)
        large.view[:] = b"z" * (2 * MIB)
        stranger()
        calls = {
            "alloc": lambda: heap.alloc(300_000),
            "a large one": lambda: heap.alloc(40 * MIB),
            "alloc_many": lambda: heap.alloc_many(5000, 50),
            "grow": lambda: large.realloc(3 * MIB),
            "a heap": lambda: one.create_heap(initial=MIB),
            "a fixed heap": lambda: one.create_heap(maximum=4 * MIB),
        }
        for name, call in calls.items():
            before = heap.statistics().busy
            try:
                call()
            except hc.HeapFullError as error:
                assert error.bound == "memory", (name, error)
            else:
                raise AssertionError(name)
            assert heap.statistics().busy == before, name
        for _ in range(200):
            heap.alloc(64).free()  # from the cache
        assert two.open_heap("x").statistics().busy_blocks == 2
        with hc.connect(daemon.endpoint, autostart=False) as third:
            assert third.open(large.handle).view[-1] == ord("z")
        large.view[:] = b"!" * (2 * MIB)
        large.realloc(MIB)
        heap.publish("name", block)
        assert heap.validate() == []
        os.unlink("/dev/shm/stranger")
        for call in calls.values():
            if call is not calls["a large one"]:
                call()
        assert heap.validate() == []
        end()
        """
    )


def test_clients_that_fill_it_up_together() -> None:
    """Three processes at once, in sizes of their own: each ends by itself, none by a signal, and the rest is served."""
    run_full(
        """
        program = '''
        import random, sys
        import heapd_client as hc
        generator = random.Random(int(sys.argv[2]))
        refused, blocks = 0, []
        with hc.connect(sys.argv[1], autostart=False) as session:
            heap = session.create_heap(serialize=False)
            while refused < 20:
                size = int(200_000 ** generator.random())
                try:
                    block = heap.alloc(size)
                except hc.HeapFullError as error:
                    assert error.bound == "memory", error
                    refused += 1
                    for block in generator.sample(blocks, len(blocks) // 2):
                        blocks.remove(block)
                        block.free()
                    continue
                block.view[:] = bytes([size % 251]) * size
                blocks.append(block)
            for block in blocks:
                assert block.view == bytes([block.size % 251]) * block.size
            assert heap.validate() == []
        '''
        import textwrap
        mine = one.create_heap().alloc(MIB)
        mine.view[:] = b"m" * MIB
        children = [
            subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), daemon.endpoint, str(seed)])
            for seed in range(3)
        ]
        assert [child.wait(50) for child in children] == [0, 0, 0]
        assert mine.view == b"m" * MIB
        one.create_heap().alloc(8 * MIB)
        end()
        """
    )


def test_a_daemon_that_does_not_fit_says_so() -> None:
    """Where not even the tables fit: one line, nothing left."""
    run_full(
        """
        while sessions:
            sessions.pop().close()
        assert daemon.stop() == 0
        stranger()
        late = Daemon(directory, "late")
        code = late.process.wait(10)
        assert code > 0 and "Traceback" not in late.log and "/dev/shm" in late.log, (code, late.log)
        os.unlink("/dev/shm/stranger")
        end()
        """
    )
