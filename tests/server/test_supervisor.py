"""Who starts the server again: when it does, when it does not, what it says, and what it leaves."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import heapd_client as hc
from heapd.layout import (
    H_MAGIC,
    H_PAGE_COUNT,
    H_PID,
    H_START_TIME,
    H_STATE,
    LAYOUT_VERSION,
    MAGIC,
    RUNNING,
    STOPPED,
    WORD,
)
from heapd.manager.ledger.volume import L_MAGIC, L_STOPPED, L_VERSION, LEDGER_VERSION
from heapd.server import Config, supervisor
from heapd.server.credentials import start_time_of
from heapd.server.lock import DaemonLock
from heapd.server.supervisor import Life, Supervisor
from heapd.units import PAGE_SHIFT
from heapd.wire import Endpoint
from tests.conftest import StartDaemon
from tests.harness import SEGMENTS, Daemon, children_of, is_alive, unique_name, wait_until


def is_dead(pid: int) -> bool:
    return not is_alive(pid)


def wait_for_another(daemon: Daemon, pid: int) -> int:
    """The process id of the server that was started after server `pid`."""
    return int(wait_until(lambda: (now := daemon.pid) != pid and now, what="another server"))


# -- deaths --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT], ids=lambda number: number.name)
def test_a_server_that_is_killed_is_started_again(start_daemon: StartDaemon, number: signal.Signals) -> None:
    """By whatever signal; the log names process and signal, and clients are answered at the same endpoint."""
    daemon = start_daemon()
    pid = daemon.pid
    os.kill(pid, number)
    wait_for_another(daemon, pid)
    assert re.search(rf"ERROR heapd.supervisor: the server process {pid} was killed by {number.name} ", daemon.log)
    with hc.connect(daemon.endpoint, autostart=False) as session:
        assert session.create_heap().alloc(100).size == 100


def test_servers_that_die_one_after_another_are_all_replaced(daemon: Daemon) -> None:
    """A supervisor does not tire, and starts one server at a time."""
    pids = [daemon.pid]
    for _ in range(5):
        os.kill(pids[-1], signal.SIGKILL)
        pids.append(wait_for_another(daemon, pids[-1]))
    assert len(set(pids)) == 6
    assert children_of(daemon.process.pid) == pids[-1:]


def test_a_server_that_will_not_live_is_given_up(start_daemon: StartDaemon) -> None:
    """After as many restarts as it may have: exit status 4, one line that says why, and the arena is left."""
    daemon = start_daemon("--restarts", "2")
    pid = daemon.pid
    for _ in range(2):
        os.kill(pid, signal.SIGKILL)
        pid = wait_for_another(daemon, pid)
    os.kill(pid, signal.SIGKILL)
    assert daemon.process.wait(10) == 4
    assert re.search(rf"^heapd: the server of .* died 3 times within 60 s.*process {pid} was killed by SIGKILL",
                     daemon.log, re.MULTILINE)  # fmt: skip
    assert len(daemon.segments()) == 2
    daemon.process.returncode = -signal.SIGKILL  # its end was checked here


def test_the_pauses_before_restarts_grow_while_servers_die_young(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not before the first; up to 0.4 s; and not after one that has lived for a second."""
    pauses: list[float] = []

    def note(sources: list[object], timeout_s: float) -> list[object]:
        pauses.append(timeout_s)
        return []

    monkeypatch.setattr(supervisor, "wait", note)
    config = Config(endpoint=Endpoint(str(tmp_path), "x"), restarts=100)
    lock = DaemonLock.acquire(config.endpoint)
    watcher = Supervisor(config, lock)
    for lived_s in (0.1, 0.1, 0.1, 0.9, 0.0, 0.5, 1.5, 0.1):
        watcher._count_death("it died", lived_s)
        watcher._pause()
    watcher.close()
    lock.release()
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.4]


