"""A client that scribbles over every table of the arena, without a pause, while others make requests of all kinds.

What those get may be an error; what the daemon must not do is die, hang, or meet a fault of its own.
"""

from __future__ import annotations

import random
import time

import pytest

from heapd.errors import HeapdError, InternalError
from heapd.wire.messages import (
    ArenaReclaim,
    ArenaStatisticsGet,
    HeapAlloc,
    HeapAllocMany,
    HeapCompact,
    HeapCreate,
    HeapDestroy,
    HeapFree,
    HeapFreeMany,
    HeapGiveBack,
    HeapLease,
    HeapList,
    HeapOpen,
    HeapOpenId,
    HeapResize,
    HeapStatisticsGet,
    HeapValidate,
    HeapWalk,
    NameList,
    NameLookup,
    NamePublish,
    Request,
    SessionList,
)
from tests.harness import Daemon, wait_until
from tests.server.raw import Program, RawSession, status

SCRIBBLER = """
import random, threading
import heapd_client as hc
from heapd.layout import CHUNK_PAGES, MAPPED
from heapd.units import PAGE_SIZE

session = hc.connect(endpoint, autostart=False)
words, shape = session.arena.words, session.arena.shape
chance = random.Random({seed})
values = [0, 1, 2**63, 2**64 - 1, MAPPED, 2**17 - 1, 2**36 - 1, 0x4141414141414141]
tell("connected")
directory = shape.directory // 8
first, count = shape.first_page, CHUNK_PAGES
places = [
    lambda: chance.randrange(16),
    lambda: shape.control_slot(0) + chance.randrange(32 * 8),
    lambda: shape.session_slot(0) + chance.randrange(512),
    lambda: directory + (first // count) + chance.randrange(3),
    lambda: shape.page_map // 8 + first + chance.randrange(count),
    lambda: shape.first_run_slot + first + chance.randrange(count),
    lambda: first * 512 + chance.randrange(40) * 512 + chance.randrange(80),
]
is_over = threading.Event()

def scribble():
    while not is_over.is_set():
        for _ in range(500):
            word = chance.choice(values) if chance.random() < 0.5 else chance.getrandbits(64)
            words[chance.choice(places)()] = word

thread = threading.Thread(target=scribble)
thread.start()
tell("scribbling")
is_over.set()
thread.join()
"""


class Victim:
    """A client by hand, that does not give up."""

    def __init__(self, session: RawSession, seed: int) -> None:
        self.session = session
        self.random = random.Random(seed)
        self.heap = session.create_heap("victim")
        self.blocks: list[tuple[int, int]] = []
        self.answers = self.errors = 0

    def step(self) -> None:
        request = self.random.choice([self.for_heap, self.for_heap, self.for_block])()
        self.answers += 1
        try:
            result = self.session.ask(request)
        except InternalError as error:
            pytest.fail(f"{request} met a fault: {error}")
        except HeapdError:
            self.errors += 1
            return
        if isinstance(request, (HeapAlloc, HeapAllocMany, HeapLease)):
            grants = result if isinstance(result[0], list) else [result]
            self.blocks = [*self.blocks[-100:], *((grant[1], grant[2]) for grant in grants)]

    def for_heap(self) -> Request:
        heap, size = self.heap, self.random.choice([16, 100, 5000, 8192, 100_000])
        return self.random.choice(
            [
                HeapAlloc(heap, size),
                HeapAllocMany(heap, [size] * 5),
                HeapLease(heap, size, 5),
                HeapGiveBack(heap, [], 1),
                HeapWalk(heap, 0, 500),
                HeapValidate(heap),
                HeapCompact(heap),
                HeapStatisticsGet(heap),
                HeapCreate(None, 0, 0, 1),
                HeapOpen("victim"),
                HeapOpenId(heap),
                HeapList(),
                SessionList(),
                NameList(heap),
                NameLookup(heap, "name"),
                ArenaStatisticsGet(),
                ArenaReclaim(),
                HeapDestroy(self.session.create_heap()),
            ]
        )

    def for_block(self) -> Request:
        address, generation = self.random.choice(self.blocks or [(1, 1)])
        return self.random.choice(
            [
                HeapFree(self.heap, address, generation),
                HeapFreeMany(self.heap, [address, generation]),
                HeapResize(self.heap, address, generation, self.random.randrange(10_000)),
                HeapGiveBack(self.heap, [address, generation]),
                HeapValidate(self.heap, address),
                NamePublish(self.heap, "name", address, generation),
            ]
        )


@pytest.mark.parametrize(
    ("seed", "seconds"), [(1, 1.5), *(pytest.param(seed, 20, marks=pytest.mark.nightly) for seed in range(2, 8))]
)
def test_the_daemon_outlives_a_scribbler(daemon: Daemon, seed: int, seconds: float) -> None:
    """It answers every request, goes through the deaths of scribbler and victim, and has its memory back."""
    server = daemon.pid
    with Program(daemon.endpoint, SCRIBBLER.replace("{seed}", str(seed))) as scribbler:
        scribbler.hear("connected")
        with RawSession(daemon.endpoint) as session:
            victim = Victim(session, seed)
            for _ in range(50):
                victim.step()
            scribbler.go_on()
            scribbler.hear("scribbling")
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                victim.step()
            assert victim.answers > 100
            assert 0 < victim.errors < victim.answers
            assert {found[0] for found in session.ask(HeapValidate(victim.heap))} & {"header", "control-block"}
            scribbler.kill()
        scribbler.reap()
    assert status(daemon.endpoint)["pid"] == server
    assert "Traceback" not in daemon.log, daemon.log
    assert "fault in" not in daemon.log
    with RawSession(daemon.endpoint) as session:
        wait_until(lambda: status(daemon.endpoint)["sessions"] <= 2)
        heap = session.create_heap()
        grant = session.alloc(heap, 100)
        session.ask(HeapFree(heap, grant[1], grant[2]))
