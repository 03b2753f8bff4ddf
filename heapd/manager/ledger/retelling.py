"""All records, told again as changes, in portions of a fraction of a millisecond.

Between two portions requests go on, and tell of their changes themselves. So each portion looks at what is there as it
is made: what came since was told, or will be; what went is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

from heapd.arena import Arena
from heapd.heap import Slab
from heapd.journal import (
    COUNTS,
    ENDED,
    ENDING,
    EPOCH,
    JOIN,
    LEAVE,
    NAME,
    OWNERS,
    PAGES,
    PENDING,
    REGION,
    RUN,
    SESSION,
    SLAB,
    WHOLE,
    Change,
)
from heapd.manager.directory import Directory
from heapd.manager.ledger.ledger import Telling
from heapd.manager.ledger.records import pack_bits
from heapd.manager.sessions import Session
from heapd.manager.shared import SharedHeap

__all__ = ["retell"]

_PORTION: Final = 100  # things told of at once; arbitrary, some 100 us
_STRETCH: Final = re.compile(rb"\x01+|\x02+")  # pages of one state that is not FREE
_PAGES_AT_ONCE: Final = 1 << 18  # looked through in 100 us

Item = TypeVar("Item")


def retell(directory: Directory) -> Iterator[Telling]:
    """Everything that `Records` needs to be whole."""
    arena = directory.arena
    for changes in _tell_pages(arena, 0, arena.shape.first_page):
        yield 0, 0, 0, b"", changes
    epochs = directory.controls.epochs
    for portion in _portions(range(len(epochs))):
        yield 0, 0, 0, b"", [(EPOCH, index, epochs[index]) for index in portion]
    for session in list(directory.sessions):
        yield from _tell_session(directory, session)
    for shared in list(directory.heaps.values()):
        for changes in _tell_heap(arena, shared):
            yield 0, 0, 0, b"", changes
    for first, page_count in list(arena.doomed):
        for changes in _tell_pages(arena, first, page_count):
            yield 0, 0, 0, b"", changes
    yield 0, 0, 0, b"", _tell_rest(directory)


def _portions(items: Iterable[Item]) -> Iterator[list[Item]]:
    """A list of what there is now, in portions."""
    rest = iter(list(items))
    while portion := list(islice(rest, _PORTION)):
        yield portion


def _tell_pages(arena: Arena, first: int, page_count: int) -> Iterator[list[Change]]:
    """What pages are that are not free; the others are, as long as nobody says otherwise."""
    for start in range(first, first + page_count, _PAGES_AT_ONCE):
        states = arena.states(start, min(_PAGES_AT_ONCE, first + page_count - start))
        yield [
            (PAGES, start + match.start(), match.end() - match.start(), match[0][0])
            for match in _STRETCH.finditer(states)
        ]


def _tell_session(directory: Directory, session: Session) -> Iterator[Telling]:
    number = session.number
    if directory.sessions.find(number) is not session:
        return
    changes: list[Change] = [
        (SESSION, number, session.token, session.pid, session.uid, session.start_time, session.opened_ns),
        # First: a heap that was closed may have been opened again.
        *((LEAVE, number, shared.heap_id) for shared in session.closed if not shared.is_destroyed),
        *((JOIN, number, heap_id) for heap_id in session.heaps),
    ]
    if not session.is_live:
        changes += [(ENDING, number)] if session.is_ending else [(ENDING, number), (ENDED, number)]
    replies = list(session.replies.items())
    yield number, session.requests, 0, b"", changes
    for request_id, answer in replies:
        yield number, session.requests, request_id, answer, []


def _tell_heap(arena: Arena, shared: SharedHeap) -> Iterator[list[Change]]:
    if shared.is_destroyed:
        return
    yield [shared.change(), (OWNERS, shared.index, list(shared.orphan_owners))]
    yield from _tell_regions(arena, shared)
    for parts in (_tell_slabs, _tell_runs, _tell_names):
        yield from parts(shared)
    if not shared.is_destroyed:  # all its blocks are told: from now on whoever reads can count
        yield [(COUNTS, shared.index, shared.heap.allocations, shared.heap.releases)]


def _tell_regions(arena: Arena, shared: SharedHeap) -> Iterator[list[Change]]:
    space, index = shared.heap.space, shared.index
    for serial in list(space.regions):
        region = space.regions.get(serial)
        if region is None:
            continue
        yield [(REGION, index, serial, region.first, region.page_count, region.is_big)]
        yield from _tell_pages(arena, region.first, region.reserved)


def _tell_slabs(shared: SharedHeap) -> Iterator[list[Change]]:
    heap = shared.heap
    for portion in _portions(heap.slabs):
        slabs = [slab for first in portion if (slab := heap.slabs.get(first)) is not None]
        yield [
            (SLAB, shared.index, slab.first_page, slab.page_count, slab.kind.index, slab.carved, _bits(slab))
            for slab in slabs
        ]


def _bits(slab: Slab) -> bytes:
    """Which of the carved blocks are lent."""
    if slab.lent_count == slab.carved:
        return pack_bits(bytes((1,)) * slab.carved)
    return pack_bits(bytes(map(bool, slab.lent[: slab.carved])))


def _tell_runs(shared: SharedHeap) -> Iterator[list[Change]]:
    heap = shared.heap
    for portion in _portions(heap.runs):
        yield [
            (RUN, shared.index, first, heap.runs[first], int(first not in heap.unfinished))
            for first in portion
            if first in heap.runs
        ]


def _tell_names(shared: SharedHeap) -> Iterator[list[Change]]:
    for portion in _portions(shared.names):
        if shared.is_destroyed:
            return
        yield [(NAME, shared.index, name, *shared.names[name]) for name in portion if name in shared.names]


def _tell_rest(directory: Directory) -> list[Change]:
    """What is small, told at one go, as the last."""
    changes: list[Change] = []
    for unanswered in directory.unanswered.values():
        shared = unanswered.shared
        changes += [
            (PENDING, unanswered.ticket, shared.index, shared.heap_id, grant.address, grant.generation)
            for grant in unanswered.grants
        ]
    changes.append((WHOLE, directory.arena.budget.peak, directory.sessions.last_number, directory.controls.next_serial))
    return changes
