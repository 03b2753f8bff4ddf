"""A daemon without sockets that dies at the Nth thing it does to shared memory, and is made again from what it left.

What it does to shared memory is everything another process could ever see of it: stores into arena and ledger, commits
and removals of pages. A death is an exception that nothing catches; the objects of the dead are thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from heapd.arena import Arena, Segment, restore
from heapd.errors import HeapdError, error_from_wire
from heapd.layout import CHUNK_SHIFT, F_FREE_ORPHANS, F_PERSISTENT, F_SERIALIZE, RUN_WORD
from heapd.manager import HeapManager
from heapd.manager.ledger import Ledger
from heapd.manager.ledger.volume import Log
from heapd.records import Entry, EntryKind, Grant, HeapInfo
from heapd.service import Deferred, Identity, Peer, RunningJob, Service
from heapd.units import KIB, MIB
from heapd.wire import Request, decode_reply, encode_request
from heapd.wire import messages as m
from tests.arenas import finish
from tests.harness import unique_name
from tests.invariants import check_manager, fill, pattern, read, walk_all


class Death(BaseException):
    """The process is gone."""


class Fate:
    """Counts what is done to shared memory, and ends it when it is told to. Fields: count."""

    def __init__(self) -> None:
        self.count = 0
        self._last: int | None = None

    def strike_at(self, number: int) -> None:
        """Die at the `number`th deed from now on; 1 is the next."""
        self.count, self._last = 0, number

    def spare(self) -> None:
        self._last = None

    def is_struck(self) -> bool:
        """Count a deed. Returns: True if it is the last, and is not to be finished."""
        self.count += 1
        return self._last is not None and self.count >= self._last

    def tick(self) -> None:
        if self.is_struck():
            raise Death


class MortalView:
    """A memoryview whose writer may die: in the middle of a slice, or instead of a word's store. What the dead still
    do, as their objects are collected, nobody sees."""

    def __init__(self, view: memoryview, fate: Fate) -> None:
        self._view = view
        self._fate = fate
        self.obj = view.obj
        self.is_dead = False

    def release(self) -> None:
        self.is_dead = True
        self._view.release()

    def __getitem__(self, key: Any) -> Any:
        return 0 if self.is_dead else self._view[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.is_dead:
            return
        if self._fate.is_struck():
            if isinstance(key, slice):
                half = (key.stop - key.start) // 2
                self._view[key.start : key.start + half] = value[:half]
            raise Death
        self._view[key] = value


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fate]:
    """Every segment that is mapped from now on is written by a mortal; what the dead left open is closed at the end."""
    fate = Fate()
    segments: list[Segment] = []
    real_init, real_fallocate = Segment.__init__, os.posix_fallocate

    def init(self: Any, *arguments: Any) -> None:
        real_init(self, *arguments)
        self.words = MortalView(self.words, fate)
        self.buffer = MortalView(self.buffer, fate)
        segments.append(self)

    def fallocate(*arguments: int) -> None:
        fate.tick()
        real_fallocate(*arguments)

    def mortal_method(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def method(*arguments: Any) -> None:
            fate.tick()
            real(*arguments)

        monkeypatch.setattr(owner, name, method)

    # Slices so small that a block of 1 MiB is committed, and decommitted, over several turns.
    monkeypatch.setattr("heapd.manager.blocks.SLICE_BYTES", MIB)
    monkeypatch.setattr("heapd.heap.heap.SLICE_PAGES", 128)
    monkeypatch.setattr("heapd.arena.arena.SLICE_PAGES", 128)
    monkeypatch.setattr("heapd.manager.ledger.volume._STEP", 1 << 16)
    monkeypatch.setattr("heapd.manager.ledger.volume._AHEAD", 1 << 16)
    monkeypatch.setattr(Segment, "__init__", init)
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    mortal_method(Arena, "_remove")
    mortal_method(restore, "_remove_unrecorded")
    mortal_method(Log, "_remove")
    yield fate
    for segment in segments:
        segment.close()


class Undead:
    """A daemon and what survives it. Fields: manager, service, fate."""

    def __init__(self, fate: Fate) -> None:
        self.fate = fate
        self._name = f"heapd-{unique_name()}"
        arena = Arena.create(self._name, reserve=32 * MIB, commit_limit=5 * MIB)
        self._serve(HeapManager.create(arena, f"{self._name}-ledger"))

    def _serve(self, manager: HeapManager) -> None:
        self.manager = manager
        who = Identity("x", "e", "w", self._name, manager.arena.instance, 1, 1, 1, 1, 1, "v", "p", 0.0, 0)
        self.service = Service(manager, who, clock=lambda: 0)

    def rise(self) -> None:
        """The next process takes over; all sessions' processes live. Dies where fate says so."""
        self._bury()
        manager = HeapManager.recover(self._name, f"{self._name}-ledger")
        self._serve(manager)
        for session in manager.sessions:
            if session.is_live:
                self.service.adopt(session, Peer(session.pid, session.uid, session.start_time))
        for job in self.service.resume():
            while not job.step():
                pass

    def die(self) -> None:
        """From now on it changes nothing: what it was at, a job's generator, goes on when it is collected."""
        self.fate.spare()
        for segment in self._segments():
            segment.buffer.is_dead = segment.words.is_dead = True  # type: ignore[attr-defined]

    def _bury(self) -> None:
        for segment in self._segments():
            segment.buffer.is_dead = segment.words.is_dead = True  # type: ignore[attr-defined]
            segment.close()

    def _segments(self) -> tuple[Segment, Segment]:
        ledger = self.manager._ledger
        assert isinstance(ledger, Ledger)
        return self.manager.arena.segment, ledger.volume.segment

    def remove(self) -> None:
        self.manager.shutdown()

    def compact(self) -> None:
        """Compact the ledger, all at one go."""
        ledger = self.manager._ledger
        assert isinstance(ledger, Ledger)
        ledger._threshold = 0
        for job in self.service.take_chores():
            while not job.step():
                pass

    # -- a client ------------------------------------------------------------------------------------------------------
    def open_session(self) -> bytes:
        """The token of a new session."""
        session = self.manager.open_session(1, 1, 1)
        self.service.adopt(session, Peer(1, 1, 1))
        self.manager.commit(session, 0, b"")
        return session.token

    def end_process(self, token: bytes) -> None:
        """The process of a session has died."""
        peer = self.service._peers.get(token)
        for job in self.service.end_process(peer) if peer is not None else []:
            while not job.step():
                pass

    def ask(self, token: bytes, request: Request, request_id: int) -> Any:
        """The answer to a request. Raises: HeapdError."""
        answer = self.service.handle_work(encode_request(request, request_id, token))
        if isinstance(answer, RunningJob):
            while not answer.step():
                pass
            answer = answer.answer or b""
        assert not isinstance(answer, Deferred)
        reply = decode_reply(answer)
        assert reply.request_id == request_id
        if reply.code:
            raise error_from_wire(reply.code, *reply.payload)
        return reply.payload


