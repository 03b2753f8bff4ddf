"""What the tests of the front end share: requests counted, blocks seen from outside, processes in pairs."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import heapd_client as hc
from heapd.records import Entry, EntryKind


def count_requests(session: hc.Session) -> Counter[str]:
    """How often the session asks its daemon from now on, by the name of the request."""
    counts: Counter[str] = Counter()
    connection = session._connection
    assert connection is not None
    call, post = session.call, connection.post

    def counting_call(request: Any, wait_s: float = 0.0) -> Any:
        counts[request.name] += 1
        return call(request, wait_s)

    def counting_post(request: Any) -> bool:
        is_posted = post(request)  # else it is called
        counts[request.name] += is_posted
        return is_posted

    session.call = counting_call  # type: ignore[method-assign]
    connection.post = counting_post  # type: ignore[method-assign]
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
