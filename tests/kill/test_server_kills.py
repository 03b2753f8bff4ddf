"""The server is killed while eight clients work: at random times, and at every step of all that it does.

No client notices more than a pause. What each was told is so: its blocks have their bytes, none is lost, none is held
twice; at the end every block that was allocated was freed, and no page is in use.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.units import MIB
from tests.client.tools import fork
from tests.conftest import StartDaemon
from tests.harness import Daemon, wait_until
from tests.kill.actor import Actor, Post
from tests.kill.points.sitecustomize import AT_START, POINTS, is_rare
from tests.kill.scene import HEAPS

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

_CLIENTS = 8
_TIMEOUT_S = 120.0  # of a client's call: nothing here is to fail because the machine is slow
_LIFETIME_S = 250  # of a client that nobody ends
_POINTS = Path(__file__).parent / "points"
_PASSES = 40  # a step may be passed so often before the server dies there; what is rare dies at once


class Crowd:
    """Eight clients of one daemon, that exchange blocks until they are told to stop. A context manager."""

    def __init__(self, endpoint: str, seed: int) -> None:
        self._endpoint = endpoint
        self._inboxes = [Post() for _ in range(_CLIENTS)]
        self._stop, self._stopped = os.pipe()
        self._pids = [
            fork(lambda n=number: self._work(n, seed), _LIFETIME_S)  # type: ignore[misc]
            for number in range(_CLIENTS)
        ]

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for inbox in self._inboxes:
            inbox.close()
        os.close(self._stop)
        if self._stopped >= 0:
            os.close(self._stopped)

    def _work(self, number: int, seed: int) -> None:
        os.close(self._stopped)
        os.set_blocking(self._stop, False)
        others = [inbox for at, inbox in enumerate(self._inboxes) if at != number]
        with hc.connect(self._endpoint, autostart=False, timeout=_TIMEOUT_S) as session:
            actor = Actor(session, HEAPS, self._inboxes[number], others, seed * _CLIENTS + number)
            while not self._is_over():
                for _ in range(20):
                    actor.step()
                actor.check()
                time.sleep(0.001)
            actor.free_all()

    def _is_over(self) -> bool:
        """Whether the other end of the pipe was closed."""
        try:
            return os.read(self._stop, 1) == b""
        except BlockingIOError:
            return False

    def end(self, session: hc.Session) -> None:
        """Have all of them finish: each has freed what it held, and nothing was wrong. Letters that none of them read
        are read here."""
        os.close(self._stopped)
        self._stopped = -1
        while self._pids:
            pid = self._pids.pop()
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a client failed; see its output"
        for inbox in self._inboxes:
            while (letter := inbox.receive()) is not None:
                block = session.open(letter[0])
                assert int.from_bytes(block.view[:8], "little") == letter[1]
                block.free()


class Killer:
    """Kills the server of a daemon. Fields: deaths."""

    def __init__(self, daemon: Daemon, point: Path, seed: int) -> None:
        self.deaths = 0
        self._daemon = daemon
        self._point = point
        self._random = random.Random(seed)
        self._pid = daemon.pid

    def kill(self) -> None:
        """At a random moment."""
        time.sleep(self._random.choice((0.0, 0.05, 0.3)) * self._random.random())
        os.kill(self._pid, signal.SIGKILL)
        self._await_next()

    def kill_at(self, point: str, deadline_s: float) -> bool:
        """At a named step, if the server comes there in time; False if not."""
        count = 1 if is_rare(point) or self._random.random() < 0.3 else self._random.randrange(1, _PASSES)
        (self._point.parent / "new").write_text(f"{point} {count}")
        os.replace(self._point.parent / "new", self._point)
        if point in AT_START:
            self.kill()
        before = self._pid
        end = time.monotonic() + deadline_s
        while self._point.exists() and time.monotonic() < end:
            if point.endswith("-session"):
                hc.connect(self._daemon.endpoint, autostart=False, timeout=_TIMEOUT_S).close()
            time.sleep(0.005)
        was_there = not self._point.exists()
        self._point.unlink(missing_ok=True)
        if was_there and point not in AT_START:
            self._await_next()
        elif was_there:
            self._pid, self.deaths = self._daemon.pid, self.deaths + 1
        assert not was_there or self._pid != before or point in AT_START
        return was_there

    def _await_next(self) -> None:
        """Return when the next server answers."""
        died = self._pid
        wait_until(lambda: self._daemon.status(60)["pid"] != died, 60, "the server is started again")
        self._pid = self._daemon.pid
        self.deaths += 1


@pytest.fixture
def point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a daemon that is started from now on reads at which step it is to die."""
    path = tmp_path / "point"
    monkeypatch.setenv("HEAPD_TEST_POINT", str(path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(_POINTS), os.environ.get("PYTHONPATH", "")]))
    return path


