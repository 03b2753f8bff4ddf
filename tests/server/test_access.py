"""Who gets at a daemon: its own user, a group's members if it was opened to them, and nobody else."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import heapd_client as hc
from heapd.cli import main
from heapd.errors import AccessError
from tests.conftest import StartDaemon
from tests.harness import SEGMENTS, Daemon, is_alive, unique_name, wait_until
from tests.server.raw import status
from tests.server.strangers import GROUP, NOBODY, needs_root, run_as

_REACH = """
    endpoint = sys.argv[1]
    where = Endpoint.parse(endpoint)
    attempt(lambda: os.listdir(where.directory))
    for path in (where.control_path, where.work_path):
        attempt(lambda: socket.socket(socket.AF_UNIX).connect(path))
    attempt(lambda: os.open(where.lock_path, os.O_RDONLY))
    for name in sys.argv[2:]:
        for mode in (os.O_RDONLY, os.O_RDWR):
            attempt(lambda: os.open("/dev/shm/" + name, mode))
        attempt(lambda: os.unlink("/dev/shm/" + name))
    attempt(lambda: hc.connect(endpoint, autostart=False))
    attempt(lambda: ask(where, Stop(), 5))
"""

_HELLO = """
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(Endpoint.parse(sys.argv[1]).control)
        dealer.send(encode_request(Hello(LAYOUT_VERSION), 1))
        print(dealer.poll(int(sys.argv[2])) and decode_reply(dealer.recv()))
"""

_USE = """
    with hc.connect(sys.argv[1], autostart=False) as session:
        heap = session.open_heap("shared")
        block = heap.lookup("greeting")
        print(bytes(block.view[:5]).decode())
        block.view[:5] = b"HELLO"
        with heap.lock():
            mine = [heap.alloc(64) for _ in range(100)]
        heap.publish("answer", mine[0])
        mine[0].view[:2] = b"ok"
        for block in mine[1:]:
            block.free()
"""


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def group_daemon(common_place: Path, start_daemon: StartDaemon) -> Iterator[Daemon]:
    """A daemon that is open to GROUP."""
    directory = common_place / "run"
    directory.mkdir(mode=0o700)
    daemon = Daemon(directory, unique_name(), ("--group", str(GROUP)))
    try:
        daemon.status()
        yield daemon
    finally:
        daemon.check_clean_end()


# -- alone ---------------------------------------------------------------------------------------------------------
@needs_root
def test_another_user_gets_nowhere(daemon: Daemon) -> None:
    """Not into the directory, not to a socket, not to the lock file or any segment; connecting says why."""
    segments = sorted(daemon.segments())
    assert [name.endswith("-ledger") for name in segments] == [False, True]
    answers = run_as(NOBODY, _REACH, daemon.endpoint, *segments)
    assert len(answers) == 6 + 3 * len(segments)
    assert not [answer for answer in answers if answer.startswith("did")]
    assert all(answer.startswith("PermissionError") for answer in answers[:-2])
    assert answers[-2].startswith("AccessError the daemon at ")
    assert status(daemon.endpoint)["callers_refused"] == 0  # the kernel refused before the daemon had to
    assert sorted(daemon.segments()) == segments


@needs_root
def test_with_its_directory_opened_by_mistake_it_still_refuses_others(daemon: Daemon) -> None:
    """Each lock holds alone: sockets and segments are their user's, whatever becomes of the directory."""
    daemon.directory.chmod(0o755)
    try:
        answers = run_as(NOBODY, _REACH, daemon.endpoint, *daemon.segments())
    finally:
        daemon.directory.chmod(0o700)
    assert answers[0].startswith("did")  # the names in it are no secret then
    assert not [answer for answer in answers[1:] if answer.startswith("did")]


@needs_root
def test_with_its_socket_opened_too_the_daemon_itself_refuses(daemon: Daemon) -> None:
    """By the kernel's word on who is calling: libzmq drops the connection of another user."""
    daemon.directory.chmod(0o755)
    sockets = [daemon.directory / f"{daemon.name}.{which}" for which in ("control", "work")]
    for path in sockets:
        path.chmod(0o666)
    try:
        assert run_as(NOBODY, _HELLO, daemon.endpoint, "300") == ["0"]  # no answer
    finally:
        daemon.directory.chmod(0o700)
    assert status(daemon.endpoint)["sessions"] == 0


def test_everything_of_it_is_its_users_alone(daemon: Daemon) -> None:
    """Directory 0700; sockets, lock file and every segment 0600, whatever the umask was."""
    assert mode_of(daemon.directory) == 0o700
    for which in ("control", "work", "lock"):
        assert mode_of(daemon.directory / f"{daemon.name}.{which}") == 0o600
    assert {mode_of(SEGMENTS / name) for name in daemon.segments()} == {0o600}


@pytest.mark.parametrize("group", ["no-such-group", "-1", str(2**32), ""])
def test_a_group_that_is_none_is_a_usage_error(runtime_dir: Path, group: str) -> None:
    """Nothing is started for somebody who mistyped."""
    answer = CliRunner().invoke(main, ["serve", "--name", "x", f"--group={group}"])
    assert answer.exit_code == 2
    assert "there is no group" in answer.stderr
    assert list(runtime_dir.iterdir()) == []


