"""The manager's random model with a daemon that dies between any two requests: nobody can tell that it did."""

from __future__ import annotations

import pytest

from heapd.arena import Arena
from tests.invariants import check_manager
from tests.manager.ledgers import Mortal, mortal, portrait
from tests.manager.test_model import Model


class MortalModel(Model):
    """Clients whose daemon is restarted now and then, in the middle of a compaction, too."""

    def __init__(self, it: Mortal, seed: int) -> None:
        super().__init__(it.manager, seed)
        self.it = it
        self.restarts = 0

    def check(self) -> None:
        super().check()
        if self.random.random() < 0.5:
            self.compact_a_part()
        if self.random.random() < 0.7:
            self.restart()
            super().check()

    def compact_a_part(self) -> None:
        """Begin a compaction, let requests come in between, and drop it somewhere, or finish it."""
        self.log.append("compacts the ledger")
        job = self.it.manager.compaction()
        for _ in range(self.random.choice([1, 3, 100])):
            if next(job, job) is job:
                break
            self.alloc()
            self.free()
            self.resize()

    def restart(self) -> None:
        self.log.append("restarts")
        before = portrait(self.it.manager)
        self.manager = self.it.restart()
        after = portrait(self.manager)
        assert {key: after[key] for key in before if after[key] != before[key]} == {}
        self.restarts += 1
        for client in self.clients:
            session = self.manager.sessions.find(client.number)
            assert session is not None
            client.manager, client.session = self.manager, session


@pytest.fixture(autouse=True)
def nothing_is_taken_after_something_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in the journal is done early where a commit needs its memory. That is right as long as no request
    takes a block back and then memory: the block's word would say free, and no record that it is."""
    real = Arena.commit

    def commit(arena: Arena, first: int, page_count: int) -> int:
        is_missing = arena.committed_in(first, page_count) < page_count
        assert not is_missing or not getattr(arena.journal, "_stores", None)
        return real(arena, first, page_count)

    monkeypatch.setattr(Arena, "commit", commit)


@pytest.mark.parametrize("seed", range(6))
def test_a_restart_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every private record is the same as before, every block has its bytes, and clients go on."""
    monkeypatch.setattr("heapd.manager.ledger.ledger._SLICE_NS", 0)  # a yield after each portion
    monkeypatch.setattr("heapd.manager.ledger.retelling._PORTION", 3)
    with mortal() as it:
        model = MortalModel(it, seed)
        model.run(100)
        assert model.restarts > 5
        check_manager(model.manager)
