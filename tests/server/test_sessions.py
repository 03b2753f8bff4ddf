"""Sessions against a real daemon, by a client written by hand: who they belong to, when they end, what is repeated."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from heapd.errors import NoSuchNameError, SessionLostError, WaitTimeoutError
from heapd.layout import LAYOUT_VERSION
from heapd.wire import encode_request
from heapd.wire.messages import (
    HeapAlloc,
    HeapCompact,
    HeapFree,
    HeapOpen,
    Hello,
    NameLookup,
    NamePublish,
    SessionClose,
    SessionList,
)
from tests.harness import Daemon, wait_until
from tests.server.raw import (
    ZMTP_GREETINGS,
    Program,
    RawSession,
    connect_raw,
    hello,
    status,
    zmtp1_message,
    zmtp2_message,
)


@pytest.fixture
def session(daemon: Daemon) -> Iterator[RawSession]:
    """A session of this process, written by hand (and not the client's)."""
    with RawSession(daemon.endpoint) as session:
        yield session


def pidfds_of(pid: int) -> int:
    """How many pidfds a process has open."""
    folder = Path(f"/proc/{pid}/fd")
    return sum("pidfd" in os.readlink(link) for link in folder.iterdir() if link.is_symlink())


def test_a_client_of_forty_lines_allocates_and_frees(session: RawSession) -> None:
    """The protocol needs no library."""
    heap = session.create_heap()
    _slot, address, generation, extent, _fresh = session.alloc(heap, 100)
    assert extent >= 100
    assert session.busy_blocks(heap) == 1
    assert session.ask(HeapFree(heap, address, generation)) is None
    assert session.busy_blocks(heap) == 0


def test_a_session_is_known_by_its_token_alone(session: RawSession) -> None:
    """Any connection that carries it speaks for the session; sessions do not hang on a connection."""
    heap = session.create_heap()
    session.reconnect()
    session.alloc(heap)
    assert session.busy_blocks(heap) == 1


def test_a_guessed_token_is_no_session(session: RawSession) -> None:
    """Tokens are random, all 16 bytes of them."""
    session.token = bytes(16)
    with pytest.raises(SessionLostError):
        session.ask(SessionList())


def test_answers_tell_nothing_of_routing_ids(daemon: Daemon, session: RawSession) -> None:
    """Routing ids are consecutive: who learns one can crash the daemon. The only bytes that are let out are the token
    and the instance."""
    assert {key for key, value in session.greeting.items() if isinstance(value, bytes)} == {"token", "instance"}
    assert not [key for key, value in daemon.status().items() if isinstance(value, bytes)]
    first, second = hello(daemon.endpoint), hello(daemon.endpoint)
    assert len({first["token"][:8], second["token"][:8], first["token"][8:], second["token"][8:]}) == 4


# -- repeats -------------------------------------------------------------------------------------------------------
def test_a_request_repeated_after_a_reconnect_is_executed_once(session: RawSession) -> None:
    """The answer was lost with the connection; the same request over a new one is answered from memory."""
    heap = session.create_heap()
    before = session.greeting["session"]
    session.send(HeapAlloc(heap, 64), 500)
    session.reconnect()
    session.send(HeapAlloc(heap, 64), 500)
    _, code, _ = session.work.receive()
    assert code == 0
    assert session.busy_blocks(heap) == 1
    assert before == session.greeting["session"]


def test_a_job_repeated_over_a_new_connection_answers_there(session: RawSession) -> None:
    """And runs once."""
    heap = session.create_heap()
    session.send(HeapAlloc(heap, 256 << 20), 500)
    session.reconnect()
    session.send(HeapAlloc(heap, 256 << 20), 500)
    request_id, code, _ = session.work.receive()
    assert (request_id, code) == (500, 0)
    assert session.busy_blocks(heap) == 1


# -- long work and waits -------------------------------------------------------------------------------------------
def test_a_long_job_keeps_nobody_waiting(daemon: Daemon, session: RawSession) -> None:
    """Half a gibibyte is committed in slices; a small request that came later is answered before it."""
    heap = session.create_heap()
    with RawSession(daemon.endpoint) as other:
        small = other.create_heap()
        session.send(HeapAlloc(heap, 512 << 20))
        for _ in range(3):
            other.alloc(small)
        assert not session.work.has_answer(0), "the long job was done before three short ones"
        session.work.result()
    assert session.ask(HeapCompact(heap)) >= 0


def test_a_lookup_waits_until_the_name_is_published(daemon: Daemon, session: RawSession) -> None:
    """By another session, and is answered then."""
    heap = session.create_heap("shared")
    slot, address, generation, _, _ = session.alloc(heap, 100)
    with RawSession(daemon.endpoint) as other:
        same = other.ask(HeapOpen("shared"))[0]
        other.send(NameLookup(same, "frame", 60_000))
        other.send(SessionList())  # answered: so the lookup before it was read, and waits
        assert other.work.receive()[1] == 0
        session.ask(NamePublish(heap, "frame", address, generation))
        assert other.work.result() == ["frame", slot, address, generation, 100]


def test_a_lookup_gives_up_at_its_deadline(session: RawSession) -> None:
    """The error is of the kind that says so, and not much later than asked."""
    heap = session.create_heap()
    before = time.monotonic()
    with pytest.raises(WaitTimeoutError):
        session.ask(NameLookup(heap, "never", 50))
    assert 0.05 <= time.monotonic() - before < 2
    with pytest.raises(NoSuchNameError):
        session.ask(NameLookup(heap, "never", 0))


def test_a_wait_ends_with_its_session(session: RawSession) -> None:
    """The thread that waits is told, while another closes the session."""
    heap = session.create_heap()
    waiting = session.send(NameLookup(heap, "never", 60_000))
    closing = session.send(SessionClose())
    answers = {request_id: code for request_id, code, _ in (session.work.receive(), session.work.receive())}
    assert answers == {waiting: SessionLostError.code, closing: 0}


# -- deaths --------------------------------------------------------------------------------------------------------
def test_a_killed_process_loses_its_session_within_a_second(daemon: Daemon) -> None:
    """Its pidfd says so; nobody has to time out."""
    with Program(daemon.endpoint, "session = RawSession(endpoint); session.create_heap()") as client:
        client.hear()
        assert status(daemon.endpoint)["heaps"] == 1
        client.reap()
        wait_until(lambda: status(daemon.endpoint)["sessions"] == 0, 1)
        wait_until(lambda: status(daemon.endpoint)["heaps"] == 0, 1)


def test_a_zombie_is_dead(daemon: Daemon) -> None:
    """Its parent has not reaped it, and kill(pid, 0) still succeeds: its session is gone all the same."""
    with Program(daemon.endpoint, "session = RawSession(endpoint)") as client:
        client.hear()
        client.kill()
        wait_until(lambda: status(daemon.endpoint)["sessions"] == 0, 1)
        os.kill(client.pid, 0)


@pytest.mark.parametrize("is_reaped", [True, False])
def test_the_hello_of_a_process_that_died_opens_nothing(daemon: Daemon, is_reaped: bool) -> None:
    """The daemon reads it after its sender was killed: a session for nobody would never end."""
    body = """
        peer = zmtp3_connect(endpoint, "control")
        tell("connected")
        peer.sendall(zmtp3_frame(encode_request(Hello(LAYOUT_VERSION), 1)))
    """
    with Program(daemon.endpoint, body) as client:
        client.hear("connected")
        server = daemon.pid
        os.kill(server, signal.SIGSTOP)
        try:
            client.go_on()
            client.hear()
            client.kill()
            if is_reaped:
                client.reap()
        finally:
            os.kill(server, signal.SIGCONT)
        wait_until(lambda: status(daemon.endpoint)["dead_dropped"] == 1)
        assert status(daemon.endpoint)["sessions"] == 0


def test_sessions_of_one_process_share_one_pidfd(daemon: Daemon) -> None:
    """However many it opens; it is let go with the last of them."""
    server = daemon.pid
    with RawSession(daemon.endpoint) as session:
        for _ in range(5):
            session.token = hello(daemon.endpoint)["token"]
            assert pidfds_of(server) == 1
            session.ask(SessionClose())
        assert pidfds_of(server) == 1
        session.token = session.greeting["token"]
        session.ask(SessionClose())
        wait_until(lambda: pidfds_of(server) == 0)


def test_a_process_that_closed_its_session_can_open_another(daemon: Daemon) -> None:
    """And is watched again."""
    body = """
        session = RawSession(endpoint)
        session.ask(SessionClose())
        session = RawSession(endpoint)
    """
    with Program(daemon.endpoint, body) as client:
        client.hear()
        assert status(daemon.endpoint)["sessions"] == 1
        client.kill()
        wait_until(lambda: status(daemon.endpoint)["sessions"] == 0, 1)


# -- strangers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_peer_without_credentials_is_dropped_and_counted(daemon: Daemon, version: str) -> None:
    """One that greets as old ZMTP comes without the kernel's word on who it is, whatever it asks."""
    message = {"1.0": zmtp1_message, "2.0": zmtp2_message}[version](encode_request(Hello(LAYOUT_VERSION), 1))
    with connect_raw(daemon.endpoint) as peer:
        peer.sendall(ZMTP_GREETINGS[version] + (b"" if version == "1.0" else b"\x00\x00") + message)
        wait_until(lambda: status(daemon.endpoint)["anonymous_dropped"] >= 1)
    assert status(daemon.endpoint)["sessions"] == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to be")
def test_another_user_does_not_even_reach_the_socket(daemon: Daemon) -> None:
    """The directory is closed to it."""
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            connect_raw(daemon.endpoint)
        except PermissionError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user to be")
def test_another_user_past_the_directory_is_cut_off(daemon: Daemon) -> None:
    """Had the directory been opened by mistake, the socket's own filter still holds."""
    daemon.directory.chmod(0o755)
    for which in ("control", "work"):
        Path(f"{daemon.directory}/{daemon.name}.{which}").chmod(0o777)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        with connect_raw(daemon.endpoint) as peer:
            os._exit(7 if peer.recv(1) == b"" else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert status(daemon.endpoint)["sessions"] == 0