# -- opened to a group ---------------------------------------------------------------------------------------------
@needs_root
def test_a_group_gets_in_and_no_further(group_daemon: Daemon) -> None:
    """The directory 0750, sockets and arena 0660, the lock file 0640, all of that group; the ledger stays 0600."""
    directory = group_daemon.directory
    assert (mode_of(directory), directory.stat().st_gid) == (0o750, GROUP)
    for which in ("control", "work"):
        path = directory / f"{group_daemon.name}.{which}"
        assert (mode_of(path), path.stat().st_gid) == (0o660, GROUP)
    assert mode_of(directory / f"{group_daemon.name}.lock") == 0o640
    arena = status(group_daemon.endpoint)["segment"]
    for name in group_daemon.segments():
        assert mode_of(SEGMENTS / name) == (0o660 if name == arena else 0o600)


@needs_root
@pytest.mark.parametrize("is_primary", [True, False], ids=["primary group", "supplementary group"])
def test_a_member_shares_heaps_with_the_daemons_user(group_daemon: Daemon, is_primary: bool) -> None:
    """Opens a heap, takes its lock, reads and writes the same bytes, allocates: all that a client does."""
    with hc.connect(group_daemon.endpoint, autostart=False) as session:
        heap = session.create_heap("shared")
        block = heap.alloc(16)
        block.view[:5] = b"hello"
        heap.publish("greeting", block)
        groups = {"gid": GROUP} if is_primary else {"gid": NOBODY, "groups": [7, GROUP]}
        assert run_as(NOBODY, _USE, group_daemon.endpoint, **groups) == ["hello"]  # type: ignore[arg-type]
        assert bytes(block.view[:5]) == b"HELLO"
        assert bytes(heap.lookup("answer").view[:2]) == b"ok"
        assert heap.validate() == []


@needs_root
def test_a_member_waits_for_a_daemon_that_is_started_again(group_daemon: Daemon) -> None:
    """While its server is gone and its supervisor lives, as the daemon's own user does."""
    body = """
    import time
    started = time.monotonic()
    attempt(lambda: hc.connect(sys.argv[1], autostart=False, timeout=0.5))
    print(time.monotonic() - started >= 0.5)
    """
    server = group_daemon.pid
    group_daemon.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, group_daemon.process.pid, os.WSTOPPED)
    os.kill(server, signal.SIGKILL)
    try:
        wait_until(lambda: not is_alive(server))
        assert run_as(NOBODY, body, group_daemon.endpoint, groups=[GROUP])[-1] == "True"
    finally:
        group_daemon.process.send_signal(signal.SIGCONT)
    group_daemon.status()


@needs_root
def test_a_member_may_ask_but_not_stop_the_daemon(group_daemon: Daemon) -> None:
    """It is its user's; what the member allocated goes by the kernel's word on its death."""
    body = """
    where = Endpoint.parse(sys.argv[1])
    attempt(lambda: ask(where, Status(), 5)["name"])
    attempt(lambda: ask(where, Stop(), 5))
    attempt(lambda: os.unlink(where.control_path))
    """
    answers = run_as(NOBODY, body, group_daemon.endpoint, groups=[GROUP])
    assert answers[0] == f"did {group_daemon.name}"
    assert answers[1].startswith("AccessError this daemon is user 0's to stop")
    assert answers[2].startswith("PermissionError")
    assert group_daemon.is_running


@needs_root
def test_a_user_outside_the_group_gets_nowhere(group_daemon: Daemon) -> None:
    """As with a daemon that is open to nobody."""
    answers = run_as(NOBODY, _REACH, group_daemon.endpoint, *group_daemon.segments(), groups=[GROUP + 1])
    assert not [answer for answer in answers if answer.startswith("did")]


@needs_root
def test_one_who_got_a_connection_by_other_means_is_asked_for_the_group(group_daemon: Daemon) -> None:
    """The daemon believes the kernel, not the file's permissions: a socket opened by mistake lets nobody in."""
    group_daemon.directory.chmod(0o755)
    (group_daemon.directory / f"{group_daemon.name}.control").chmod(0o666)
    try:
        [answer] = run_as(NOBODY, _HELLO, group_daemon.endpoint, "5000", groups=[GROUP + 1])
    finally:
        group_daemon.directory.chmod(0o750)
    assert f"code={AccessError.code}," in answer
    assert f"serves user 0 and group {GROUP}" in answer
    assert status(group_daemon.endpoint)["callers_refused"] == 1


@needs_root
def test_a_member_does_not_start_somebody_elses_daemon(common_place: Path) -> None:
    """Autostart in another user's directory is no daemon found, not a daemon of the wrong user."""
    common_place.chmod(0o750)
    os.chown(common_place, -1, GROUP)
    [answer] = run_as(NOBODY, "attempt(lambda: hc.connect(sys.argv[1]))", f"ipc://{common_place}/x", groups=[GROUP])
    assert answer.startswith("DaemonNotFoundError no daemon answers")
