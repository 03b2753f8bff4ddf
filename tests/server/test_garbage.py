"""What killed daemons and jobs leave: found by itself, told from what lives or is wanted, removed whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.arena import Arena
from heapd.layout import F_PERSISTENT, F_SERIALIZE, H_STATE, LAYOUT_VERSION, STOPPED, WORD
from heapd.manager import HeapManager
from heapd.manager.ledger import Ledger
from heapd.manager.ledger.volume import L_MAGIC, L_VERSION, LEDGER_VERSION
from heapd.server import Leftover, find_leftovers, garbage, remove_leftover
from heapd.server.lock import DaemonLock
from heapd.units import MIB, PAGE_SIZE
from heapd.wire import Endpoint, JobFolder
from heapd.wire.messages import HeapOpen, SessionClose
from tests.conftest import StartDaemon
from tests.harness import SEGMENTS, Daemon, children_of, is_alive, unique_name, wait_until
from tests.server.raw import RawSession
from tests.server.strangers import GROUP, NOBODY, needs_root


def found(daemon: Daemon) -> list[Leftover]:
    return find_leftovers([daemon.name], [str(daemon.directory)])


def kinds(daemon: Daemon) -> dict[str, Leftover]:
    return {leftover.kind: leftover for leftover in found(daemon)}


@pytest.fixture
def killed(start_daemon: StartDaemon) -> Daemon:
    """A daemon that was killed together with its supervisor, and had no client."""
    daemon = start_daemon()
    daemon.kill()
    return daemon


@pytest.fixture
def blank() -> Iterator[Path]:
    """A segment that a daemon has just begun, or did not get further with."""
    path = SEGMENTS / f"heapd-{unique_name()}"
    path.touch(0o600)
    yield path
    path.unlink(missing_ok=True)


# -- what is found -------------------------------------------------------------------------------------------------
def test_nothing_of_a_daemon_that_lives_is_listed(daemon: Daemon) -> None:
    """Nor of one that somebody has taken the lock file from, or stopped for a while."""
    assert found(daemon) == []
    daemon.process.send_signal(signal.SIGSTOP)
    os.kill(daemon.pid, signal.SIGSTOP)
    (daemon.directory / f"{daemon.name}.lock").unlink()
    try:
        assert found(daemon) == []
    finally:
        for pid in (*children_of(daemon.process.pid), daemon.process.pid):
            os.kill(pid, signal.SIGCONT)


def test_what_a_kill_left_is_listed_and_removed(killed: Daemon) -> None:
    """The arena with its size in memory, sockets and lock file; afterwards there is nothing."""
    leftovers = kinds(killed)
    assert set(leftovers) == {"arena", "endpoint"}
    arena = leftovers["arena"]
    assert {Path(path).name for path in arena.files} == set(killed.segments())
    assert arena.size >= 4096
    assert arena.wanted == ""
    assert len(leftovers["endpoint"].files) == 3
    assert all(remove_leftover(leftover) for leftover in leftovers.values())
    assert found(killed) == []
    assert killed.segments() == []
    assert [path.suffix for path in killed.directory.iterdir()] == [".log"]


def test_looking_changes_nothing(killed: Daemon) -> None:
    """Files are as they were, and so are the pages that are committed."""

    def state() -> list[tuple[str, int, int]]:
        paths = [*killed.directory.iterdir(), *(SEGMENTS / name for name in killed.segments())]
        return sorted((str(path), path.stat().st_blocks, path.stat().st_mtime_ns) for path in paths)

    before = state()
    assert found(killed) == found(killed)
    assert state() == before


def test_a_daemon_between_two_servers_is_alive(start_daemon: StartDaemon) -> None:
    """Its supervisor is: what lies there is what it goes on with."""
    daemon = start_daemon()
    server = daemon.pid
    daemon.process.send_signal(signal.SIGSTOP)
    os.kill(server, signal.SIGKILL)
    try:
        wait_until(lambda: not is_alive(server))
        assert found(daemon) == []
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert daemon.status()


def test_names_choose(killed: Daemon) -> None:
    """Of other daemons nothing is listed."""
    assert find_leftovers([unique_name()], [str(killed.directory)]) == []
    assert {leftover.kind for leftover in find_leftovers((), [str(killed.directory)])} >= {"arena", "endpoint"}


# -- what is wanted ------------------------------------------------------------------------------------------------
def test_an_arena_that_a_client_has_mapped_is_kept(start_daemon: StartDaemon) -> None:
    """The client is named; by force it goes, and the client is told that its daemon was stopped on purpose."""
    daemon = start_daemon()
    session = hc.connect(daemon.endpoint, autostart=False)
    block = session.create_heap().alloc(64)
    block.view[:5] = b"hello"
    daemon.kill()
    arena = kinds(daemon)["arena"]
    assert arena.pids == (os.getpid(),)
    assert arena.wanted == f"process {os.getpid()} has it mapped"
    assert not remove_leftover(arena)
    assert len(daemon.segments()) >= 1
    assert remove_leftover(arena, force=True)
    assert daemon.segments() == []
    assert bytes(block.view[:5]) == b"hello"
    assert session.arena.words[H_STATE] == STOPPED
    session.close()


def test_persistent_heaps_are_kept_for_the_next_start(start_daemon: StartDaemon) -> None:
    """Arena and ledger go together or not at all; the number of heaps is said."""
    daemon = start_daemon()
    with RawSession(daemon.endpoint) as session:
        for name in ("a", "b"):
            session.create_heap(name, F_SERIALIZE | F_PERSISTENT)
        session.create_heap("c", F_SERIALIZE)
        session.ask(SessionClose())
    daemon.kill()
    arena = kinds(daemon)["arena"]
    assert arena.wanted == "the next start of the daemon brings its persistent heaps back (2)"
    assert arena.files == (arena.path, f"{arena.path}-ledger")
    assert not remove_leftover(arena)
    second = Daemon(daemon.directory, daemon.name)
    try:
        with RawSession(second.endpoint) as session:
            session.ask(HeapOpen("b"))
            session.ask(SessionClose())
        assert second.status()["restarts"] == 1
    finally:
        second.kill()
    assert remove_leftover(kinds(daemon)["arena"], force=True)
    assert daemon.segments() == []


def test_an_arena_without_persistent_heaps_is_wanted_by_nobody(killed: Daemon) -> None:
    """Its sessions are dead, and their heaps would go at the next start."""
    arena = kinds(killed)["arena"]
    assert (arena.wanted, len(arena.files)) == ("", 2)
    assert remove_leftover(arena)
    assert killed.segments() == []


def test_what_clients_scribbled_is_not_believed(start_daemon: StartDaemon) -> None:
    """Which heaps are persistent, and who served them, the ledger says: neither header nor control blocks."""
    daemon = start_daemon()
    with RawSession(daemon.endpoint) as session:
        session.create_heap("a", F_SERIALIZE | F_PERSISTENT)
        session.ask(SessionClose())
    daemon.kill()
    before = kinds(daemon)["arena"]
    assert "heaps back (1)" in before.wanted
    with Path(before.path).open("r+b") as file:
        file.write(b"\xff" * 2 * PAGE_SIZE)
    assert kinds(daemon)["arena"] == before


@pytest.mark.parametrize(
    ("slot", "value", "fault"),
    [
        (L_MAGIC, 1, "is damaged: its first word is 0x1"),
        (PAGE_SIZE // WORD, 1 << 30, "is damaged 0 bytes into its log"),
        (L_VERSION, LEDGER_VERSION << 32 | LAYOUT_VERSION + 1, "is of another version of heapd"),
    ],
    ids=["seal", "length", "layout"],
)
def test_what_a_start_would_refuse_is_not_said_to_come_back(killed: Daemon, slot: int, value: int, fault: str) -> None:
    """It is kept, as by the start that refuses it, and why that is gc says, too; by force it goes. Nothing is committed
    by looking, wherever a damaged length leads."""
    arena, ledger = (SEGMENTS / name for name in killed.segments())
    with ledger.open("r+b") as file:
        file.seek(slot * WORD)
        file.write(value.to_bytes(WORD, "little"))
    blocks = ledger.stat().st_blocks
    leftover = kinds(killed)["arena"]
    assert leftover.wanted == (
        f"it may hold something, and no start of this heapd can go on with it: the ledger {ledger.name} {fault}"
    )
    assert ledger.stat().st_blocks == blocks
    assert not remove_leftover(leftover)
    command = [sys.executable, "-m", "heapd", "serve", "-e", killed.endpoint]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert refused.returncode == 1
    assert "gc --force" in refused.stderr
    assert remove_leftover(leftover, force=True)
    assert not arena.exists()


# -- segments of other kinds ---------------------------------------------------------------------------------------
def test_a_segment_that_was_never_finished_goes(blank: Path) -> None:
    """Empty, or all zeros; while its maker has it open it is left alone."""
    name = blank.name.removeprefix("heapd-")
    for size in (0, 1 << 20):
        os.truncate(blank, size)
        with blank.open("r+b"):
            [leftover] = find_leftovers([name])
            assert leftover.kind == "segment"
            assert leftover.wanted
            assert not remove_leftover(leftover)
        [leftover] = find_leftovers([name])
        assert leftover.wanted == ""
    assert remove_leftover(leftover)
    assert not blank.exists()


def test_a_ledger_without_an_arena_goes(blank: Path) -> None:
    """It says what was in memory that is no more."""
    ledger = blank.rename(f"{blank}-ledger")
    try:
        ledger.write_bytes(b"records")
        [leftover] = find_leftovers([blank.name.removeprefix("heapd-")])
        assert (leftover.kind, leftover.what) == ("segment", "ledger without an arena")
        assert remove_leftover(leftover)
        assert not ledger.exists()
    finally:
        ledger.unlink(missing_ok=True)


@pytest.mark.parametrize("has_ledger", [False, True])
def test_an_arena_that_was_made_inside_a_program_goes_with_it(has_ledger: bool) -> None:
    """No daemon ever served it, and no endpoint has its name: it is kept while the program has it mapped, and no
    longer."""
    name = unique_name()
    arena = Arena.create(f"heapd-{name}", reserve=16 * MIB)
    manager = HeapManager.create(arena, f"heapd-{name}-ledger") if has_ledger else None
    [leftover] = find_leftovers([name])
    assert leftover.wanted == f"process {os.getpid()} has it mapped"
    assert not remove_leftover(leftover)
    if manager is not None:
        assert isinstance(arena.journal, Ledger)
        arena.journal.volume.segment.close()
    arena.words = memoryview(b"")
    arena.segment.close()
    [leftover] = find_leftovers([name])
    assert (leftover.kind, leftover.what) == (
        ("arena", "arena without a daemon")
        if has_ledger
        else ("segment", "segment that was never finished: it has no ledger")
    )
    assert leftover.wanted == ""
    assert remove_leftover(leftover)
    assert [path.name for path in SEGMENTS.iterdir() if name in path.name] == []


def test_a_file_that_is_none_of_ours_is_left_alone(blank: Path) -> None:
    """Somebody's own, whatever it is called."""
    blank.write_bytes(b"my precious notes, which begin like no arena does")
    assert find_leftovers([blank.name.removeprefix("heapd-")]) == []


