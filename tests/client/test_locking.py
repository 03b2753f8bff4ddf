"""Heap locks from user code: exclusion, timeouts, counters, dead holders, Ctrl-C at any instant."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import heapd_client as hc
from heapd.layout import C_HOLDER
from heapd_client import errors
from tests.client.programs import in_child, run, wait_for
from tests.interrupts import interrupts


@contextmanager
def held_elsewhere(heap: hc.Heap) -> Iterator[int]:
    """A forked child holds the heap's lock; its pid. It is killed at the end."""
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            heap.lock()
            os.write(go, b"x")
            signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        wait_for(pid)
        os.close(ready)
        os.close(go)


def depth(heap: hc.Heap) -> int:
    """How often this thread holds the heap's lock."""
    return heap._mutex.depth()


def test_a_lock_excludes_other_threads(heap: hc.Heap) -> None:
    """Read, think, write under the lock loses no update."""
    block = heap.alloc(8)
    words = block.view.cast("Q")

    def count() -> None:
        for _ in range(300):
            with heap.lock():
                value = words[0]
                time.sleep(0)
                words[0] = value + 1

    words[0] = 0
    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert words[0] == 1_200


def test_a_lock_is_recursive(heap: hc.Heap) -> None:
    """Its holder may take it again, and use the heap under it."""
    with heap.lock() as outer, heap.lock(timeout=0):
        assert not outer.recovered
        heap.alloc(8).free()
        assert depth(heap) == 2
    assert depth(heap) == 0


def test_lock_and_unlock_pair(heap: hc.Heap) -> None:
    """Without `with`, as HeapLock and HeapUnlock; one unlock too many is refused."""
    heap.lock()
    assert depth(heap) == 1
    assert heap.mapping.words[heap._control + C_HOLDER] == heap.session.number << 32 | os.getpid()
    heap.unlock()
    assert depth(heap) == 0
    assert heap.mapping.words[heap._control + C_HOLDER] == 0
    with pytest.raises(errors.LockNotHeldError):
        heap.unlock()


def test_a_held_lock_times_out_and_names_its_holder(heap: hc.Heap) -> None:
    """The error is a TimeoutError with the holder's process id, within the timeout."""
    with held_elsewhere(heap) as pid:
        for timeout in (0, 0.05):
            started = time.monotonic()
            with pytest.raises(errors.LockTimeoutError, match=str(pid)) as caught:
                heap.lock(timeout=timeout)
            assert time.monotonic() - started < 5
            assert caught.value.details["holder_pid"] == pid
        assert isinstance(caught.value, TimeoutError)


def test_heap_functions_wait_for_the_lock(shared_daemon, session: hc.Session) -> None:  # type: ignore[no-untyped-def]
    """Each function of a serialized heap is shut out while another process holds it, within the session's timeout."""
    with hc.connect(shared_daemon.endpoint, autostart=False, timeout=0.3) as hasty:
        heap = hasty.create_heap()
        block = heap.alloc(8)
        with held_elsewhere(heap):
            for use in (
                lambda: heap.alloc(8),
                lambda: heap.alloc_many(8, 2),
                block.free,
                lambda: heap.free_many([block]),
                lambda: block.realloc(20),
                lambda: list(heap.walk()),
                heap.validate,
                heap.compact,
            ):
                with pytest.raises(errors.LockTimeoutError):
                    use()
        block.free()
        assert heap.statistics().busy_blocks == 0


def test_an_unserialized_heap_does_not_wait(free_heap: hc.Heap) -> None:
    """HEAP_NO_SERIALIZE: a lock held elsewhere stops nobody."""
    with held_elsewhere(free_heap):
        with free_heap.alloc(8) as block:
            block.realloc(4_000)
        assert free_heap.validate() == []
        free_heap.compact()


def test_the_death_of_a_holder_frees_the_lock_and_is_told(heap: hc.Heap) -> None:
    """The kernel gives the lock up; the next holder, and only that one, learns of it."""
    block = heap.alloc(8)
    before = heap.statistics().recoveries
    with held_elsewhere(heap):
        pass
    with heap.lock(timeout=10) as first:
        assert first.recovered
    with heap.lock(timeout=10) as second:
        assert not second.recovered
    assert heap.validate() == []
    block.free()
    assert heap.statistics().recoveries == before + 1


def test_a_heap_function_recovers_the_lock_as_well(heap: hc.Heap) -> None:
    """A holder's death does not stop alloc."""
    heap.alloc(8).free()
    before = heap.statistics().recoveries
    with held_elsewhere(heap):
        pass
    heap.alloc(8).free()
    assert heap.statistics().recoveries == before + 1


def test_the_counters_count(heap: hc.Heap) -> None:
    """Every acquisition; of them the contended ones, with the time they waited."""
    before = heap.statistics()
    with heap.lock():
        pass
    heap.alloc(8).free()
    after = heap.statistics()
    assert after.acquisitions - before.acquisitions == 3
    assert after.contended == before.contended

    holding = threading.Event()

    def hold() -> None:
        with heap.lock():
            holding.set()
            time.sleep(0.05)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(10)
    with heap.lock():
        pass
    thread.join(10)
    final = heap.statistics()
    assert final.contended == before.contended + 1
    assert 10_000_000 < final.waited_ns - before.waited_ns < 5_000_000_000


