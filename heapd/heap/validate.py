"""The invariants of a heap, checked against the daemon's own records; what clients wrote is looked at, never trusted.

1. Slabs, runs and spare extents tile every region.          2. Spare extents are coalesced and filed right.
3. Each page word says what the records say.                 4. A slab's head names its class; its lists agree.
5. A lent block's word is BUSY or CACHED, by a known session, with a size that fits; any other block's is FREE.
6. The control block names the heap and is live, its mutex is one; the arena's header is as written (the manager).

A finding names the session that holds the block: the one in its word, and where that is none, the one it was lent to.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from heapd.heap.heap import Heap
from heapd.heap.holdings import NOBODY
from heapd.heap.slab import Slab
from heapd.heap.space import Region
from heapd.layout import (
    BUSY,
    CACHED,
    FREE,
    KIND_RUN,
    KIND_SLAB,
    KIND_SPARE,
    PAGE_COMMITTED,
    PAGE_RESERVED,
    RUN_WORD,
    SLAB_WORD,
    WordFormat,
    slab_class_index,
    split_page_word,
)
from heapd.records import Violation
from heapd.units import PAGE_SHIFT

__all__ = ["MAX_VIOLATIONS", "validate_block", "validate_heap"]

MAX_VIOLATIONS = 1000  # arbitrary: a heap that is broken everywhere must not fill the answer
_BLOCKS_A_SLICE = 5_000

IsKnown = Callable[[int], bool]
_NAMES = {FREE: "free", CACHED: "cached", BUSY: "busy"}
_KINDS = {KIND_SPARE: "spare", KIND_SLAB: "slab", KIND_RUN: "run"}


def validate_heap(heap: Heap, is_known: IsKnown, tail: bytes = b"") -> Generator[None, None, list[Violation]]:
    """Check a whole heap, yielding between slices of a few ms; returns at most MAX_VIOLATIONS.

    Args: is_known (session number -> bool): live, or ended with blocks left; tail (bytes that each allocated block
    ends in, b"" for none: if they are gone, somebody wrote past the end of what he asked for).
    """
    found: list[Violation] = [Violation("extents", 0, 0, text) for text in heap.space.spare.violations()]
    seen = 0
    for region in heap.space.in_order():
        if region.serial not in heap.space.regions:
            continue
        found += _check_tiling(heap, region)
        found += _check_page_words(heap, region)
        seen += region.page_count
        if seen >= _BLOCKS_A_SLICE:
            seen = 0
            yield
    for slab in list(heap.slabs.values()):
        if heap.slabs.get(slab.first_page) is slab and len(found) < MAX_VIOLATIONS:
            found += _check_slab(heap, slab, is_known)
            if tail:
                found += _check_tails(heap, slab, tail)
            seen += slab.carved
            if seen >= _BLOCKS_A_SLICE:
                seen = 0
                yield
    for first in list(heap.runs):
        if first in heap.runs and first not in heap.unfinished and len(found) < MAX_VIOLATIONS:
            found += _check_run(heap, first, is_known)
            if tail:
                word, extent = heap.arena.words[heap.arena.shape.run_slot(first)], heap.runs[first] << PAGE_SHIFT
                found += _check_tail(heap, RUN_WORD, word, first << PAGE_SHIFT, extent, tail)
            seen += 1
    return found[:MAX_VIOLATIONS]


def validate_block(heap: Heap, address: int, is_known: IsKnown) -> list[Violation]:
    """Check the block that begins at `address`; its being free, or no block at all, is a violation, too."""
    page = address >> PAGE_SHIFT
    slab = heap.pool.at(page)
    if slab is not None:
        index = slab.index_of(address)
        if index is None or index >= slab.carved:
            return [Violation("not-a-block", address, 0, "no block begins here")]
        if not slab.lent[index]:
            return [Violation("free-block", address, 0, "the block is free")]
        word = heap.arena.words[slab.slot + index]
        return [
            *_check_lent_word(SLAB_WORD, word, address, slab.kind.extent, is_known, slab.lent[index]),
            *_check_busy(SLAB_WORD, word, address),
        ]
    if address % (1 << PAGE_SHIFT) or page not in heap.runs:
        return [Violation("not-a-block", address, 0, "no block begins here")]
    word = heap.arena.words[heap.arena.shape.run_slot(page)]
    extent = heap.runs[page] << PAGE_SHIFT
    return [
        *_check_lent_word(RUN_WORD, word, address, extent, is_known, heap.borrowers[page]),
        *_check_busy(RUN_WORD, word, address),
    ]


def _check_busy(form: WordFormat, word: int, address: int) -> Iterator[Violation]:
    if form.state(word) == CACHED:
        yield Violation("free-block", address, form.session(word), "the block is free, in a front end's cache")


def _check_tiling(heap: Heap, region: Region) -> Iterator[Violation]:
    page = region.first
    while page < region.end:
        slab = heap.slabs.get(page)
        count = slab.page_count if slab else heap.runs.get(page) or heap.space.spare.count_at(page)
        if not count and region.is_big:
            return  # the rest of the last granule
        if not count:
            yield Violation("tiling", page << PAGE_SHIFT, 0, "the page is in no slab, run or spare extent")
            return
        page += count
    if page > region.end:
        yield Violation("tiling", region.first << PAGE_SHIFT, 0, "a slab, run or extent reaches beyond its region")


def _check_page_words(heap: Heap, region: Region) -> Iterator[Violation]:
    page, arena = region.first, heap.arena
    while page < region.end:
        slab = heap.slabs.get(page)
        kind = KIND_SLAB if slab else KIND_RUN if page in heap.runs else KIND_SPARE
        count = slab.page_count if slab else heap.runs.get(page) or heap.space.spare.count_at(page)
        count = count or region.end - page
        for at, length, word in arena.pages.spans(page, count):
            info = split_page_word(word)
            committed = length if info.state == PAGE_COMMITTED else 0
            if (
                (info.kind, info.heap) != (kind, heap.index)
                or (kind != KIND_SPARE and info.start != page)
                or info.state not in (PAGE_RESERVED, PAGE_COMMITTED)
                or arena.committed_in(at, length) != committed
            ):
                detail = f"the page map has {info} for a {_KINDS[kind]} page of heap {heap.index} from page {page}"
                yield Violation("page-map", at << PAGE_SHIFT, 0, detail)
        page += count


def _check_slab(heap: Heap, slab: Slab, is_known: IsKnown) -> Iterator[Violation]:
    arena, kind = heap.arena, slab.kind
    address = slab.first_page << PAGE_SHIFT
    if slab_class_index(arena.words[slab.slot - 1]) != kind.index:
        yield Violation("slab-head", address, 0, f"the slab's descriptor does not name class {kind.index}")
    listed = len(slab.free) + len(slab.hollow) + slab.lent_count
    if len(slab.lent) - slab.lent.count(0) != slab.lent_count or listed != slab.carved:
        yield Violation("slab-lists", address, 0, "free, lent and carved blocks of the slab do not add up")
    if (slab in heap.pool.partial[kind.index]) == slab.is_full:
        yield Violation("slab-lists", address, 0, "the slab is filed wrong among those with room")
    holes = sum(slab.own_pages(index)[1] for index in slab.hollow)
    if any(arena.committed_in(*slab.own_pages(index)) for index in slab.hollow):
        yield Violation("commit", address, 0, "a hollow block's own pages are committed")
    elif arena.committed_in(slab.first_page, slab.pages_touched) != slab.pages_touched - holes:
        yield Violation("commit", address, 0, "carved blocks lie on uncommitted pages")
    for index, word in enumerate(arena.words[slab.slot : slab.slot + slab.carved].tolist()):
        block = slab.base + index * kind.extent
        if slab.lent[index]:
            yield from _check_lent_word(SLAB_WORD, word, block, kind.extent, is_known, slab.lent[index])
        elif SLAB_WORD.state(word) != FREE or SLAB_WORD.session(word):
            detail = f"a free block's state word says {_NAMES.get(SLAB_WORD.state(word), 'nonsense')}"
            yield Violation("state-word", block, SLAB_WORD.session(word), detail)


def _check_run(heap: Heap, first: int, is_known: IsKnown) -> Iterator[Violation]:
    word = heap.arena.words[heap.arena.shape.run_slot(first)]
    extent = heap.runs[first] << PAGE_SHIFT
    yield from _check_lent_word(RUN_WORD, word, first << PAGE_SHIFT, extent, is_known, heap.borrowers[first])


def _check_tails(heap: Heap, slab: Slab, tail: bytes) -> Iterator[Violation]:
    for index, word in enumerate(heap.arena.words[slab.slot : slab.slot + slab.carved].tolist()):
        if slab.lent[index]:
            address, extent = slab.base + index * slab.kind.extent, slab.kind.extent
            yield from _check_tail(heap, SLAB_WORD, word, address, extent, tail)


def _check_tail(heap: Heap, form: WordFormat, word: int, address: int, extent: int, tail: bytes) -> Iterator[Violation]:
    size = form.size(word)
    if form.state(word) != BUSY or not len(tail) <= size <= extent:
        return
    end = address + size
    found = bytes(heap.arena.segment.buffer[end - len(tail) : end])
    if found != tail:
        at = next(number for number in range(len(tail)) if found[number] != tail[number])
        detail = f"something was written past the block's {size - len(tail)} bytes, {at} bytes behind their end"
        yield Violation("overrun", address, form.session(word), detail)


def _check_lent_word(
    form: WordFormat, word: int, address: int, extent: int, is_known: IsKnown, borrower: int
) -> Iterator[Violation]:
    state, session = form.state(word), form.session(word)
    if state not in (BUSY, CACHED):
        detail = "a block that was given out has a state word that says free"
        yield Violation("state-word", address, 0 if borrower == NOBODY else borrower, detail)
    elif not is_known(session):
        detail = f"the state word names session {session}, which never was"
        yield Violation("state-word", address, 0 if borrower == NOBODY else borrower, detail)
    elif state == BUSY and form.size(word) > extent:
        detail = f"the state word says {form.size(word)} bytes, the block has {extent}"
        yield Violation("state-word", address, session, detail)
