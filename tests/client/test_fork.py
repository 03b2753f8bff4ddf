"""Other processes: forked ones that inherit a session, and ones that get Blocks and Heaps by pickle."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import threading

import pytest

import heapd_client as hc
from heapd_client import errors
from tests.client import programs
from tests.client.programs import in_child, wait_for
from tests.harness import Daemon, wait_until

METHODS = ("fork", "spawn", "forkserver")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_a_forked_child_has_a_session_of_its_own(session: hc.Session) -> None:
    """At its first call; number and default heap are its own, the daemon sees both processes."""
    heap = session.create_heap("shared")
    mine = session.default_heap.id
    parent, number = os.getpid(), session.number

    def work() -> None:
        assert session.number != number
        assert session.pid != parent
        assert session.default_heap.id != mine
        assert {info.pid for info in session.sessions()} >= {parent, os.getpid()}
        heap.alloc(8).free()

    assert in_child(work) == 0
    assert session.number == number
    assert session.default_heap.id == mine


def test_a_forked_child_uses_inherited_blocks(session: hc.Session) -> None:
    """It reads, writes, resizes and frees what its parent allocated; the parent sees it."""
    heap = session.create_heap("shared")
    block, other = heap.alloc(5), heap.alloc(5)
    block.view[:] = b"parnt"

    def work() -> None:
        assert bytes(block.view) == b"parnt"
        block.view[:] = b"child"
        other.free()
        heap.publish("from the child", heap.alloc(3))

    assert in_child(work) == 0
    assert bytes(block.view) == b"child"
    with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
        other.free()
    assert heap.lookup("from the child").size == 3
    assert heap.validate() == []


def test_a_child_without_calls_opens_no_session(session: hc.Session) -> None:
    """A fork alone is no session; nor does the child's end disturb the parent's."""
    before = len(session.sessions())
    assert in_child(lambda: None) == 0
    assert len(session.sessions()) == before
    assert session.create_heap().alloc(8).size == 8


def test_a_fork_while_other_threads_call_is_safe(session: hc.Session) -> None:
    """No lock of another thread's, no socket of the parent's holds the child up."""
    heap = session.create_heap("busy", serialize=False)
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            heap.alloc(64).free()

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            assert in_child(lambda: heap.alloc(8).free()) == 0
    finally:
        done.set()
        for thread in threads:
            thread.join(10)


def test_a_grandchild_works_too(session: hc.Session) -> None:
    """Each generation has its own session."""
    heap = session.create_heap("family")

    def child() -> None:
        heap.alloc(1)
        assert in_child(lambda: (heap.alloc(2), None)[1]) == 0
        heap.alloc(3)

    assert in_child(child) == 0
    assert heap.statistics().busy_blocks == 3


def test_a_childs_close_leaves_the_parent_alone(session: hc.Session) -> None:
    """Closing the inherited session object closes the child's."""
    heap = session.create_heap("ours")

    def work() -> None:
        heap.alloc(8)
        session.close()
        with pytest.raises(errors.ClosedError):
            heap.alloc(8)

    assert in_child(work) == 0
    assert heap.alloc(8).size == 8


def test_a_killed_childs_private_heap_goes(session: hc.Session) -> None:
    """kill -9: its anonymous heap is taken back, what it allocated in a shared one stays and is listed as orphaned."""
    heap = session.create_heap("shared")
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            session.create_heap().alloc(100)
            heap.alloc(100)
            os.write(go, b"x")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    assert len(session.heaps()) == 2
    os.kill(pid, signal.SIGKILL)
    assert wait_for(pid) == -signal.SIGKILL
    wait_until(lambda: len(session.heaps()) == 1)
    assert heap.statistics().orphaned_blocks == 1
    os.close(ready)
    os.close(go)


def test_blocks_and_heaps_pickle_in_one_process(session: hc.Session) -> None:
    """A heap comes back as the same object, a block as one for the same bytes, without a new session."""
    heap = session.create_heap()
    block = heap.alloc(5)
    block.view[:] = b"hello"
    assert pickle.loads(pickle.dumps(heap)) is heap
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert bytes(pickle.loads(pickle.dumps(block, protocol)).view) == b"hello"
    assert len(session.sessions(os.getpid())) == 1
    text = pickle.dumps(block)
    block.free()
    with pytest.raises(errors.StaleHandleError):
        pickle.loads(text)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_reach_a_pool_of_processes(session: hc.Session, method: str) -> None:
    """multiprocessing.Pool, whichever way it starts its processes: workers work in place."""
    heap = session.create_heap("pool")
    blocks = heap.alloc_many(1000, 4)
    for number, block in enumerate(blocks):
        block.view[:] = bytes([number]) * 1000
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(programs.add_up, blocks) == [number * 1000 for number in range(4)]
        handles = pool.starmap(programs.allocate_in, [(heap, b"one"), (heap, b"three")])
        pool.close()
        pool.join()
    assert [block.view[0] for block in blocks] == [1, 2, 3, 4]
    assert [bytes(session.open(handle).view) for handle in handles] == [b"one", b"three"]


@pytest.mark.parametrize("method", METHODS)
def test_blocks_reach_an_executor(session: hc.Session, method: str) -> None:
    """concurrent.futures, all three start methods; a worker keeps one session for all it is sent."""
    heap = session.create_heap("executor")
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        blocks = heap.alloc_many(10, 5)
        for block in blocks:
            block.view[:] = b"\x01" * 10
        assert [executor.submit(programs.add_up, block).result(30) for block in blocks] == [10] * 5
        _, sessions = executor.submit(programs.who, None).result(30)
        assert sessions == 1


def test_a_session_does_not_pickle_and_says_what_does(session: hc.Session) -> None:
    """It is one process's own. TypeError, as of all that Python cannot pickle; whatever heaps it has open."""
    session.create_heap().alloc(8)
    with pytest.raises(TypeError, match="hand over its heaps and blocks"):
        pickle.dumps(session)


def test_what_is_unpickled_without_a_daemon_says_so(start_daemon) -> None:  # type: ignore[no-untyped-def]
    """DaemonNotFoundError, and no daemon is started for it."""
    daemon: Daemon = start_daemon()
    with hc.connect(daemon.endpoint, autostart=False) as session:
        text = pickle.dumps(session.create_heap().alloc(8))
    daemon.stop()
    with pytest.raises(errors.DaemonNotFoundError):
        pickle.loads(text)
