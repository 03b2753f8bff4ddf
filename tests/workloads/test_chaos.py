"""The storm's own faults are found: an estate is true whenever its owner is killed, and what is not in one is seen."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import pytest

import heapd_client as hc
from heapd.workloads import chaos
from heapd.workloads.board import Board, Row, board_size
from heapd.workloads.chaos import ChaosOutcome, Storm
from heapd.workloads.chaos_client import ChaosClient
from heapd.workloads.checked import Stamp
from heapd.workloads.estate import PLACES, Asset, Estate, estate_size
from heapd.workloads.stress import StressOutcome
from heapd.workloads.stress_client import CONTROL_HEAP, Plan, heap_name
from tests.client.tools import fork
from tests.harness import Daemon

_HEAPS = 2


class Scene:
    """A storm that has begun, over one client, in this process. `life()` is another process's, in principle."""

    def __init__(self, daemon: Daemon, session: hc.Session) -> None:
        self.plan = Plan(daemon.endpoint, 1, 1.0, 5, _HEAPS, 1 << 20)
        self.session = session
        self.control = session.create_heap(CONTROL_HEAP)
        heaps = [session.create_heap(heap_name(number), serialize=number == 0) for number in range(_HEAPS)]
        block = self.control.alloc(board_size(1, _HEAPS), zero=True)
        self.control.publish("board", block)
        self.board = Board(block.view, 1, _HEAPS)
        self.outcome = ChaosOutcome(StressOutcome(self.plan))
        self.storm = Storm(self.plan, self.outcome)
        self.storm.begin(session, self.control, heaps, self.board)

    def life(self, steps: int = 0) -> ChaosClient:
        """The client's next life, and its first steps."""
        client = ChaosClient(self.plan, 0, self.session, self.control)
        for _ in range(steps):
            client.step()
        return client

    def settle(self) -> ChaosOutcome:
        self.storm.clear_up(self.outcome.stress)
        return self.outcome


@pytest.fixture
def scene(daemon: Daemon, session: hc.Session) -> Scene:
    return Scene(daemon, session)


def test_a_life_goes_on_with_what_the_one_before_held(scene: Scene) -> None:
    """Block for block, with what was written; nothing counts as lost, and when all is freed nothing is left."""
    first = scene.life(300)
    held = {(each.block.address, each.stamp) for each in first._held}
    second = scene.life()
    assert {(each.block.address, each.stamp) for each in second._held} == held
    assert held
    for _ in range(300):
        second.step()
    while second._held:
        second._free()
    assert second.report.errors == []
    outcome = scene.settle()
    assert (outcome.bytes_lost, outcome.unfinished, outcome.faults) == (0, 0, [])
    assert outcome.checked > 100


def test_a_byte_that_changed_meanwhile_is_lost(scene: Scene) -> None:
    """The whole block counts, once; the client goes on with the others."""
    first = scene.life(300)
    victim = first._held[0].block
    victim.view[-1] ^= 1
    second = scene.life()
    assert len(second._held) == len(first._held) - 1
    assert scene.board.get(0, Row.LOST) == victim.size
    assert "CheckError" in second.report.errors[0]


def test_a_block_that_is_gone_is_lost(scene: Scene) -> None:
    """Somebody freed it who did not hold it."""
    first = scene.life(300)
    victim = first._held[0].block
    size = victim.size
    scene.session.block_at(victim.address).free()
    scene.life()
    assert scene.board.get(0, Row.LOST) == size


def test_a_block_in_no_estate_is_found_and_freed(scene: Scene) -> None:
    """One for each kill is what a client may have been at work with; more is a fault."""
    block = scene.session.open_heap(heap_name(1)).alloc(100)
    del block
    outcome = scene.settle()
    assert outcome.unfinished == 1
    assert outcome.faults == ["1 blocks are left, more than 0 killed clients can have been at work with"]
    assert not outcome.is_clean
    assert scene.session.open_heap(heap_name(1)).statistics().busy_blocks == 0


def test_a_block_that_a_client_kept_is_a_fault(scene: Scene) -> None:
    """A client that has ended has emptied its estate."""
    scene.life(300)
    assert any("has ended and not freed" in fault for fault in scene.settle().faults)


def test_an_increment_lost_under_a_lock_is_told(scene: Scene) -> None:
    """The guard was raised less often than clients counted; more often by one a kill is no fault."""
    client = scene.life()
    for _ in range(3):
        client._raise_guard(0)
        client._raise_guard(1)
    words = scene.control.lookup("board").view.cast("Q")
    words[8] -= 1  # the guard of heap 0, behind the one row
    scene.outcome.client_kills = 1
    words[16] += 1  # of heap 1: killed between raising and counting
    counts = scene.settle().stress.report.counts
    assert counts["guard 0"] - scene.board.guard(0) == 1
    assert counts["guard 1"] - scene.board.guard(1) == 0


def test_memory_nobody_knows_of_is_leaked(scene: Scene, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages behind the arena that the daemon has not committed."""
    monkeypatch.setattr(chaos, "_SETTLE_S", 0.5)
    path = f"/dev/shm/{scene.session.segment}"
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), os.stat(path).st_size - 3 * 4096, 3 * 4096)
    chaos._count_leaks(scene.plan, scene.outcome)
    assert scene.outcome.pages_leaked == 3


# -- estates -------------------------------------------------------------------------------------------------------
def test_an_estate_remembers_what_was_entered_and_not_struck() -> None:
    """Each with its place; a new object over the same bytes knows the same, and which places are free."""
    view = memoryview(bytearray(estate_size(_HEAPS)))
    estate = Estate(view, _HEAPS)
    assets = [
        Asset(number % _HEAPS, 4096 + number, Stamp(number, number << 33), number * 10) for number in range(PLACES)
    ]
    places = [estate.enter(asset) for asset in assets]
    assert estate.is_full
    for place in places[::2]:
        estate.strike(place)
    again = Estate(view, _HEAPS)
    assert {asset for _, asset in again.assets()} == set(assets[1::2])
    assert not again.is_full


def test_an_estate_that_was_scribbled_over_is_not_believed() -> None:
    """A wrong byte in an entry is told, not taken for a block."""
    view = memoryview(bytearray(estate_size(_HEAPS)))
    estate = Estate(view, _HEAPS)
    estate.enter(Asset(0, 4096, Stamp(1, 2), 100))
    at = bytes(view).index((4096).to_bytes(8, "little"))
    view[at] ^= 1
    with pytest.raises(ValueError, match="scribbled"):
        list(estate.assets())


@pytest.mark.parametrize("number", range(3))
def test_an_owner_killed_at_any_instant_leaves_a_true_estate(scene: Scene, number: int) -> None:
    """Whatever it was about: the next life finds every block, and at most one operation's are in no estate."""
    told, tell = os.pipe()

    def work() -> None:
        with hc.connect(scene.plan.endpoint, autostart=False) as session:
            client = ChaosClient(scene.plan, 0, session, session.open_heap(CONTROL_HEAP))
            while True:
                client.step()
                with suppress(BlockingIOError):
                    os.write(tell, b"x")

    os.set_blocking(tell, False)
    pid = fork(work)
    _read_steps(told, 50 + 37 * number)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(told)
    os.close(tell)
    scene.outcome.client_kills = 1
    heir = scene.life()
    assert heir.report.errors == []
    while heir._held:
        heir._free()
    outcome = scene.settle()
    assert (outcome.bytes_lost, outcome.faults) == (0, [])


def _read_steps(descriptor: int, count: int) -> None:
    read: Callable[[int, int], bytes] = os.read
    while count > 0:
        count -= len(read(descriptor, count))