def test_a_machine_that_has_no_room_for_a_process_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a pause, as after a death; at the first start it is an error."""
    config = Config(endpoint=Endpoint(str(tmp_path), "x"), restarts=2)
    lock = DaemonLock.acquire(config.endpoint)
    watcher = Supervisor(config, lock)

    def refuse() -> Life:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(watcher, "_fork", refuse)
    with pytest.raises(BlockingIOError):
        watcher._attempt()
    watcher._was_ready = True
    assert [watcher._attempt(), watcher._attempt()] == [False, False]
    assert "no server process can be started (Resource temporarily unavailable); starting another" in caplog.text
    with pytest.raises(hc.DaemonLostError, match="died 3 times"):
        watcher._attempt()
    watcher.close()
    lock.release()


def test_without_restarts_there_is_no_supervisor(start_daemon: StartDaemon) -> None:
    """For those who have one of their own: the process that was started is the server."""
    daemon = start_daemon("--restarts", "0")
    assert daemon.pid == daemon.process.pid
    assert children_of(daemon.pid) == []


def test_a_client_that_comes_while_there_is_no_server_waits_for_it(start_daemon: StartDaemon) -> None:
    """connect does not say that nobody is there, and starts no second daemon, while a supervisor lives."""
    daemon = start_daemon()
    pid = daemon.pid
    for _ in range(3):  # the pause before the third restart is longer than a connect takes
        os.kill(pid, signal.SIGKILL)
        wait_until(partial(is_dead, pid))
        with hc.connect(daemon.endpoint) as session:
            assert session.daemon_pid != pid
            pid = session.daemon_pid
    assert daemon.pid == pid


# -- ends ----------------------------------------------------------------------------------------------------------
def test_a_stop_between_two_servers_leaves_nothing(start_daemon: StartDaemon) -> None:
    """There is no server to pass the signal on to: the supervisor tidies up, and says in the arena that it is over."""
    daemon = start_daemon()
    pid = daemon.pid
    with hc.connect(daemon.endpoint, autostart=False) as session:
        arena = session.arena
        for _ in range(5):
            os.kill(pid, signal.SIGKILL)
            if len(re.findall("starting another", daemon.log)) < 4:
                pid = wait_for_another(daemon, pid)
        wait_until(lambda: len(re.findall("starting another", daemon.log)) == 5)
        daemon.process.terminate()  # it pauses for 400 ms now
        assert daemon.process.wait(10) == 0
        assert daemon.segments() == []
        assert files_of(daemon) == []
        assert arena.is_stopped


def test_a_server_killed_while_it_stops_is_tidied_up_after(start_daemon: StartDaemon) -> None:
    """Nobody wants another one; nothing of it is left."""
    daemon = start_daemon()
    pid = daemon.pid
    os.kill(pid, signal.SIGSTOP)  # so that it does not stop before it is killed
    daemon.process.terminate()
    os.kill(pid, signal.SIGKILL)
    assert daemon.process.wait(10) == 0
    assert daemon.segments() == []
    assert files_of(daemon) == []


def test_a_server_whose_supervisor_was_killed_goes_on(start_daemon: StartDaemon) -> None:
    """Clients notice nothing, nobody takes its place, and its end is clean."""
    daemon = start_daemon()
    pid = daemon.pid
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap()
        daemon.process.kill()
        daemon.process.wait()
        wait_until(lambda: "the supervisor has died" in daemon.log)
        assert heap.alloc_many(100, 3)
        second = subprocess.run(
            [sys.executable, "-m", "heapd", "serve", "-e", daemon.endpoint], capture_output=True, text=True, timeout=20
        )
        assert second.returncode == 5
        assert f"process {pid} serves" in second.stderr
    hc.stop_daemon(daemon.endpoint)
    assert not is_alive(pid)
    assert daemon.segments() == []
    assert files_of(daemon) == []


def files_of(daemon: Daemon) -> list[str]:
    """Sockets and lock file of a daemon."""
    return sorted(path.name for path in daemon.directory.glob(f"{daemon.name}.*") if path.suffix != ".log")


# -- what an earlier daemon left -----------------------------------------------------------------------------------
@pytest.fixture
def name() -> str:
    """For two daemons one after the other: somebody else may be looking for what killed ones left."""
    return unique_name()


def leave(
    daemon: Daemon,
    *,
    size: int | None = None,
    header: dict[int, int] | None = None,
    ledger: dict[int, int] | None = None,
) -> Path:
    """Kill the daemon, and change what it left: words of the arena's header and of the ledger's, the arena's size."""
    daemon.status()
    daemon.kill()
    arena, records = (SEGMENTS / name for name in daemon.segments())
    for path, words in ((arena, header or {}), (records, ledger or {})):
        with path.open("r+b") as file:
            for slot, value in words.items():
                file.seek(slot * WORD)
                file.write(value.to_bytes(WORD, "little"))
    if size is not None:
        os.truncate(arena, size)
    return arena


def publish_kept(session: hc.Session) -> hc.Block:
    """A block that begins with b"kept", of a heap "work", published as "it"."""
    heap = session.create_heap("work")
    block = heap.alloc(1000)
    block.view[:4] = b"kept"
    heap.publish("it", block)
    return block


