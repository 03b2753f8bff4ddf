"""What the tests of the front end share: requests counted, blocks seen from outside, interrupts, processes in pairs."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import heapd_client as hc
from heapd.records import Entry, EntryKind


def count_requests(session: hc.Session) -> Counter[str]:
    """How often the session asks its daemon from now on, by the name of the request."""
    counts: Counter[str] = Counter()
    call = session.call

    def counting_call(request: Any, wait_s: float = 0.0) -> Any:
        counts[request.name] += 1
        return call(request, wait_s)

    session.call = counting_call  # type: ignore[method-assign]
    return counts


def blocks_of(heap: hc.Heap, kind: EntryKind) -> list[Entry]:
    """The heap's blocks of one kind, as a walk shows them."""
    return [entry for entry in heap.walk() if entry.kind is kind]


def cached_by(heap: hc.Heap, session: hc.Session) -> int:
    """Blocks that a session caches, as a walk by `heap`'s session shows them."""
    return sum(entry.session == session.number for entry in blocks_of(heap, EntryKind.CACHED))


def check_empty(heap: hc.Heap) -> None:
    """Nothing is allocated or cached in the heap, and it is sound."""
    heap.trim()
    statistics = heap.statistics()
    assert (statistics.busy_blocks, statistics.cached_blocks) == (0, 0)
    assert heap.validate() == []
    assert statistics.allocations == statistics.releases


def sizes(seed: int, low: int = 16, high: int = 65_536) -> Iterator[int]:
    """Log-uniform sizes, for ever."""
    generator = random.Random(seed)
    while True:
        yield int(low * (high / low) ** generator.random())


# -- interrupts --------------------------------------------------------------------------------------------------------
class Interrupt(BaseException):
    """What the signal handler raises."""


@contextmanager
def interrupts() -> Iterator[Callable[..., bool]]:
    """Gives `attempt(delay_s, call, ...)`: call, and have a signal handler raise after `delay_s`; True if it did."""

    def handler(number: int, frame: Any) -> None:
        raise Interrupt

    def attempt(delay_s: float, call: Callable[..., object], *arguments: object) -> bool:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay_s)
                call(*arguments)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            return True
        return False

    gc.collect()
    gc.disable()  # an interrupt in a finaliser of what other tests left would only be printed
    before, (left, _) = signal.signal(signal.SIGALRM, handler), signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield attempt
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)  # of the test runner's own timeout


# -- processes ---------------------------------------------------------------------------------------------------------
def fork(work: Callable[[], None], lifetime_s: int = 100) -> int:
    """A forked process that does `work` and ends without any cleanup, after `lifetime_s` in any case; its id. Exit
    status 0 if nothing was raised."""
    import sys

    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(lifetime_s)  # whatever happens to the test, it does not outlive it for long
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stderr.flush()
        os._exit(status)
