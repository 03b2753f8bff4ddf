"""Where clients are killed: heaps of every kind, one client that survives, and what must hold after each death."""

from __future__ import annotations

import math
import os
import random
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import heapd_client as hc
from heapd.records import EntryKind
from heapd.units import MIB
from tests.client.tools import fork
from tests.harness import Daemon, wait_until
from tests.invariants import check_sums
from tests.kill.actor import Actor, Post, die_at

HEAPS = ("serialized", "unserialized", "freeing", "small")  # "freeing": orphans are freed; "small": it is soon full
BACK_S = 0.25  # what a killed client held is back by then
_BACK_DEADLINE_S = 20.0


@dataclass
class Victim:
    """A client process that will be killed.

    Fields: pid, process (a pidfd), kill_at (seconds after the round's start; None: it kills itself).
    """

    pid: int
    process: int
    kill_at: float | None


class Scene:
    """A daemon, heaps, and two sessions of this process that stay alive: one looks on, the other, the survivor, works
    with the same heaps as the victims. A context manager: on exit no victim is left.

    Fields: back_s (for each victim, the seconds from its death until everything it held was back).
    """

    def __init__(self, daemon: Daemon, session: hc.Session, seed: int) -> None:
        self.back_s: list[float] = []
        self._endpoint = daemon.endpoint
        self._session = session
        self._victims: list[Victim] = []
        self._heaps = [
            session.create_heap("serialized"),
            session.create_heap("unserialized", serialize=False),
            session.create_heap("freeing", orphans="free"),
            session.create_heap("small", serialize=False, maximum=1 * MIB),
        ]
        self._random = random.Random(seed)
        self._committed = session.statistics().heaps
        self._inbox = Post()
        self._outboxes: list[Post] = []
        self._working = hc.connect(self._endpoint, autostart=False)
        self._survivor = Actor(self._working, HEAPS, self._inbox, self._outboxes, self._next_seed())

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exception: object) -> None:
        for victim in list(self._victims):
            self._bury(victim)
        self._working.close()
        self._inbox.close()

    def _next_seed(self) -> int:
        return self._random.getrandbits(31)

    # -- a round -----------------------------------------------------------------------------------------------------
    def kill_two(self) -> None:
        """Two clients that exchange blocks with each other and with us, until one is dead, then the other."""
        inboxes = [Post(), Post()]
        self._outboxes[:] = inboxes
        started = time.monotonic()
        for inbox, other in (inboxes, inboxes[::-1]):
            self._victims.append(self._start(inbox, [other, self._inbox]))
        while self._victims:
            pid, died_at = self._bury(self._next_death(started)), time.monotonic()
            wait_until(partial(self._is_back, pid), _BACK_DEADLINE_S, "what the client held is back")
            self.back_s.append(time.monotonic() - died_at)
        self._survivor.check()
        self._outboxes.clear()
        for inbox in inboxes:
            inbox.close()

    def _start(self, inbox: Post, outboxes: Sequence[Post]) -> Victim:
        seed, generator, connects_anew = self._next_seed(), self._random, self._random.random() < 0.5
        kill_at = generator.choice((0.02, 0.05, 0.2)) * generator.random() if generator.random() < 0.6 else None
        bytecodes = 0 if kill_at is not None else int(10 ** generator.uniform(2, 4.6))

        def work() -> None:
            if bytecodes:
                die_at(bytecodes)
            session = hc.connect(self._endpoint, autostart=False) if connects_anew else self._working
            actor = Actor(session, HEAPS, inbox, outboxes, seed)
            while True:
                actor.step()

        pid = fork(work)
        return Victim(pid, os.pidfd_open(pid), kill_at)

    def _next_death(self, started: float) -> Victim:
        """Work until a victim dies, or kill it when its time has come."""
        while True:
            for victim in self._victims:
                is_dead = select.select([victim.process], [], [], 0)[0]
                if is_dead or (victim.kill_at is not None and time.monotonic() - started >= victim.kill_at):
                    return victim
            self._survivor.step()

    def _bury(self, victim: Victim) -> int:
        """Kill the victim if it lives. Returns: its pid."""
        self._victims.remove(victim)
        os.kill(victim.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(victim.pid, 0)[1])
        os.close(victim.process)
        assert status == -signal.SIGKILL, f"a client ended by itself: {status}"
        return victim.pid

    # -- what must hold ----------------------------------------------------------------------------------------------
    def _is_back(self, pid: int) -> bool:
        """Whether nothing is held in the name of the dead client: no session, no cached block, no private heap, no
        block of a heap that frees orphans."""
        sessions = self._session.sessions()
        live = {info.number for info in sessions if info.is_live}
        if any(info.pid == pid for info in sessions if info.is_live):
            return False
        if any(info.name is None and info.creator not in live for info in self._session.heaps()):
            return False
        return not any(
            (entry.kind is EntryKind.CACHED and entry.session not in live)
            or (entry.orphaned and heap.name == "freeing")
            for heap in self._heaps
            for entry in heap.walk()
        )

    def check(self) -> None:
        """Each block is busy with a live owner, orphaned and listed as such, or free; the sums hold. For moments when
        no victim lives."""
        sessions = self._session.sessions()
        live = {info.number for info in sessions if info.is_live}
        ended = {info.number for info in sessions if not info.is_live}
        assert live == {self._session.number, self._working.number}
        for heap in self._heaps:
            assert heap.validate() == []
            entries = list(heap.walk())
            statistics = heap.statistics()
            check_sums(statistics)
            busy = [entry for entry in entries if entry.kind is EntryKind.BUSY]
            cached = [entry for entry in entries if entry.kind is EntryKind.CACHED]
            orphans = [entry for entry in busy if entry.orphaned]
            assert {entry.session for entry in orphans} <= ended
            assert {entry.session for entry in [*busy, *cached] if not entry.orphaned} <= live
            assert len(busy) == statistics.busy_blocks
            assert len(cached) == statistics.cached_blocks
            assert len(orphans) == statistics.orphaned_blocks
            assert sum(entry.size for entry in orphans) == statistics.orphaned
            assert statistics.allocations - statistics.releases == len(busy) + len(cached)

    def free_all(self) -> int:
        """Free what the survivor has, what it handed to those that died, and every orphan: then no page is in use.
        Returns: orphans."""
        while self._inbox.receive() is not None:
            pass  # blocks of the dead, or sent back by them
        self._survivor.free_all()
        orphans = 0
        for heap in self._heaps:
            for entry in [entry for entry in heap.walk() if entry.kind is EntryKind.BUSY]:
                block = self._session.block_at(entry.address)
                stamp = int.from_bytes(block.view[:8], "little")
                assert entry.orphaned or stamp in self._survivor.handed, f"{entry} is none that its owner knows of"
                block.free()
                orphans += entry.orphaned
        self._survivor.free_all()  # runs that it had handed to the dead have come home
        for heap in self._heaps:
            heap.trim()
            heap.compact()
            statistics = heap.statistics()
            assert (statistics.slabs, statistics.runs) == (0, 0)
            assert (statistics.busy_blocks, statistics.cached_blocks) == (0, 0)
            assert statistics.allocations == statistics.releases
            assert heap.validate() == []
        assert self._session.statistics().heaps <= self._committed
        self._check_numbers_return()
        return orphans

    def _check_numbers_return(self) -> None:
        """No block names a session that ended: at the next end of one that knew the heaps, they are forgotten."""
        with hc.connect(self._endpoint, autostart=False) as session:
            for name in HEAPS:
                session.open_heap(name)
        assert all(info.is_live for info in self._session.sessions())


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of the values do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * share), 1) - 1]


def kill_many(scene: Scene, kills: int) -> None:
    """That many deaths, with every check after each pair of them, and everything freed now and then."""
    orphans = 0
    while len(scene.back_s) < kills:
        scene.kill_two()
        scene.check()
        if len(scene.back_s) % 20 == 0:
            orphans += scene.free_all()
    orphans += scene.free_all()
    assert orphans > kills, "the victims hardly held anything: hardly anything was tested"