def test_a_lock_keeps_the_arena_mapped(shared_daemon) -> None:  # type: ignore[no-untyped-def]
    """Session, heap and mapping may be dropped inside the `with`: the mutex is still there to be given up."""
    session = hc.connect(shared_daemon.endpoint, autostart=False)
    with session.create_heap("kept", persistent=True).lock():
        session.close()
        del session
        gc.collect()
    with hc.connect(shared_daemon.endpoint, autostart=False) as other:
        heap = other.open_heap("kept")
        with heap.lock(timeout=5) as lock:
            assert not lock.recovered
        heap.destroy()


def test_an_interrupted_lock_is_held_iff_its_block_runs(heap: hc.Heap) -> None:
    """A signal handler that raises at any instruction leaves the lock neither lost nor kept."""

    def lock() -> None:
        for _ in range(10):
            with heap.lock():
                pass

    struck = 0
    with interrupts() as attempt:
        for turn in range(3_000):
            struck += attempt(1e-6 * (5 + turn % 40), lock)
            assert depth(heap) == 0
    assert struck > 100


def test_an_interrupted_call_leaves_lock_and_connection_whole(heap: hc.Heap) -> None:
    """Heap functions interrupted anywhere: the lock is free, the next call gets its own answer, nothing is broken."""

    def alloc(size: int) -> None:
        for _ in range(10):
            heap.alloc(size)

    struck = 0
    with interrupts() as attempt:
        for turn in range(600):
            struck += attempt(1e-6 * (20 + turn % 400), alloc, 64 + turn)
            assert depth(heap) == 0
    assert struck > 50
    assert heap.alloc(12_345).size == 12_345
    assert heap.validate() == []


def test_the_child_of_a_holder_does_not_hold(heap: hc.Heap) -> None:
    """A forked child is shut out by its parent's lock like anybody else."""

    def try_lock() -> None:
        with pytest.raises(errors.LockTimeoutError):
            heap.lock(timeout=0.05)
        with pytest.raises(errors.LockNotHeldError):
            heap.unlock()

    with heap.lock():
        assert in_child(try_lock) == 0
        assert depth(heap) == 1


def test_a_call_can_spare_itself_the_mutex(heap: hc.Heap) -> None:
    """Inside `unserialized` this thread's functions get through a lock that others wait for, and nobody else's."""
    block = heap.alloc(100)
    with held_elsewhere(heap):
        with heap.unserialized():
            with heap.unserialized():
                heap.realloc(block, 120)
            heap.free(block)
            assert heap.alloc_slow(50, True, None).size == 50
            assert heap.validate() == []
        heap.session.timeout = 0.05
        with pytest.raises(errors.LockTimeoutError):
            heap.validate()
    assert heap.statistics().busy_blocks == 1


def test_a_heap_that_was_only_looked_at_is_closed_without_its_lock(session: hc.Session, heap: hc.Heap) -> None:
    """As it has nothing to give back: who lists heaps does not wait for somebody's lock."""
    with held_elsewhere(heap), hc.connect(session.endpoint, autostart=False, timeout=1) as other:
        looked_at = other.open_heap_id(heap.id)
        assert looked_at.statistics().busy_blocks == heap.statistics().busy_blocks
        looked_at.close()


@pytest.mark.parametrize(
    "end",
    ["", "raise SystemExit(1)", "session.close()", "heap.close()", "session.close(); del session, heap; gc.collect()"],
)
def test_a_process_that_ends_by_itself_frees_its_locks(session: hc.Session, heap: hc.Heap, end: str) -> None:
    """As one that is killed does: the next holder gets the lock at once, and is told."""
    program = f"""
        import gc, sys
        import heapd_client as hc
        session = hc.connect(sys.argv[1], autostart=False)
        heap = session.open_heap_id(int(sys.argv[2]))
        heap.lock()
        {end}
    """
    ended = run(program, session.endpoint, str(heap.id))
    assert not ended.stderr
    with heap.lock(timeout=5) as lock:
        assert lock.recovered


def test_a_lock_of_a_thread_that_the_end_of_its_process_stopped_is_freed(session: hc.Session, heap: hc.Heap) -> None:
    """A daemon thread, which is in the middle of something for ever."""
    program = """
        import sys, threading
        import heapd_client as hc
        heap = hc.connect(sys.argv[1], autostart=False).open_heap_id(int(sys.argv[2]))
        has_locked = threading.Event()

        def hold():
            heap.lock()
            has_locked.set()
            del globals()["heap"]
            threading.Event().wait()

        threading.Thread(target=hold, daemon=True).start()
        has_locked.wait()
    """
    ended = run(program, session.endpoint, str(heap.id))
    assert (ended.returncode, ended.stderr) == (0, "")
    with heap.lock(timeout=5) as lock:
        assert lock.recovered


def test_a_lock_held_when_its_session_ends_can_do_no_harm(session: hc.Session) -> None:
    """The C library's list of what a thread holds leads through the mutexes: their arena stays mapped. In a child: the
    lock is held for good."""

    def leave_locked() -> None:
        for is_destroyed in (False, True):
            other = hc.connect(session.endpoint, autostart=False)
            heap = other.create_heap()
            heap.lock()
            if is_destroyed:
                heap.destroy()
            other.close()
            del heap, other
            gc.collect()
            with hc.connect(session.endpoint, autostart=False) as another, another.create_heap().lock():
                pass

    assert in_child(leave_locked) == 0
