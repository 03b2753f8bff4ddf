"""The daemon dies at every single thing that it does to shared memory, in every operation; the next one goes on.

The client asks again, as the library does. Afterwards everything is as if nothing had happened: done once, told once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from heapd.layout import F_SERIALIZE
from heapd.units import MIB
from heapd.wire import Request
from heapd.wire import messages as m
from tests.kill.undead import Death, Fate, Scene, fate, scene
from tests.manager.clients import names

__all__ = ["fate"]

Ask = Callable[[Scene], tuple[bytes, Request]]


def of_heap(make: Callable[[Scene], Request]) -> Ask:
    return lambda it: (it.alice, make(it))


def free(number: int) -> Ask:
    return of_heap(lambda it: m.HeapFree(it.heap.heap_id, *it.blocks[number][0][1:3]))


def resize(number: int, size: int) -> Ask:
    return of_heap(lambda it: m.HeapResize(it.heap.heap_id, *it.blocks[number][0][1:3], size, True))


REQUESTS: dict[str, tuple[Ask, set[int]]] = {
    "alloc": (of_heap(lambda it: m.HeapAlloc(it.heap.heap_id, 64)), set()),
    "alloc, a new slab": (of_heap(lambda it: m.HeapAlloc(it.heap.heap_id, 300)), set()),
    "alloc, a run": (of_heap(lambda it: m.HeapAlloc(it.heap.heap_id, 100_000)), set()),
    "alloc, a region": (of_heap(lambda it: m.HeapAlloc(it.heap.heap_id, MIB)), set()),
    "alloc, a hollow block": (of_heap(lambda it: m.HeapAlloc(it.heap.heap_id, 15_000)), set()),
    "alloc in slices": (of_heap(lambda it: m.HeapAlloc(it.heap.heap_id, MIB + MIB // 2)), set()),
    "alloc, slabs are cut": (of_heap(lambda it: m.HeapAlloc(it.small.heap_id, 40_000)), set()),
    "alloc that does not fit": (of_heap(lambda it: m.HeapAlloc(it.heap.heap_id, 4 * MIB)), set()),
    "alloc_many": (of_heap(lambda it: m.HeapAllocMany(it.heap.heap_id, [64, 3000, 80_000])), set()),
    "alloc_many in slices": (of_heap(lambda it: m.HeapAllocMany(it.heap.heap_id, [MIB + 1, 64, 40_000])), set()),
    "alloc_many that does not fit": (
        of_heap(lambda it: m.HeapAllocMany(it.heap.heap_id, [MIB, MIB + 1, 3 * MIB])),
        set(),
    ),
    "resize a slab's block": (resize(2, 1020), set()),
    "resize a run": (resize(4, 75_000), set()),
    "shrink a run": (resize(5, 70_000), set()),
    "grow a big run": (resize(6, MIB + MIB // 2), set()),
    "shrink a big run": (resize(6, MIB // 2), set()),
    "free": (free(1), {1}),
    "free, the last of its slab": (free(3), {3}),
    "free, and leave the block hollow": (free(7), {7}),
    "free a run": (free(4), {4}),
    "free a region": (free(6), {6}),
    "free_many": (
        of_heap(lambda it: m.HeapFreeMany(it.heap.heap_id, [x for n in (0, 3, 5, 6) for x in it.blocks[n][0][1:3]])),
        {0, 3, 5, 6},
    ),
    "lease": (of_heap(lambda it: m.HeapLease(it.heap.heap_id, 200, 20, [7000, 90_000])), set()),
    "give back": (of_heap(lambda it: m.HeapGiveBack(it.heap.heap_id, names(it.cached))), set()),
    "give everything back": (of_heap(lambda it: m.HeapGiveBack(it.heap.heap_id, [], 1)), set()),
    "create": (lambda it: (it.bob, m.HeapCreate("new", 70_000, 0, F_SERIALIZE)), set()),
    "create a fixed one": (lambda it: (it.bob, m.HeapCreate(None, 0, 4 * MIB, F_SERIALIZE)), set()),
    "default heap": (lambda it: (it.bob, m.HeapDefault()), set()),
    "destroy": (lambda it: (it.bob, m.HeapDestroy(it.heap.heap_id)), set(range(9))),
    "close": (lambda it: (it.bob, m.HeapClose(it.other.heap_id)), set()),
    "compact": (lambda it: (it.bob, m.HeapCompact(it.heap.heap_id)), set()),
    "reclaim": (lambda it: (it.bob, m.ArenaReclaim()), set()),
    "publish": (of_heap(lambda it: m.NamePublish(it.heap.heap_id, "new", *it.blocks[5][0][1:3])), set()),
    "unpublish": (of_heap(lambda it: m.NameUnpublish(it.heap.heap_id, "n")), set()),
    "statistics": (of_heap(lambda it: m.HeapStatisticsGet(it.heap.heap_id)), set()),
}  # fmt: skip


def outcome(scene: Scene, token: bytes, request: Request) -> Any:
    """What the client gets: the shape of the answer, or the error's name."""
    try:
        answer = scene.it.ask(token, request, 7)
    except MemoryError as error:
        return type(error).__name__
    return type(answer), len(answer) if isinstance(answer, list) else None


