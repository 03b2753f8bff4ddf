"""HeapReAlloc is all or nothing, also where a signal handler raises: nothing but its result tells a new address.

CPython looks for signals as a Python function begins and after each call of a C function. The first test raises at each
of the former and at all of the latter that a profile function sees; the second has real signals strike.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

import heapd_client as hc
from heapd_client import win32
from tests.harness import Daemon, wait_until
from tests.interrupts import Interrupt, interrupts
from tests.win32.tools import KIB, MIB, busy, read, write

WARM = 8  # calls until the caches are as they stay
SPARE = 8  # places beyond those that were counted: a call may be a little longer


@dataclass(frozen=True)
class Case:
    """Heaps to try it in. Fields: options (of HeapCreate), flags (of HeapReAlloc), front_end (of the session)."""

    options: int = 0
    flags: int = 0
    front_end: bool = True


CASES = {
    "serialized": Case(),
    "not serialized": Case(options=int(win32.HEAP_NO_SERIALIZE)),
    "not serialized once": Case(flags=int(win32.HEAP_NO_SERIALIZE)),
    "zeroing": Case(flags=int(win32.HEAP_ZERO_MEMORY)),
    "checked": Case(options=int(win32.HEAP_TAIL_CHECKING_ENABLED | win32.HEAP_FREE_CHECKING_ENABLED)),
    "no front end": Case(front_end=False),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared_daemon: Daemon):  # type: ignore[no-untyped-def]
    """One of them, and this process attached for it."""
    found = CASES[request.param]
    with hc.connect(shared_daemon.endpoint, autostart=False, front_end=found.front_end) as session:
        win32.attach(session)
        yield found
        win32.detach()


def interrupt_at(place: int, call: Callable[[], object]) -> int:
    """Call, and raise at the `place`th point where signals are looked for. Returns: how many of them it came to."""
    passed = 0

    def profile(frame: Any, event: str, argument: object) -> None:
        nonlocal passed
        if event in ("call", "c_return"):
            passed += 1
            if passed == place:
                raise Interrupt

    gc.disable()  # an interrupt in a finaliser of what other tests left would only be printed
    sys.setprofile(profile)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.setprofile(None)
        gc.enable()
    return passed


def interrupt_everywhere(run: Callable[[int], int]) -> int:
    """Run with an interrupt at each place, from the last to the first; each time once more without one, so that every
    call finds the same.

    Args:    run (called with the place, 0 for none; gives what `interrupt_at` does).
    Returns: the interrupts.
    """
    places = max([run(0) for _ in range(WARM)][WARM // 2 :])
    struck = 0
    for place in range(places + SPARE, 0, -1):
        struck += run(place) == place
        run(0)
    return struck


class Subject:
    """A heap with a block whose bytes are known, that HeapReAlloc is to make larger.

    Fields: heap, address, size (bytes), struck, moved (calls that were interrupted, that moved the block).
    """

    def __init__(self, case: Case, size: int) -> None:
        self.case = case
        self.heap = win32.HeapCreate(case.options, 0, 0)
        self.size = size
        self.text = random.Random(size).randbytes(size)
        self.address = win32.HeapAlloc(self.heap, 0, size)
        self.neighbour = win32.HeapAlloc(self.heap, 0, size)  # so that it cannot grow where it is
        write(self.address, self.text)
        self.struck = self.moved = self.turns = 0

    def grow(self, size: int) -> None:
        """HeapReAlloc, and nothing is called between its end and the store."""
        self.grown = win32.HeapReAlloc(self.heap, self.case.flags, self.address, size)

    def attempt(self, size: int, interrupt: Callable[[Callable[[], object]], int]) -> int:
        """Grow the block, interrupted or not; what `interrupt` gives. It is whole in any case, and then as it was."""
        self.grown, self.turns = 0, self.turns + 1
        if self.turns % 8 == 0:
            win32.process.process().session.statistics()  # gets through: the daemon remembers so many answers only
        result = interrupt(lambda: self.grow(size))
        if self.grown:
            self.moved += self.grown != self.address
            self.address = self.grown
        found = win32.HeapSize(self.heap, 0, self.address)
        assert found == size if self.grown else found in (self.size, size)
        assert read(self.address, self.size) == self.text
        if self.grown and self.case.flags & win32.HEAP_ZERO_MEMORY:
            assert read(self.address + self.size, size - self.size) == bytes(size - self.size)
        self.struck += not self.grown
        if found != self.size:
            self.renew()
        return result

    def renew(self) -> None:
        assert win32.HeapFree(self.heap, 0, self.address)
        self.address = win32.HeapAlloc(self.heap, 0, self.size)
        write(self.address, self.text)

    def check(self) -> None:
        """The two blocks are all there is, nobody holds the lock, and every byte comes back."""
        heap = win32.process.heap_of(self.heap).heap
        assert heap._mutex.depth() == 0
        two = sorted([(self.address, self.size), (self.neighbour, self.size)])
        wait_until(lambda: sorted(busy(self.heap)) == two)  # answers to calls given up may be on their way
        assert win32.HeapValidate(self.heap, 0, None)
        for address, _ in two:
            assert win32.HeapFree(self.heap, 0, address)
        heap.trim()
        wait_until(lambda: heap.statistics().cached_blocks == 0)
        statistics = heap.statistics()
        assert statistics.busy_blocks == 0
        assert statistics.allocations == statistics.releases
        assert win32.HeapDestroy(self.heap)


GROWTHS = [(64, 1_000), (5_000, 8 * KIB), (200 * KIB, 300 * KIB), (MIB, MIB + 1)]


@pytest.mark.parametrize("sizes", GROWTHS, ids=str)
def test_an_exception_leaves_the_block_where_it_was(case: Case, sizes: tuple[int, int]) -> None:
    """At every place where a signal handler may raise: the old address and all bytes, or the new address and those."""
    subject = Subject(case, sizes[0])
    assert interrupt_everywhere(lambda place: subject.attempt(sizes[1], partial(interrupt_at, place))) > 20
    subject.check()


def test_signals_at_any_instant_lose_no_block(case: Case) -> None:
    """The same by the clock, for the places between C calls that no profile function sees."""
    dice = random.Random(5)
    subjects = [Subject(case, size) for size, _ in GROWTHS]
    with interrupts() as attempt:
        for turn in range(240):
            subject = subjects[turn % len(subjects)]
            size = GROWTHS[turn % len(subjects)][1]
            delay_s = 10 ** dice.uniform(-5, -2)  # so that some calls are struck and some get through, on any machine
            subject.attempt(size, lambda call, delay_s=delay_s: attempt(delay_s, call))
    assert sum(subject.struck for subject in subjects) > 20
    assert sum(subject.moved for subject in subjects) > 5
    for subject in subjects:
        subject.check()


@pytest.mark.parametrize("family", ["Global", "Local"])
@pytest.mark.parametrize("flags", [win32.GMEM_FIXED, win32.GMEM_MOVEABLE], ids=["fixed", "moveable"])
def test_an_exception_leaves_an_object_where_it_was(shared_daemon: Daemon, family: str, flags: int) -> None:
    """GlobalReAlloc and LocalReAlloc: a FIXED object at its address, a MOVEABLE one behind its handle."""
    make, resize, drop, lock = (getattr(win32, family + name) for name in ("Alloc", "ReAlloc", "Free", "Lock"))
    text, found, grown = b"object" * 20, 0, 0

    def grow() -> None:
        nonlocal grown
        grown = resize(found, 5_000, win32.GMEM_MOVEABLE)

    win32.attach(shared_daemon.endpoint)

    def run(place: int) -> int:
        nonlocal found, grown
        found, grown = make(flags, len(text)), 0
        write(lock(found), text)
        win32.GlobalUnlock(found)
        passed = interrupt_at(place, grow)
        found = grown or found
        assert read(lock(found), len(text)) == text
        win32.GlobalUnlock(found)
        assert drop(found) == 0
        return passed

    assert interrupt_everywhere(run) > 20
    heap = win32.process.heap_of(win32.GetProcessHeap()).heap
    assert heap._mutex.depth() == 0
    wait_until(lambda: busy(win32.GetProcessHeap()) == [])
    win32.detach()


def test_a_moved_block_is_gone_from_where_it_was(case: Case) -> None:
    """Nothing is left there for anybody: no block, no byte that is in use."""
    subject = Subject(case, 64)
    old = subject.address
    subject.grow(MIB)
    assert subject.grown != old
    assert not win32.HeapValidate(subject.heap, 0, old)
    assert win32.HeapSize(subject.heap, 0, old) == win32.SIZE_T_MAX
    with suppress(win32.StructuredException):
        assert not win32.HeapFree(subject.heap, 0, old)
    assert sorted(busy(subject.heap)) == sorted([(subject.grown, MIB), (subject.neighbour, 64)])
    subject.address, subject.size = subject.grown, MIB
    assert win32.HeapFree(subject.heap, 0, subject.neighbour)
    assert win32.HeapFree(subject.heap, 0, subject.grown)
    assert win32.HeapDestroy(subject.heap)