def test_what_both_left_is_gone_on_with_by_the_next(start_daemon: StartDaemon, name: str) -> None:
    """Server and supervisor were killed; a start by hand finds heaps, names and bytes as they were."""
    first = start_daemon(name=name)
    with hc.connect(first.endpoint, autostart=False, timeout=30) as session:
        block = publish_kept(session)
        heap = block.heap
        first.kill()
        second = start_daemon(name=name)
        assert (session.incarnation, session.daemon_pid) == (2, second.pid)
        assert bytes(heap.lookup("it").view[:4]) == b"kept"
        block.free()
        assert heap.validate() == []
        with hc.connect(second.endpoint, autostart=False) as other:
            assert other.open_heap("work").statistics().busy_blocks == 0


def test_a_start_by_hand_may_allow_more_than_the_one_before(start_daemon: StartDaemon, name: str) -> None:
    """The commit limit is the new one's, where it is given; else it stays."""
    first = start_daemon("--commit-limit", "8MiB", name=name)
    with hc.connect(first.endpoint, autostart=False, timeout=30) as session:
        heap = session.create_heap("work")
        with pytest.raises(hc.HeapFullError):
            heap.alloc(16 << 20)
        first.kill()
        second = start_daemon(name=name)
        assert second.status()["commit_limit"] == 8 << 20
        second.kill()
        third = start_daemon("--commit-limit", "64MiB", name=name)
        assert third.status()["commit_limit"] == 64 << 20
        assert heap.alloc(16 << 20).view[-1] == 0


def test_a_ledger_without_an_arena_is_removed(start_daemon: StartDaemon, name: str) -> None:
    """A daemon that stops removes the arena first; killed before it removes the ledger, it leaves that."""
    first = start_daemon(name=name)
    path = leave(first)
    path.unlink()
    second = start_daemon(name=name)
    assert second.status()["incarnation"] == 1
    assert len(second.segments()) == 2


def test_an_arena_without_a_ledger_is_removed(start_daemon: StartDaemon, name: str) -> None:
    """A daemon that starts makes the arena first; killed before it has made the ledger, it leaves that."""
    first = start_daemon(name=name)
    leave(first)
    (SEGMENTS / first.segments()[1]).unlink()
    second = start_daemon(name=name)
    assert "which was never finished: it has no ledger" in second.log
    assert second.status()["incarnation"] == 1


@pytest.mark.parametrize("place", [0, 4096 + 16], ids=["seal", "record"])
def test_a_damaged_ledger_is_neither_used_nor_removed(start_daemon: StartDaemon, name: str, place: int) -> None:
    """Something else than a kill has been there: one line says what, and what to do; both segments stay."""
    first = start_daemon(name=name)
    with hc.connect(first.endpoint, autostart=False) as session:
        session.create_heap("work", persistent=True)
    leave(first)
    ledger = SEGMENTS / first.segments()[1]
    with ledger.open("r+b") as file:
        file.seek(place)
        file.write(b"scribble")
    refused = serve(first.endpoint)
    assert refused.returncode == 1
    assert re.fullmatch(r"heapd: the ledger .* is damaged.* `heapd gc --force` removes it.*\n", refused.stderr)
    assert len(first.segments()) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"size": 0, "ledger": {L_MAGIC: 0}}, "was never finished: it has no header"),
        ({"size": 40, "ledger": {L_MAGIC: 0}}, "was never finished: it has no header"),
        ({"header": {H_MAGIC: 0}, "ledger": {L_MAGIC: 0}}, "was never finished: its header does not say so"),
        ({"ledger": {L_MAGIC: 0}}, "was never finished: it has no ledger"),
        ({"size": 0}, "is damaged: 0 bytes long, and its records are of 1073741824"),
        ({"size": 1 << 20}, "is damaged: 1048576 bytes long"),
        ({"ledger": {L_STOPPED: 1}}, "the daemon of process .* was about to remove"),
    ],
    ids=["begun", "short", "unfinished", "unrecorded", "empty", "truncated", "stopped"],
)
def test_a_segment_that_is_not_whole_is_replaced(
    start_daemon: StartDaemon, name: str, damage: dict[str, Any], said: str
) -> None:
    """The log says which and why; the next daemon answers at once, on a new arena."""
    first = start_daemon(name=name)
    path = leave(first, **damage)
    inode = path.stat().st_ino
    second = start_daemon(name=name)
    assert re.search(f"removing the shared memory segment {path.name}, which {said}", second.log)
    assert path.stat().st_ino != inode
    assert second.status()["incarnation"] == 1