def die_everywhere(fate: Fate, operate: Callable[[Scene], Any], gone: set[int], most: int = 40) -> int:
    """Die at each deed of an operation, or at about `most` of them, rise, and do it again; all must be as without a
    death.

    Returns: the deaths.
    """
    with scene(fate) as it:
        before = fate.count
        expected = operate(it)
        step = max((fate.count - before) // most, 1)
        told = it.told()
        it.check()
    for number in count(1, step):
        with scene(fate) as it:
            fate.strike_at(number)
            try:
                operate(it)
                return number // step
            except Death:
                it.it.die()
            it.it.rise()
            it.check()
            it.check_bytes({it.blocks[each][0].address for each in gone})
            assert operate(it) == expected, f"after a death at deed {number}"
            assert it.told() == told, f"after a death at deed {number}"
            it.check()
            it.check_bytes({it.blocks[each][0].address for each in gone})
    raise AssertionError


@pytest.mark.parametrize("most", [40, pytest.param(10**6, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_done_once_wherever_the_daemon_dies(fate: Fate, name: str, most: int) -> None:
    """Nothing is lost and nothing is done twice, and the repeated request gets its answer."""
    make, gone = REQUESTS[name]

    def operate(it: Scene) -> Any:
        return outcome(it, *make(it))

    assert die_everywhere(fate, operate, gone, most) >= 1


def test_a_session_that_ended_is_reaped_wherever_the_daemon_dies(fate: Fate) -> None:
    """Its caches come back, and what it owned is dealt with by the heaps' policies, once."""
    assert die_everywhere(fate, lambda it: it.it.end_process(it.alice), set()) > 10


def test_a_compaction_loses_nothing_wherever_the_daemon_dies(fate: Fate) -> None:
    """The old log counts until the new one is whole."""
    assert die_everywhere(fate, lambda it: it.it.compact(), set()) > 10


def die_again(fate: Fate, name: str, first: int, step: int = 1) -> int:
    """Die at deed `first` of a request, and then in the recovery from it, at each `step`th deed. Returns: the deaths in
    recoveries; 0 if the request has not so many deeds."""
    make, gone = REQUESTS[name]

    def operate(it: Scene) -> Any:
        return outcome(it, *make(it))

    with scene(fate) as it:
        expected, told = operate(it), it.told()
    for number in count(1, step):
        with scene(fate) as it:
            spare = {it.blocks[each][0].address for each in gone}
            fate.strike_at(first)
            try:
                operate(it)
                return 0
            except Death:
                it.it.die()
            fate.strike_at(number)
            try:
                it.it.rise()
                return number // step
            except Death:
                fate.spare()
            it.it.rise()
            it.check()
            assert operate(it) == expected, f"after deaths at deeds {first} and {number}"
            assert it.told() == told, f"after deaths at deeds {first} and {number}"
            it.check()
            it.check_bytes(spare)
    raise AssertionError


def test_a_recovery_may_die_anywhere_itself(fate: Fate) -> None:
    """And the next one finds what it would have found."""
    assert die_again(fate, "free_many", 3) > 10


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", REQUESTS)
def test_every_recovery_may_die_anywhere_itself(fate: Fate, name: str) -> None:
    """Whatever the first death left."""
    for first in count(1, 3):
        if not die_again(fate, name, first, step=5):
            return
