"""Who is calling, by the kernel's word: processes, not process ids."""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from heapd.server import credentials
from heapd.server.credentials import MessageCaller, ProcessTable, cut_off, is_dead, peer_address, start_time_of


@pytest.fixture
def table() -> Iterator[ProcessTable]:
    table = ProcessTable()
    yield table
    for process in table:
        table.forget(process)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.communicate()


def kill(process: subprocess.Popen[bytes]) -> None:
    """When this returns it has ended and is a zombie."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


class FakeFrame:
    """A message with the properties that a test wants."""

    def __init__(self, address: str | None) -> None:
        self.address = address

    def get(self, name: str) -> str:
        assert name == "Peer-Address"
        if self.address is None:
            raise zmq.ZMQError(zmq.EINVAL)
        return self.address


# -- what a message says -------------------------------------------------------------------------------------------
def test_an_address_names_process_and_user() -> None:
    """As libzmq writes it from SO_PEERCRED."""
    assert peer_address(FakeFrame("localhost:1000:100:4242")) == (4242, 1000)  # type: ignore[arg-type]


@pytest.mark.parametrize("address", [None, "", "localhost", "10.0.0.1", "a:b:c:d", "localhost:1:2:3:4"])
def test_a_message_without_a_proper_address_is_nobodys(address: str | None) -> None:
    """Nothing is guessed."""
    assert peer_address(FakeFrame(address)) is None  # type: ignore[arg-type]


# -- after a restart ------------------------------------------------------------------------------------------------
def test_a_process_that_lives_is_known_again(table: ProcessTable, child: subprocess.Popen[bytes]) -> None:
    """By its id and start time, once however many sessions it has; its death is seen as before."""
    born = start_time_of(child.pid)
    assert born is not None
    process = table.readmit(child.pid, os.getuid(), born)
    assert process.pidfd >= 0
    assert table.readmit(child.pid, os.getuid(), born) is process
    assert table.admit(child.pid, os.getuid(), None) is process
    assert table.take_fresh() == [process]
    kill(child)
    assert is_dead(process.pidfd)


@pytest.mark.parametrize("fate", ["zombie", "reaped", "another under its id"])
def test_a_process_that_died_meanwhile_is_not(table: ProcessTable, child: subprocess.Popen[bytes], fate: str) -> None:
    """It is told by its pidfd, which is closed, and nobody watches it."""
    born = start_time_of(child.pid)
    assert born is not None
    before = len(os.listdir("/proc/self/fd"))
    if fate == "zombie":
        kill(child)
    elif fate == "reaped":
        child.kill()
        child.wait()
    process = table.readmit(child.pid, os.getuid(), born - (fate == "another under its id"))
    assert process.pidfd == -1
    assert (len(table), table.take_fresh()) == (0, [])
    assert len(os.listdir("/proc/self/fd")) == before


# -- the process behind it -----------------------------------------------------------------------------------------
def test_the_process_of_a_connection_is_found(table: ProcessTable) -> None:
    """By the connection's own descriptor, which stays open and usable."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = table.admit(os.getpid(), os.getuid(), ours.fileno())
        assert process is not None
        assert (process.pid, process.start_time) == (os.getpid(), start_time_of(os.getpid()))
        theirs.send(b"x")
        assert ours.recv(1) == b"x"


@pytest.mark.parametrize("connection", ["closed", "a file", "another's"])
def test_a_descriptor_that_is_no_longer_the_connection_is_not_believed(
    table: ProcessTable, child: subprocess.Popen[bytes], connection: str
) -> None:
    """libzmq may have closed it, and its number may be anything by now: then the process id counts."""
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull) as file:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            descriptor = {"closed": 9999, "a file": file.fileno(), "another's": ours.fileno()}[connection]
            process = table.admit(child.pid, os.getuid(), descriptor)
    assert process is not None
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert process.start_time == start_time_of(child.pid)