def test_clients_of_an_arena_that_was_cut_are_told(start_daemon: StartDaemon) -> None:
    """The server dies at it (SIGBUS) when it next reads what is not there; the next one makes a new arena, and nobody
    waits for the old one."""
    daemon = start_daemon()
    pid = daemon.pid
    with hc.connect(daemon.endpoint, autostart=False, timeout=30) as session:
        heap = session.create_heap()
        os.truncate(SEGMENTS / session.segment, 1 << 20)
        with suppress(hc.HeapdError), hc.connect(daemon.endpoint, autostart=False):
            pass  # whose session word lies beyond the cut
        assert wait_for_another(daemon, pid)
        assert f"the server process {pid} was killed by SIGBUS" in daemon.log
        assert session.arena.is_stopped
        with pytest.raises((hc.DaemonStoppedError, hc.SessionLostError)):
            heap.alloc(100)


@pytest.mark.parametrize(
    "words",
    [
        {H_MAGIC: 0},
        {H_STATE: STOPPED},
        dict.fromkeys(range(512), 2**64 - 1),
    ],
    ids=["magic", "state", "everything"],
)
def test_a_header_that_a_client_scribbled_over_is_put_right(
    start_daemon: StartDaemon, name: str, words: dict[int, int]
) -> None:
    """All that a start needs is in the ledger: nothing is lost, clients of before and new ones go on, and the log names
    the words."""
    first = start_daemon(name=name)
    with hc.connect(first.endpoint, autostart=False, timeout=30) as session:
        heap = publish_kept(session).heap
        path = leave(first, header=words)
        second = start_daemon(name=name)
        assert second.segments()[0] == path.name
        assert bytes(heap.lookup("it").view[:4]) == b"kept"
        assert heap.validate() == []
        with hc.connect(second.endpoint, autostart=False) as other:
            assert bytes(other.open_heap("work").lookup("it").view[:4]) == b"kept"
    said = (
        f"ERROR heapd.arena: the header of the arena {path.name} was overwritten, and is put right: word {min(words)} "
    )
    assert said in second.log


def test_a_header_that_names_somebody_else_keeps_nobody_out(start_daemon: StartDaemon, name: str) -> None:
    """Who serves an arena, the ledger knows."""
    first = start_daemon(name=name)
    leave(first, header={H_PID: os.getpid(), H_START_TIME: start_time_of(os.getpid()) or 0})
    second = start_daemon(name=name)
    assert second.status()["restarts"] == 1


def test_what_is_in_a_sockets_place_and_cannot_be_removed_is_named(tmp_path: Path) -> None:
    """A directory, say: one line says where and what to do, and nobody tries again."""
    tmp_path.chmod(0o700)
    endpoint = Endpoint(str(tmp_path), unique_name())
    Path(endpoint.control_path).mkdir()
    refused = serve(str(endpoint))
    assert refused.returncode == 1
    assert re.fullmatch(
        rf"heapd: {endpoint.control_path} .*: Is a directory; remove it, or choose .*\n", refused.stderr
    )


def test_an_arena_of_another_layout_is_neither_used_nor_removed(start_daemon: StartDaemon, name: str) -> None:
    """Another heapd may want it: one line says what it is and the two things to do about it."""
    first = start_daemon(name=name)
    path = leave(first, ledger={L_VERSION: LEDGER_VERSION << 32 | LAYOUT_VERSION + 1})
    refused = serve(first.endpoint)
    assert refused.returncode == 1
    assert re.fullmatch(
        rf"heapd: the arena {path.name}, .* process \d+ left behind, has layout version {LAYOUT_VERSION + 1}, and this "
        rf"heapd serves {LAYOUT_VERSION}: .*`heapd gc --force`\n",
        refused.stderr,
    )
    assert path.exists()


def test_an_arena_of_another_size_is_neither_used_nor_removed(start_daemon: StartDaemon, name: str) -> None:
    """What was in it would be lost to a mistyped option; without the option it is used as it is."""
    first = start_daemon(name=name)
    path = leave(first)
    refused = serve(first.endpoint, "--reserve", "2GiB")
    assert refused.returncode == 1
    assert "is of 1 GiB, and 2 GiB were asked for: start without --reserve" in refused.stderr
    with path.open("rb") as file:
        words = memoryview(file.read(128)).cast("Q")
    assert (words[H_MAGIC], words[H_STATE], words[H_PAGE_COUNT]) == (MAGIC, RUNNING, 1 << 30 - PAGE_SHIFT)


def serve(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A daemon that will not start."""
    command = [sys.executable, "-m", "heapd", "serve", "-e", endpoint, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20)