@needs_root
def test_other_users_things_are_left_alone(blank: Path, killed: Daemon) -> None:
    """They are theirs to remove, also for root."""
    os.chown(blank, NOBODY, -1)
    for name in killed.segments():
        os.chown(SEGMENTS / name, NOBODY, -1)
    assert find_leftovers([blank.name.removeprefix("heapd-")]) == []
    assert "arena" not in kinds(killed)


@needs_root
def test_another_users_client_keeps_an_arena(killed: Daemon) -> None:
    """The kernel knows of it, whatever /proc shows to whom."""
    path = Path(kinds(killed)["arena"].path)
    os.chown(path, -1, GROUP)
    path.chmod(0o660)
    program = "import mmap, os, sys; os.setgid(int(sys.argv[2])); os.setuid(65534); f = open(sys.argv[1], 'r+b'); " \
        "m = mmap.mmap(f.fileno(), 4096); f.close(); print(flush=True); sys.stdin.read()"  # fmt: skip
    command = [sys.executable, "-c", program, str(path), str(GROUP)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        client.stdout.readline()
        arena = kinds(killed)["arena"]
        assert "mapped" in arena.wanted
        assert not remove_leftover(arena)
        client.communicate()
    assert kinds(killed)["arena"].wanted == ""


# -- removing and living meanwhile ---------------------------------------------------------------------------------
def test_who_comes_back_between_the_look_and_the_removal_keeps_everything(killed: Daemon) -> None:
    """A daemon that was started meanwhile, or a client that maps the arena: nothing of theirs goes."""
    leftovers = kinds(killed)
    second = Daemon(killed.directory, killed.name)
    try:
        second.status()
        assert not remove_leftover(leftovers["endpoint"])
        assert not remove_leftover(leftovers["arena"])
        assert second.status()["segment"] in second.segments()
    finally:
        second.check_clean_end()


def test_a_removal_leaves_the_lock_to_whoever_starts_next(killed: Daemon) -> None:
    """The name can be used at once."""
    for leftover in found(killed):
        assert remove_leftover(leftover)
    endpoint = Endpoint.parse(killed.endpoint)
    assert not DaemonLock.is_held(endpoint)
    DaemonLock.acquire(endpoint).release()


# -- folders of jobs -----------------------------------------------------------------------------------------------
def test_the_folder_of_a_killed_job_goes_whole(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose job lives stays, and so does any other folder, whatever is in it."""
    monkeypatch.setattr("tempfile.tempdir", str(runtime_dir))
    name = unique_name()
    (runtime_dir / f"heapd-{name}-precious").mkdir()
    (runtime_dir / f"heapd-{name}-precious" / "thesis").touch()
    with JobFolder(name) as living:
        killed = JobFolder(name)
        (killed.path / "log").write_text("x" * 10)
        os.close(killed._mark)  # as the kernel does at a kill
        [leftover] = find_leftovers([name])
        assert (leftover.kind, leftover.path, leftover.size) == ("folder", str(killed.path), 10)
        assert remove_leftover(leftover)
        assert not killed.path.exists()
        assert living.path.exists()
    assert not living.path.exists()
    assert find_leftovers([name]) == []
    shutil.rmtree(runtime_dir / f"heapd-{name}-precious")


def test_many_that_clear_up_at_once_are_in_nobodys_way(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds what is there and sees it gone, whoever of them has removed it."""
    monkeypatch.setattr("tempfile.tempdir", str(runtime_dir))
    name = unique_name()

    def clear_up(barrier: threading.Barrier) -> list[bool]:
        barrier.wait(10)
        return [remove_leftover(leftover) for leftover in find_leftovers([name], [str(runtime_dir)])]

    for _ in range(10):
        folder = JobFolder(name)
        for number in range(50):
            (folder.path / f"file{number}").touch()
        os.close(folder._mark)
        endpoint = Endpoint(str(runtime_dir), name)
        for path in (endpoint.control_path, endpoint.lock_path):
            Path(path).touch()
        start = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(clear_up, [start] * 4))
        assert any(outcomes)
        assert list(runtime_dir.iterdir()) == []


def test_what_went_with_its_directory_is_gone(runtime_dir: Path) -> None:
    """Somebody removed all of it between the look and the removal."""
    endpoint = Endpoint(str(runtime_dir / "sub"), unique_name())
    os.mkdir(endpoint.directory, 0o700)
    Path(endpoint.lock_path).touch()
    [leftover] = find_leftovers([endpoint.name], [endpoint.directory])
    shutil.rmtree(endpoint.directory)
    assert remove_leftover(leftover)


def test_a_folder_whose_daemon_still_lives_is_not_listed(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends by itself, a moment after its job."""
    monkeypatch.setattr("tempfile.tempdir", str(runtime_dir))
    name = unique_name()
    folder = JobFolder(name)
    lock = DaemonLock.acquire(Endpoint(str(folder.path), name))
    os.close(folder._mark)
    assert find_leftovers([name]) == []
    lock.release()
    [leftover] = find_leftovers([name])
    assert remove_leftover(leftover)


def test_a_lock_is_asked_for_without_taking_it(tmp_path: Path) -> None:
    """Neither a missing file nor a stranger in its place is a lock; none is made."""
    endpoint = Endpoint(str(tmp_path), "x")
    assert not DaemonLock.is_held(endpoint)
    assert list(tmp_path.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as impostor:
        impostor.bind(endpoint.lock_path)
        assert not DaemonLock.is_held(endpoint)
    Path(endpoint.lock_path).unlink()
    with open(endpoint.lock_path, "w") as file:
        assert not DaemonLock.is_held(endpoint)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert DaemonLock.is_held(endpoint)


def test_looking_is_in_no_readers_way(blank: Path) -> None:
    """A daemon that starts at that very moment finds its segments readable, and waits only to write to them."""
    blank.write_bytes(bytes(4096))
    with garbage._without_writers(str(blank)) as is_free:
        assert is_free
        os.close(os.open(blank, os.O_RDONLY | os.O_NONBLOCK))
        with pytest.raises(BlockingIOError):
            os.open(blank, os.O_RDWR | os.O_NONBLOCK)
    os.close(os.open(blank, os.O_RDWR | os.O_NONBLOCK))
