"""An arena taken over from an earlier process: what its pages are that one's records say, and nothing in the arena."""

from __future__ import annotations

import logging
import os
import re
from mmap import MADV_REMOVE
from typing import Final

from heapd.arena.arena import Arena
from heapd.arena.budget import Budget
from heapd.arena.segment import Segment
from heapd.errors import SegmentError
from heapd.layout import (
    CONTROL_SIZE,
    H_CONTROLS_READY,
    H_HEAP_LIMIT,
    H_INSTANCE,
    H_MAGIC,
    H_PAGE_COUNT,
    H_SESSIONS_READY,
    H_STATE,
    H_VERSION,
    KIND_NONE,
    MAGIC,
    PAGE_FREE,
    RUNNING,
    STARTING,
    WORD,
    ArenaShape,
    make_page_word,
)
from heapd.units import GRANULE_PAGES, PAGE_SHIFT, PAGE_SIZE, align_up

__all__ = ["check_file", "restore_arena"]

log = logging.getLogger("heapd.arena")

_IS_COMMITTED: Final = bytes(256).replace(b"\0\0\0", b"\0\0\1", 1)
_COMMITTED: Final = re.compile(rb"\x02+")
_IN_USE: Final = re.compile(rb"[\x01\x02]+")
_LASTING: Final = (H_MAGIC, H_VERSION, H_INSTANCE, H_INSTANCE + 1, H_PAGE_COUNT, H_HEAP_LIMIT)  # always the same
_REMOVE_PAGES: Final = 1 << 24  # 64 GiB of holes at once cost as much as one page


def restore_arena(
    name: str,
    *,
    instance: bytes,
    inode: int,
    states: bytearray,
    regions: list[tuple[int, int]],
    commit_limit: int,
    peak: int,
    incarnation: int,
) -> Arena:
    """Take over the arena of an earlier process, whose records say what its pages are. What they do not say is
    committed is given back to the system; the header, and the page map outside regions, are written anew; heaps do
    the rest.

    Args:    name (of the segment), instance (its identity), inode (of its file), states (PAGE_* of each page; kept),
             regions ((first page, pages) of all heaps), commit_limit, peak (bytes), incarnation (of the daemon on this
             arena).
    Raises:  SegmentError if the segment is missing, another one, or of another size.
    """
    regions = sorted((first, align_up(count, GRANULE_PAGES)) for first, count in regions)
    segment = Segment.attach(name)
    try:
        check_file(name, os.fstat(segment.fd), inode, len(states))
        arena = Arena(segment, ArenaShape(len(states)), Budget(commit_limit))
    except SegmentError:
        segment.close()
        raise
    arena.instance = instance
    arena._state = states
    arena.reserved = sum(count for _, count in regions) * PAGE_SIZE
    arena.budget.committed = arena.committed_in(0, len(states)) * PAGE_SIZE
    arena.budget.peak = max(peak, arena.budget.committed)
    _restore_tables(arena)
    _restore_free(arena, regions)
    _rewrite_header(arena, incarnation)
    return arena


def check_file(name: str, status: os.stat_result, inode: int, page_count: int) -> None:
    """Raises: SegmentError if a segment is not the arena that the records are of. Its header has no say in that."""
    if status.st_size != page_count * PAGE_SIZE:
        raise SegmentError(f"the arena {name} has {status.st_size} bytes, its records are of {page_count} pages")
    if status.st_ino != inode:
        raise SegmentError(f"the arena {name} is another one than its records are of")


def _rewrite_header(arena: Arena, incarnation: int) -> None:
    """Write the header from the records, and log which words somebody else had written to."""
    found = {slot: arena.words[slot] for slot in (*_LASTING, H_STATE)}
    arena._write_header(incarnation)
    arena._tell(H_MAGIC, MAGIC)
    wrong = [slot for slot in _LASTING if found[slot] != arena.words[slot]]
    if found[H_STATE] not in (STARTING, RUNNING):
        wrong.append(H_STATE)
    if wrong:
        what = ", ".join(f"word {slot} was {found[slot]:#x}" for slot in wrong)
        log.error("the header of the arena %s was overwritten, and is put right: %s", arena.segment.name, what)


def _restore_tables(arena: Arena) -> None:
    """Find in the states of the tables' pages which parts of them are in use, and drop the rest."""
    shape = arena.shape
    if arena.segment.allocated_bytes != arena.budget.committed:  # the kernel counts what nobody recorded
        _remove_unrecorded(arena)
    first = shape.controls >> PAGE_SHIFT
    arena._controls_ready = arena.committed_in(first, (shape.sessions >> PAGE_SHIFT) - first)
    arena._controls_ready *= PAGE_SIZE // CONTROL_SIZE
    arena.words[H_CONTROLS_READY] = arena._controls_ready
    first = shape.sessions >> PAGE_SHIFT
    arena._sessions_ready = arena.committed_in(first, (shape.directory >> PAGE_SHIFT) - first) * (PAGE_SIZE // WORD)
    arena.words[H_SESSIONS_READY] = arena._sessions_ready
    # A chunk's run words are committed last.
    first = shape.run_words >> PAGE_SHIFT
    arena.pages.restore(arena._state[first : first + shape.chunk_count].translate(_IS_COMMITTED))


def _remove_unrecorded(arena: Arena) -> None:
    """Give back the memory of pages that are not committed by the records."""
    at = 0
    for first, end in [*(match.span() for match in _COMMITTED.finditer(arena._state)), (arena.shape.page_count, 0)]:
        for start in range(at, first, _REMOVE_PAGES):
            count = min(_REMOVE_PAGES, first - start)
            arena.segment.mapping.madvise(MADV_REMOVE, start << PAGE_SHIFT, count << PAGE_SHIFT)
        at = end


def _restore_free(arena: Arena, regions: list[tuple[int, int]]) -> None:
    """What lies between regions is free, or was released and waits to be decommitted."""
    at = arena.shape.first_page
    for first, count in [*regions, (arena.shape.page_count, 0)]:
        if first > at:
            arena.pages.set(at, first - at, make_page_word(PAGE_FREE, KIND_NONE, 0, 0))
            _restore_gap(arena, at, first)
        at = first + count


def _restore_gap(arena: Arena, at: int, end: int) -> None:
    if arena._state.count(PAGE_FREE, at, end) == end - at:  # mostly; and 60 times as fast as the search below
        _restore_granules(arena, at, end)
        return
    for match in _IN_USE.finditer(arena._state, at, end):
        _restore_granules(arena, at, match.start())
        arena._doomed.append((match.start(), match.end() - match.start()))
        at = match.end()
    _restore_granules(arena, at, end)


def _restore_granules(arena: Arena, first: int, end: int) -> None:
    if end > first:
        arena._granules.give(first // GRANULE_PAGES, (end - first) // GRANULE_PAGES)
