"""What must hold at every moment, checked from outside: of a heap, of an arena with its heaps, of a manager.

The sums of statistics and of a walk are made here a second time, entry by entry; validate is one of the checks, not
the judge of them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from heapd.arena import Arena
from heapd.heap import Heap, collect_statistics, validate_heap, walk
from heapd.layout import H_COMMITTED, H_RESERVED, page_word
from heapd.manager import HeapManager
from heapd.records import Entry, EntryKind, HeapStatistics
from heapd.units import PAGE_SHIFT, PAGE_SIZE
from tests.arenas import finish

Judge = Callable[[int], bool]


def everyone(number: int) -> bool:
    """A judge of session numbers that knows them all."""
    return True


def walk_all(heap: Heap, *, limit: int = 1024, is_live: Judge = everyone) -> list[Entry]:
    """The whole walk, page by page."""
    entries: list[Entry] = []
    cursor = 0
    while True:
        page, cursor = walk(heap, cursor, limit, is_live)
        assert len(page) <= limit + 8, "a page of the walk is far longer than asked for"
        entries += page
        if not cursor:
            return entries
        assert page, "an empty page of a walk that goes on"


def check_tiling(entries: Iterable[Entry]) -> None:
    """The entries after a REGION tile it: no gap, no overlap, in address order; its committed bytes add up."""
    region: Entry | None = None
    at = committed = 0
    for entry in [*entries, None]:
        if entry is None or entry.kind is EntryKind.REGION:
            if region is not None:
                assert at == region.address + region.extent, f"the entries end at {at:#x}, not with {region}"
                assert committed == region.committed, f"{committed} bytes of the entries are committed in {region}"
            region, committed, at = entry, 0, entry.address if entry else 0
            continue
        assert entry.address == at, f"the entry before ends at {at:#x}, but next comes {entry}"
        assert entry.extent > 0, entry
        assert entry.size <= entry.extent, entry
        at += entry.extent
        committed += 0 if entry.kind is EntryKind.UNCOMMITTED else entry.extent


def check_sums(statistics: HeapStatistics) -> None:
    """The two equations that its docstring promises."""
    s = statistics
    assert s.reserved == s.committed + s.uncommitted, s
    assert s.committed == s.busy + s.padding + s.cached + s.free + s.overhead, s
    assert s.orphaned <= s.busy, s
    assert s.orphaned_blocks <= s.busy_blocks, s
    assert s.largest_free <= s.free, s
    assert all(getattr(s, field) >= 0 for field in s.__slots__), s


def check_heap(heap: Heap, *, is_known: Judge = everyone, is_live: Judge = everyone) -> HeapStatistics:
    """Every invariant of one heap that is not in the middle of a job."""
    violations = finish(validate_heap(heap, is_known))
    assert not violations, violations[:5]
    statistics: HeapStatistics = finish(collect_statistics(heap, is_live))
    check_sums(statistics)
    space = heap.space
    assert statistics.committed == space.committed << PAGE_SHIFT
    assert statistics.reserved == space.reserved << PAGE_SHIFT
    spare = [part for start, count in space.spare for part in heap.arena.stretches(start, count)]
    assert space.spare_committed == sum(count for _, count, is_committed in spare if is_committed)
    entries = walk_all(heap, is_live=is_live)
    check_tiling(entries)
    _check_walk_adds_up(entries, statistics)
    assert heap.allocations - heap.releases == statistics.busy_blocks + statistics.cached_blocks
    _check_holdings(heap)
    return statistics


def _check_holdings(heap: Heap) -> None:
    """Every lent block is charged to one session, with all that it occupies."""
    held: Counter[int] = Counter()
    for slab in heap.slabs.values():
        for borrower in slab.lent:
            held[borrower] += slab.kind.extent if borrower else 0
    assert heap.borrowers.keys() == heap.runs.keys()
    for first, borrower in heap.borrowers.items():
        held[borrower] += heap.runs[first] << PAGE_SHIFT
    assert +held == Counter(dict(heap.held))


def _check_walk_adds_up(entries: list[Entry], statistics: HeapStatistics) -> None:
    """The walk and the statistics tell of the same bytes."""
    extents: Counter[EntryKind] = Counter()
    for entry in entries:
        extents[entry.kind] += entry.extent
    assert extents[EntryKind.REGION] == statistics.reserved
    assert extents[EntryKind.BUSY] == statistics.busy + statistics.padding
    assert extents[EntryKind.CACHED] == statistics.cached
    assert extents[EntryKind.FREE] == statistics.free
    assert extents[EntryKind.UNCOMMITTED] == statistics.uncommitted
    assert extents[EntryKind.OVERHEAD] == statistics.overhead
    busy = [entry for entry in entries if entry.kind is EntryKind.BUSY]
    assert len(busy) == statistics.busy_blocks
    assert sum(entry.size for entry in busy) == statistics.busy
    assert sum(entry.size for entry in busy if entry.orphaned) == statistics.orphaned
    assert all(entry.address % (64 if entry.extent >= 64 else 16) == 0 for entry in busy)


def check_arena(arena: Arena, heaps: Iterable[Heap]) -> None:
    """What the arena counts is what the kernel counts, and what its heaps count; nothing waits to be decommitted."""
    heaps = list(heaps)
    assert arena.is_settled, "released pages wait for somebody to settle them"
    committed = arena.committed_in(0, arena.shape.page_count) << PAGE_SHIFT
    assert arena.segment.allocated_bytes == committed == arena.budget.committed
    tables = arena.committed_in(0, arena.shape.first_page) << PAGE_SHIFT
    assert committed == tables + (sum(heap.space.committed for heap in heaps) << PAGE_SHIFT)
    regions = [region for heap in heaps for region in heap.space.in_order()]
    assert arena.reserved == sum(region.reserved for region in regions) << PAGE_SHIFT
    assert arena.words[H_COMMITTED] == committed
    assert arena.words[H_RESERVED] == arena.reserved
    assert arena.budget.committed <= arena.budget.limit
    assert arena.budget.committed <= arena.budget.peak


def check_page_map(arena: Arena) -> None:
    """Every page of the map says what the arena says, and reading it all commits nothing."""
    before = arena.segment.allocated_bytes
    shape = arena.shape
    for page in range(shape.first_page, shape.page_count):
        assert page_word(arena.words, shape, page) >> 62 == arena.state_of(page), page
    assert arena.segment.allocated_bytes == before


def check_manager(manager: HeapManager) -> None:
    """Every invariant of a manager that has no job under way."""
    sessions = manager.sessions
    heaps = list(manager.heaps.values())
    for shared in heaps:
        check_heap(shared.heap, is_known=sessions.is_known, is_live=sessions.is_live)
        assert shared.is_persistent or shared.openers, f"heap {shared.heap_id} lives and nobody has it open"
        for number in shared.openers:
            session = sessions.find(number)
            assert session is not None
            assert session.heaps.get(shared.heap_id) is shared
        assert not shared.is_destroyed
        assert not list(manager._directory.controls.violations(shared.heap_id, shared.flags))
    for session in sessions:
        assert all(manager.heaps.get(heap_id) is shared for heap_id, shared in session.heaps.items())
        assert session.is_live == sessions.is_live(session.number)
    manager.commit(None, 0, b"")  # looking tidies up
    check_arena(manager.arena, [shared.heap for shared in heaps])


def picture(manager: HeapManager) -> Any:
    """Everything that an operation which failed must leave as it was, for one `==`.

    Not in it: pages of tables (a table that grew before the failure stays so), and which spare pages are committed.
    """
    return (
        {shared.heap_id: heap_picture(shared.heap) for shared in manager.heaps.values()},
        {shared.heap_id: (dict(shared.names), set(shared.openers)) for shared in manager.heaps.values()},
        {session.number: sorted(session.heaps) for session in manager.sessions},
        manager.arena.reserved,
    )


def heap_picture(heap: Heap) -> Any:
    """Blocks, regions and counts of a heap."""
    entries = walk_all(heap)
    return (
        [entry for entry in entries if entry.kind in (EntryKind.BUSY, EntryKind.CACHED)],
        [(entry.address, entry.extent) for entry in entries if entry.kind is EntryKind.REGION],
        heap.allocations - heap.releases,
    )


def fill(arena: Arena, address: int, size: int, seed: int) -> None:
    """Write a pattern that depends on the seed, and differs from one byte to the next, into a payload."""
    arena.segment.buffer[address : address + size] = pattern(size, seed)


def read(arena: Arena, address: int, size: int) -> bytes:
    """The bytes of a payload."""
    return bytes(arena.segment.buffer[address : address + size])


_PATTERN = bytes(range(1, 252)) * (2 * PAGE_SIZE // 251 + 2)  # 251 is prime to every size class: shifts show


def pattern(size: int, seed: int) -> bytes:
    """`size` bytes that tell `seed` and, over a few pages, their place."""
    start = seed % 251
    unit = _PATTERN[start : start + 251 * (2 * PAGE_SIZE // 251)]
    return (unit * (size // len(unit) + 1))[:size]