def test_without_the_kernels_help_the_process_id_counts(
    table: ProcessTable, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Linux 6.5 a connection gives no pidfd."""
    monkeypatch.setattr(credentials, "SO_PEERPIDFD", 9999)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = table.admit(child.pid, os.getuid(), ours.fileno())
    assert process is not None
    kill(child)
    assert is_dead(process.pidfd)


def test_a_zombie_is_not_admitted(table: ProcessTable, child: subprocess.Popen[bytes]) -> None:
    """It has ended, though its id still stands for it."""
    kill(child)
    assert table.admit(child.pid, os.getuid(), None) is None
    assert len(table) == 0


def test_a_reaped_process_is_not_admitted(table: ProcessTable, child: subprocess.Popen[bytes]) -> None:
    """Its id stands for nobody, or for somebody new."""
    child.kill()
    child.wait()
    assert table.admit(child.pid, os.getuid(), None) is None


def test_a_process_that_was_replaced_under_its_id_is_another(
    table: ProcessTable, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process id and start time together are a process."""
    first = table.admit(child.pid, os.getuid(), None)
    assert first is not None
    monkeypatch.setattr(credentials, "start_time_of", lambda pid: first.start_time + 1)
    second = table.admit(child.pid, os.getuid(), None)
    assert second is not first
    assert len(table) == 2


def test_one_process_is_one_entry_with_one_pidfd(table: ProcessTable, child: subprocess.Popen[bytes]) -> None:
    """However often it says hello."""
    first = table.admit(child.pid, os.getuid(), None)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert table.admit(child.pid, os.getuid(), None) is first
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert table.take_fresh() == [first]
    assert table.take_fresh() == []


def test_a_death_makes_the_pidfd_readable(table: ProcessTable, child: subprocess.Popen[bytes]) -> None:
    """That is what the loop waits for."""
    process = table.admit(child.pid, os.getuid(), None)
    assert process is not None
    assert not is_dead(process.pidfd)
    poll = select.poll()
    poll.register(process.pidfd, select.POLLIN)
    child.kill()
    assert poll.poll(5000)


def test_a_forgotten_process_has_no_pidfd(table: ProcessTable, child: subprocess.Popen[bytes]) -> None:
    """Forgetting it twice closes nothing else."""
    process = table.admit(child.pid, os.getuid(), None)
    assert process is not None
    table.forget(process)
    table.forget(process)
    assert process.pidfd == -1
    assert len(table) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can choose its groups")
def test_membership_is_what_it_was_at_the_connect(table: ProcessTable, tmp_path: Path) -> None:
    """By the kernel's word on the connection: primary and supplementary groups, whatever the process became since."""
    program = """
import os, socket, sys
os.setgroups([7, 4321]); os.setgid(1234)
peer = socket.socket(socket.AF_UNIX); peer.connect(sys.argv[1])
os.setgroups([99]); os.setgid(98)
print(flush=True); sys.stdin.read()
"""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with subprocess.Popen(
            [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            connection, _ = listener.accept()
            with connection:
                caller = MessageCaller(child.pid, 0, connection.fileno(), table)
                assert [gid for gid in (7, 98, 99, 1234, 4321) if caller.is_member(gid)] == [7, 1234, 4321]
                assert not MessageCaller(os.getpid(), 0, connection.fileno(), table).is_member(7)
            child.communicate()
    assert not MessageCaller(child.pid, 0, None, table).is_member(7)


# -- smaller things ------------------------------------------------------------------------------------------------
def test_a_start_time_is_read_past_any_command_name(tmp_path: object) -> None:
    """A command may be named to look like the fields after it."""
    name = b") Z 1 2 3 ("
    program = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b') Z 1 2 3 ('); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with open(f"/proc/{process.pid}/comm", "rb") as file:
            assert file.read().strip() == name
        born = start_time_of(process.pid)
        ours = start_time_of(os.getpid())
        assert born is not None
        assert ours is not None
        assert born >= ours
        assert process.stdin is not None
        process.stdin.close()


def test_a_connection_is_cut_on_its_other_side() -> None:
    """The descriptor itself stays its owner's to close."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        cut_off(ours.fileno())
        assert theirs.recv(1) == b""
        assert struct.calcsize("3i") == len(ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))


def test_cutting_what_is_gone_is_harmless() -> None:
    """libzmq may have closed it already."""
    cut_off(9999)