@pytest.fixture
def daemon(start_daemon: StartDaemon, point: Path) -> Daemon:
    """One that may be killed as often as the test likes."""
    return start_daemon("--restarts", "100000")


@pytest.fixture
def session(daemon: Daemon) -> Iterator[hc.Session]:
    """One that is not killed, and made the heaps."""
    with hc.connect(daemon.endpoint, autostart=False, timeout=_TIMEOUT_S) as session:
        session.create_heap("serialized")
        session.create_heap("unserialized", serialize=False)
        session.create_heap("freeing", orphans="free")
        session.create_heap("small", serialize=False, maximum=MIB)
        yield session


def check_empty(session: hc.Session) -> None:
    """Nothing was lost and nothing is left: no block, no page, no session."""
    wait_until(lambda: len([info for info in session.sessions() if info.is_live]) == 1, 30, "the clients are gone")
    for name in HEAPS:
        heap = session.open_heap(name)
        heap.trim()
        heap.compact()
        assert heap.validate() == []
        statistics = heap.statistics()
        assert (statistics.busy_blocks, statistics.cached_blocks, statistics.slabs, statistics.runs) == (0, 0, 0, 0)
        assert statistics.allocations == statistics.releases > 0
    assert [info.name for info in session.heaps()] == [*HEAPS]
    arena = session.statistics()
    assert arena.committed == arena.tables + arena.heaps


def kill_at_all(daemon: Daemon, point: Path, session: hc.Session, points: list[str], seed: int) -> tuple[set[str], int]:
    """Kill the server at each of the steps, and as often at random, under eight clients; then nothing may be missing.

    Returns: the steps that it came to, and how often it died.
    """
    with Crowd(daemon.endpoint, seed) as crowd:
        killer = Killer(daemon, point, seed)
        reached = set()
        for at in points:
            if killer.kill_at(at, 5.0):
                reached.add(at)
            if len(reached) % 4 == 0:
                killer.kill()
        crowd.end(session)
    check_empty(session)
    return reached, killer.deaths


@pytest.mark.timeout(300)
def test_the_server_may_be_killed_at_every_step(daemon: Daemon, point: Path, session: hc.Session) -> None:
    """A quarter of the steps, chosen by the day of the year, and some random moments."""
    day = time.localtime().tm_yday
    points = POINTS[day % 4 :: 4]
    reached, deaths = kill_at_all(daemon, point, session, points, day)
    assert len(reached) >= 0.7 * len(points), f"the server was never at {set(points) - reached}"
    assert deaths > len(points)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_server_may_be_killed_five_hundred_times(daemon: Daemon, point: Path, session: hc.Session) -> None:
    """At every step, time and again; and at random moments."""
    reached: set[str] = set()
    deaths = 0
    for seed in count(1):
        found, died = kill_at_all(daemon, point, session, POINTS[seed % 4 :: 4], seed)
        reached |= found
        deaths += died
        if deaths >= 500:
            break
    assert reached == {*POINTS}
