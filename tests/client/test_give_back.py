"""Caches given back in requests whose answer nobody waited for: the daemon may carry them out late, or not at all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import heapd_client as hc
from heapd.wire.messages import HeapGiveBack
from heapd_client.session import Session
from tests.harness import Daemon
from tests.interrupts import Interrupt, interrupts

SIZE = 100


class LateRequests:
    """The first request to give everything back is not sent, as if it lay on its way; its call is interrupted.

    Fields: session, held (the request; None so far)."""

    def __init__(self, session: hc.Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.session, self.held = session, None
        self._call = session.call
        monkeypatch.setattr(session, "call", self)

    def __call__(self, request: Any, *arguments: Any) -> Any:
        if isinstance(request, HeapGiveBack) and request.sweep and self.held is None:
            self.held = request
            raise Interrupt
        return self._call(request, *arguments)

    def arrive(self) -> None:
        """The daemon gets it now."""
        assert self.held is not None
        Session.call(self.session, self.held)


def check_two_owners(heap: hc.Heap, other: hc.Heap) -> None:
    """What both allocate now is distinct, and sound."""
    mine, theirs = [heap.alloc(SIZE) for _ in range(20)], [other.alloc(SIZE) for _ in range(60)]
    addresses = {block.address for block in (*mine, *theirs)}
    assert len(addresses) == 80, "a block was handed out twice"
    assert heap.validate() == []


@pytest.mark.parametrize("operation", ["trim", "compact"])
def test_what_is_freed_after_an_interrupted_sweep_has_one_owner(
    shared: hc.Heap, theirs: hc.Heap, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """It is cached only once the daemon has said that it will not take it any more."""
    mine = [shared.alloc(SIZE) for _ in range(20)]
    shared.alloc(SIZE).free()
    late = LateRequests(shared.session, monkeypatch)
    with pytest.raises(Interrupt):
        getattr(shared, operation)()
    for block in mine:
        block.free()
    assert shared.statistics().cached_blocks > 0, "nothing is cached: this tests nothing"
    late.arrive()
    check_two_owners(shared, theirs)


def test_frees_do_without_a_cache_where_the_second_sweep_fails_too(
    shared: hc.Heap, theirs: hc.Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is told, the block is as it was; and when the daemon answers again, all goes on as before."""
    mine = [shared.alloc(SIZE) for _ in range(20)]
    late = LateRequests(shared.session, monkeypatch)
    with pytest.raises(Interrupt):
        shared.trim()
    sweep: Callable[..., Any] = shared.session.sweep
    monkeypatch.setattr(shared.session, "sweep", lambda heap_id: late(HeapGiveBack(1 << 40, [], 2)))
    with pytest.raises(hc.HeapdError):
        mine[0].free()
    assert not mine[0].is_free
    monkeypatch.setattr(shared.session, "sweep", sweep)
    for block in mine:
        block.free()
    late.arrive()
    check_two_owners(shared, theirs)


@pytest.mark.parametrize("end", ["interrupt", "timeout"])
def test_a_daemon_that_answers_late_takes_no_block_that_is_in_use(daemon: Daemon, end: str) -> None:
    """It was stopped for a moment; the call that waited for it was given up."""
    with (
        hc.connect(daemon.endpoint, autostart=False, timeout=0.5) as session,
        hc.connect(daemon.endpoint, autostart=False) as others,
    ):
        heap = session.create_heap("shared")
        other = others.open_heap("shared")
        mine = [heap.alloc(SIZE) for _ in range(20)]
        heap.alloc(SIZE).free()
        server = session.arena.server.pid
        os.kill(server, signal.SIGSTOP)
        try:
            if end == "interrupt":
                with interrupts() as attempt:
                    assert attempt(0.1, heap.trim)
            else:
                with pytest.raises(hc.DaemonLostError):
                    heap.trim()
        finally:
            threading.Timer(0.1, os.kill, (server, signal.SIGCONT)).start()
        for block in mine:
            block.free()
        check_two_owners(heap, other)


def test_a_block_that_was_given_back_and_leased_again_is_not_taken_by_a_late_request(
    shared: hc.Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request names its generation of then."""
    shared.alloc(SIZE).free()
    requests: list[HeapGiveBack] = []
    call = shared.session.call
    monkeypatch.setattr("heapd_client.heapcore.is_quiet", lambda *_: False)  # else it were a sweep

    def hold(request: Any, *arguments: Any) -> Any:
        if isinstance(request, HeapGiveBack):
            requests.append(request)
            raise hc.DaemonLostError("not sent")
        return call(request, *arguments)

    with monkeypatch.context() as patch, suppress(hc.DaemonLostError):
        patch.setattr(shared.session, "call", hold)
        shared.release_cache()
    monkeypatch.undo()
    shared.trim()
    blocks = [shared.alloc(SIZE) for _ in range(30)]
    assert requests
    cached = shared.statistics().cached_blocks
    for request in requests:
        shared.session.call(request)
    assert shared.statistics().cached_blocks == cached
    assert shared.statistics().busy_blocks == len(blocks)
