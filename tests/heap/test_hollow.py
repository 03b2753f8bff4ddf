"""Hollow blocks: a free block of many pages keeps none to itself, though its slab stays."""

from __future__ import annotations

import pytest

from heapd.arena import Arena
from heapd.errors import DoubleFreeError, HeapFullError
from heapd.heap import Heap
from heapd.records import EntryKind, Grant
from heapd.sizeclass import CLASSES, HOLLOW_EXTENT, class_of
from heapd.units import PAGE_SIZE
from tests.arenas import Commits
from tests.invariants import check_arena, check_heap, walk_all

SESSION = 7
SIZE = 30_000  # of a slab class: 30,720 B, 7 or 8 pages of its own each


def _blocks(heap: Heap, count: int, size: int = SIZE) -> list[Grant]:
    return [heap.alloc(size, SESSION) for _ in range(count)]


def _free(heap: Heap, grant: Grant) -> None:
    heap.free(grant.address, grant.generation)


def test_a_freed_block_keeps_no_page_to_itself(heap: Heap, arena: Arena) -> None:
    """But those that it shares with its neighbours, which are in use and keep what was written there."""
    before, block, after = _blocks(heap, 3)
    for grant, filler in ((before, b"b"), (after, b"a")):
        arena.segment.buffer[grant.address : grant.address + SIZE] = filler * SIZE
    committed = arena.segment.allocated_bytes
    _free(heap, block)
    assert arena.segment.allocated_bytes <= committed - SIZE // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE
    for grant, filler in ((before, b"b"), (after, b"a")):
        assert bytes(arena.segment.buffer[grant.address : grant.address + SIZE]) == filler * SIZE
    check_heap(heap)
    check_arena(arena, [heap])


def test_it_is_given_out_again_with_its_pages(heap: Heap, arena: Arena) -> None:
    """At the same address, as another generation, before anything else is carved; all of it can be written."""
    _, block, _ = _blocks(heap, 3)
    committed = heap.space.committed
    _free(heap, block)
    again = heap.alloc(SIZE, SESSION)
    assert again.address == block.address
    assert again.generation != block.generation
    assert heap.space.committed == committed
    arena.segment.buffer[again.address : again.address + SIZE] = b"x" * SIZE
    check_heap(heap)
    check_arena(arena, [heap])  # to write there committed nothing


def test_every_class_from_two_pages_up_has_such_blocks(heap: Heap, arena: Arena) -> None:
    """Wherever in its slab a block lies it has a page to itself."""
    for kind in CLASSES:
        if kind.is_run or kind.extent < HOLLOW_EXTENT:
            continue
        grants = _blocks(heap, kind.block_count, kind.extent)
        for grant in grants[1:]:
            committed = arena.segment.allocated_bytes
            _free(heap, grant)
            assert arena.segment.allocated_bytes < committed
        check_heap(heap)
        _free(heap, grants[0])
    check_arena(arena, [heap])


def test_a_double_free_is_told(heap: Heap) -> None:
    """The slab is still there, and knows."""
    _, block = _blocks(heap, 2)
    _free(heap, block)
    with pytest.raises(DoubleFreeError):
        _free(heap, block)


def test_without_memory_for_its_pages_nothing_changes(heap: Heap, commits: Commits) -> None:
    """The alloc fails, and the block is given out when there is memory again."""
    _, block = _blocks(heap, 2)
    _free(heap, block)
    commits.fail(1, persistent=True)
    with pytest.raises(HeapFullError):
        heap.alloc(SIZE, SESSION)
    commits.work()
    check_heap(heap)
    assert heap.alloc(SIZE, SESSION).address == block.address


def test_a_walk_tells_its_parts(heap: Heap) -> None:
    """What it shares with others is free, what it had to itself is uncommitted; also where the walk goes on there."""
    _, block, _ = _blocks(heap, 3)
    _free(heap, block)
    entries = walk_all(heap)
    end = block.address + class_of(SIZE).extent
    parts = [entry for entry in entries if block.address <= entry.address < end]
    assert [part.kind for part in parts] == [EntryKind.FREE, EntryKind.UNCOMMITTED, EntryKind.FREE]
    assert sum(part.extent for part in parts) == class_of(SIZE).extent
    assert walk_all(heap, limit=1) == entries
