"""Clients that are slow or stopped (SIGSTOP): nobody else notices, beyond the one lock that such a client holds."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.units import MIB, PAGE_SIZE
from tests.harness import Daemon, wait_until
from tests.server.raw import Program, status

SLOW_S = 2.0  # what an answer to somebody else may take at most, on a loaded machine


@pytest.fixture
def session(daemon: Daemon) -> Iterator[hc.Session]:
    """A bystander."""
    with hc.connect(daemon.endpoint, autostart=False) as session:
        yield session


def stop(client: Program) -> None:
    """SIGSTOP; when this returns it is stopped."""
    os.kill(client.pid, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{client.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def check_served(session: hc.Session) -> None:
    """Requests of every weight are answered in good time."""
    heap = session.create_heap()
    for call in (
        lambda: heap.alloc(100),
        lambda: heap.alloc(20 * MIB).free(),
        lambda: heap.alloc_many(64, 2000),
        heap.validate,
        heap.statistics,
        heap.compact,
        session.sessions,
        heap.destroy,
    ):
        begun = time.monotonic()
        call()
        assert time.monotonic() - begun < SLOW_S, "it kept somebody waiting"


def resident(pid: int) -> int:
    """Bytes of its own that a process has in memory."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * PAGE_SIZE


@pytest.mark.parametrize("request_", ["SessionList()", "HeapWalk(heap)"])
def test_one_that_does_not_read_its_answers(daemon: Daemon, session: hc.Session, request_: str) -> None:
    """Thousands of answers, small or long, that nobody reads: so many are kept, the rest is dropped and counted,
    and asked for again by who wants it; once it reads again, it is served."""
    server = daemon.pid
    body = f"""
    from heapd.wire.messages import HeapWalk, SessionList
    client = RawSession(endpoint)
    heap = client.create_heap()
    for _ in range(200):
        client.alloc(heap, 64)
    tell("stop me")
    for number in range(3000):
        client.send({request_}, 10_000 + number)
    tell("sent")
    client.reconnect()
    client.ask(SessionList())
    """
    with Program(daemon.endpoint, body) as client:
        client.hear("stop me")
        before = resident(server)
        client.go_on()
        client.hear("sent")
        stop(client)
        check_served(session)
        assert resident(server) - before < 128 * MIB, "answers pile up"
        os.kill(client.pid, signal.SIGCONT)
        client.go_on()
        client.hear("ready")
    check_served(session)


def test_one_that_was_stopped_with_requests_under_way(daemon: Daemon, session: hc.Session) -> None:
    """Jobs, a wait for a name, a batch: they are done or not, as ever; its end takes back what nobody heard of."""
    shared = session.create_heap("shared")
    body = """
    from heapd.wire.messages import HeapAlloc, HeapAllocMany, HeapLease, HeapOpen, NameLookup
    client = RawSession(endpoint)
    heap = client.ask(HeapOpen("shared"))[0]
    client.send(NameLookup(heap, "never", 100_000))
    tell("stop me")
    client.send(HeapAlloc(heap, 40 << 20))
    client.send(HeapAllocMany(heap, [3 << 20] * 8))
    client.send(HeapLease(heap, 64, 500))
    tell("sent")
    """
    with Program(daemon.endpoint, body) as client:
        client.hear("stop me")
        client.go_on()
        client.hear("sent")
        stop(client)
        check_served(session)
        assert shared.validate() == []
        client.kill()
        client.reap()
    wait_until(lambda: len(session.sessions()) == 1 + bool(shared.statistics().orphaned_blocks))
    assert shared.statistics().cached_blocks == 0
    assert shared.validate() == []


def test_one_that_holds_a_lock(daemon: Daemon, session: hc.Session) -> None:
    """That heap's functions wait for their own timeout, and the error names the holder; other heaps are served, and
    when it goes on, so does everybody."""
    with hc.connect(daemon.endpoint, autostart=False, timeout=0.3) as impatient:
        heap = session.create_heap("locked")
        theirs = impatient.open_heap("locked")
        kept = theirs.alloc(100)
        body = """
        import heapd_client as hc
        session = hc.connect(endpoint, autostart=False)
        heap = session.open_heap("locked")
        with heap.lock():
            tell("locked")
        tell("unlocked")
        session.close()
        """
        with Program(daemon.endpoint, body) as client:
            client.hear("locked")
            stop(client)
            for call in (lambda: theirs.alloc(100), kept.free, theirs.validate, lambda: theirs.lock(0.1)):
                with pytest.raises(hc.LockTimeoutError) as caught:
                    call()
                assert str(client.pid) in str(caught.value)
            assert impatient.open(kept.handle).size == 100
            check_served(session)
            assert status(daemon.endpoint)["sessions"] == 3
            os.kill(client.pid, signal.SIGCONT)
            client.go_on()
            client.hear("unlocked")
            kept.free()
            assert heap.validate() == []
            client.go_on()
            client.hear("ready")


def test_one_that_is_killed_while_it_is_stopped_with_a_lock(daemon: Daemon, session: hc.Session) -> None:
    """The kernel gives the lock up; the next one is told."""
    heap = session.create_heap("locked")
    body = """
    import heapd_client as hc
    session = hc.connect(endpoint, autostart=False)
    lock = session.open_heap("locked").lock()
    tell("locked")
    """
    with Program(daemon.endpoint, body) as client:
        client.hear("locked")
        stop(client)
        with pytest.raises(hc.LockTimeoutError):
            heap.lock(0.05)
        client.kill()
        client.reap()
        with heap.lock(5) as held:
            assert held.recovered
        heap.alloc(100)
        assert heap.validate() == []