class Scene:
    """Two clients with heaps and blocks of every kind, and what is in them.

    Fields: it, alice and bob (tokens), heap (named, of alice, who has most blocks), other (freeing orphans), small (of
    64 KiB, all of it in two slabs), blocks (grant and size, in order of birth), cached (grants that alice leased).
    One more block is free, and hollow.
    """

    def __init__(self, it: Undead) -> None:
        self.it = it
        self._ids = 100
        self.alice, self.bob = it.open_session(), it.open_session()
        self.heap = HeapInfo(*self.do(self.alice, m.HeapCreate("h", 0, 0, F_SERIALIZE | F_PERSISTENT)))
        self.other = HeapInfo(*self.do(self.bob, m.HeapCreate("o", 0, 0, F_FREE_ORPHANS)))
        self.do(self.bob, m.HeapOpen("h"))
        self.do(self.alice, m.HeapOpen("o"))
        sizes = [64, 64, 1000, 5000, 70_000, 300_000, MIB + 1, 15_000, 15_000]
        self.blocks = [(Grant(*self.do(self.alice, m.HeapAlloc(self.heap.heap_id, size))), size) for size in sizes]
        for seed, (grant, size) in enumerate(self.blocks):
            fill(it.manager.arena, grant.address, size, seed)
        hollow = self.do(self.alice, m.HeapAlloc(self.heap.heap_id, 15_000))
        self.do(self.alice, m.HeapFree(self.heap.heap_id, *hollow[1:3]))
        self.do(self.alice, m.NamePublish(self.heap.heap_id, "n", *self.blocks[2][0][1:3]))
        self.cached = [Grant(*each) for each in self.do(self.alice, m.HeapLease(self.heap.heap_id, 48, 5))]
        self.do(self.alice, m.HeapAllocMany(self.other.heap_id, [100, 100_000]))
        self.small = HeapInfo(*self.do(self.alice, m.HeapCreate("s", 0, 64 * KIB, F_SERIALIZE)))
        self.do(self.alice, m.HeapAllocMany(self.small.heap_id, [1000, 200]))

    def do(self, token: bytes, request: Request) -> Any:
        self._ids += 1
        return self.it.ask(token, request, self._ids)

    def check_bytes(self, spare: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        """Every block that is still there has its bytes. Args: spare (addresses that may have gone)."""
        busy = {entry.address: entry.size for entry in self.entries() if entry.kind is EntryKind.BUSY}
        for seed, (grant, size) in enumerate(self.blocks):
            if grant.address in busy:
                size = min(size, busy[grant.address])
                assert read(self.it.manager.arena, grant.address, size) == pattern(size, seed), hex(grant.address)
            else:
                assert grant.address in spare, f"the block at {grant.address:#x} has gone"

    def entries(self) -> list[Entry]:
        return [entry for shared in self.it.manager.heaps.values() for entry in walk_all(shared.heap)]

    def told(self) -> Any:
        """What clients can find out, without generations and addresses: another try may find another block."""
        manager = self.it.manager
        return (
            sorted(
                (entry.kind, entry.size, entry.extent, entry.session)
                for entry in self.entries()
                if entry.kind in (EntryKind.BUSY, EntryKind.CACHED)
            ),
            sorted((shared.name or "", shared.flags, sorted(shared.names)) for shared in manager.heaps.values()),
            sorted((session.number, session.is_live, len(session.heaps)) for session in manager.sessions),
            [
                shared.heap.allocations - shared.heap.releases
                for shared in sorted(manager.heaps.values(), key=lambda shared: shared.heap_id)
            ],
        )

    def check(self) -> None:
        check_manager(self.it.manager)
        self._check_run_words()

    def _check_run_words(self) -> None:
        """Where no run begins, its word names nobody: a handle to the run that was there finds out."""
        arena = self.it.manager.arena
        for shared in self.it.manager.heaps.values():
            for region in shared.heap.space.in_order():
                for page in range(region.first, region.end):
                    if page not in shared.heap.runs and arena.pages.is_mapped(page >> CHUNK_SHIFT):
                        word = arena.words[arena.shape.run_slot(page)]
                        assert word == RUN_WORD.free(RUN_WORD.generation(word)), page


@contextmanager
def scene(fate: Fate) -> Iterator[Scene]:
    """A scene of its own, that leaves nothing."""
    fate.spare()
    it = Undead(fate)
    try:
        yield Scene(it)
    finally:
        fate.spare()
        it.remove()


__all__ = ["Death", "Fate", "HeapdError", "Scene", "fate", "finish", "scene"]
