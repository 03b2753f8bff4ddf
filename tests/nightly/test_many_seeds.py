"""The random tests of heap and manager, with many more seeds than an ordinary run has time for."""

from __future__ import annotations

from functools import partial

import pytest

from heapd.heap import Heap
from heapd.manager import HeapManager
from heapd.units import KIB, MIB
from tests.arenas import finish, private_arena
from tests.heap import test_model as heap_model
from tests.invariants import check_manager
from tests.manager import test_jobs as jobs
from tests.manager import test_ledger_model as ledger_model
from tests.manager import test_model as manager_model
from tests.manager import test_scribble as scribbles
from tests.manager.clients import Client

pytestmark = pytest.mark.nightly

every_batch = pytest.mark.parametrize("batch", range(20))


def seeds(batch: int) -> range:
    """Fifteen seeds that no ordinary run uses."""
    return range(1000 + 15 * batch, 1000 + 15 * (batch + 1))


@every_batch
def test_a_heap_holds_what_was_put_into_it(batch: int) -> None:
    """Growable, fixed and small, at the commit limit, and with blocks committed in slices, in turn."""
    for seed in seeds(batch):
        with private_arena() as arena:
            arena.prepare_control(0)
            kind = seed % 4
            if kind == 2:
                arena.budget.limit = MIB
            maximum = (0, 512 * KIB, 0, 150 * MIB)[kind]
            largest = (3 * MIB, 200 * KIB, 300 * KIB, 60 * MIB)[kind]
            heap_model.Model(arena, Heap(arena, 0, maximum=maximum), seed, largest).run(30 if kind == 3 else 250)


@every_batch
def test_several_clients_find_everything_as_they_left_it(batch: int) -> None:
    """The manager against its model."""
    for seed in seeds(batch):
        with private_arena() as arena:
            manager_model.Model(HeapManager(arena), seed).run(200)


@every_batch
def test_any_mix_of_jobs_leaves_a_sound_manager(batch: int) -> None:
    """And the end of all sessions leaves nothing."""
    for seed in seeds(batch):
        with private_arena() as arena:
            manager = HeapManager(arena)
            jobs.test_any_mix_of_jobs_in_any_order_leaves_a_sound_manager(manager, partial(Client, manager), seed)
            for session in manager.sessions:
                finish(manager.end_session(session))
            check_manager(manager)
            assert manager.heaps == {}


@every_batch
def test_scribbles_break_no_operation(batch: int) -> None:
    """Words written at random over every table of the arena."""
    for seed in seeds(batch):
        with private_arena() as arena:
            manager = HeapManager(arena)
            client, other = Client(manager), Client(manager)
            heap = client.create("scribbled")
            other.open("scribbled")
            client.alloc_many(heap, [16, 64, 64, 700, 5000, 8192, 8192, 70_000, 2 * MIB, 2 * MIB] * 3)
            scribbles.test_words_scribbled_at_random_break_no_operation(client, other, heap, seed)


@every_batch
def test_restarts_change_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a manager that dies between any two requests."""
    for seed in seeds(batch):
        ledger_model.test_a_restart_changes_nothing(seed, monkeypatch)
