"""The walk: regions, blocks, free bytes and uncommitted ranges in address order, page by page, whatever happens between
two pages of it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from heapd.arena import Arena
from heapd.heap import Heap, space, walk
from heapd.layout import SLAB_WORD
from heapd.records import Entry, EntryKind, Grant
from heapd.sizeclass import class_of
from heapd.units import KIB, MIB, PAGE_SIZE
from tests.heap.conftest import MakeHeap
from tests.invariants import check_heap, check_tiling, everyone, walk_all

SESSION = 7


@pytest.fixture
def populated(heap: Heap) -> Heap:
    """A heap with blocks of every kind, holes among them, and several regions."""
    grants = [heap.alloc(size, SESSION) for size in (10, 64, 64, 1000, 5000, 8192, 70_000, 300_000, 2 * MIB) * 3]
    for grant in grants[2::4]:
        heap.free(grant.address, grant.generation)
    return heap


# -- what is told ------------------------------------------------------------------------------------------------------
def test_a_new_heap_is_a_region_a_free_page_and_the_rest(heap: Heap) -> None:
    """The REGION entry tells its reserve and what of it is committed."""
    region, free, rest = walk_all(heap)
    assert (region.kind, region.size, region.extent, region.committed) == (EntryKind.REGION, 65536, 65536, PAGE_SIZE)
    assert (free.kind, free.address, free.extent) == (EntryKind.FREE, region.address, PAGE_SIZE)
    assert (rest.kind, rest.extent) == (EntryKind.UNCOMMITTED, 65536 - PAGE_SIZE)


def test_a_busy_entry_tells_what_its_owner_was_given(heap: Heap) -> None:
    """Address, requested size, extent, session, generation, and whether it is a run."""
    small, run = heap.alloc(100, 3), heap.alloc(8000, 4)
    busy = {entry.address: entry for entry in walk_all(heap) if entry.kind is EntryKind.BUSY}
    for grant, size, session, is_run in ((small, 100, 3, False), (run, 8000, 4, grant_is_run(run, heap))):
        entry = busy[grant.address]
        assert (entry.size, entry.extent, entry.session, entry.generation, entry.is_run, entry.orphaned) == (
            size,
            grant.extent,
            session,
            grant.generation,
            is_run,
            False,
        )


def grant_is_run(grant: Grant, heap: Heap) -> bool:
    return heap.arena.shape.is_run_slot(grant.slot)


def test_blocks_of_a_dead_session_are_orphaned(heap: Heap) -> None:
    """By the judge's word, for blocks of both kinds."""
    heap.alloc(100, 3), heap.alloc(100, 4), heap.alloc(8192, 3)
    busy = [entry for entry in walk_all(heap, is_live=lambda number: number == 4) if entry.kind is EntryKind.BUSY]
    assert sorted((entry.session, entry.orphaned) for entry in busy) == [(3, True), (3, True), (4, False)]


def test_cached_blocks_are_told_with_the_session_that_caches_them(heap: Heap) -> None:
    """Leased to a front end and not allocated: neither busy nor free."""
    heap.lease(64, 5, 9)
    heap.lease(8192, 2, 9)
    cached = [entry for entry in walk_all(heap) if entry.kind is EntryKind.CACHED]
    assert Counter((entry.session, entry.extent) for entry in cached) == {(9, 64): 5, (9, 8192): 2}
    check_heap(heap)


def test_entries_are_in_address_order_within_a_region_and_tile_it(populated: Heap) -> None:
    """No gap and no overlap, and the last entry ends with its region."""
    entries = walk_all(populated)
    check_tiling(entries)
    assert {entry.kind for entry in entries} >= {EntryKind.BUSY, EntryKind.FREE, EntryKind.OVERHEAD}
    assert [entry.region for entry in entries] == sorted(entry.region for entry in entries)


@pytest.mark.parametrize("size", [16, 48, 64, 1000, 3000, 10_000, 40_000])
def test_a_slab_tiles_at_every_stage_of_its_carving(heap: Heap, size: int) -> None:
    """Head, blocks, the rest of the page, uncommitted pages, the end too small for a block: after each alloc."""
    kind = class_of(size)
    for _ in range(min(kind.block_count, 70) + 1):
        heap.alloc(size, SESSION)
        check_tiling(walk_all(heap))
    check_heap(heap)


def test_a_walk_commits_nothing(make_heap: MakeHeap, arena: Arena) -> None:
    """A mapped read of a hole would: uncommitted pages are told of from the daemon's records alone."""
    heap = make_heap(maximum=64 * MIB)
    for size in (10, 3000, 10_000, 500_000):
        heap.alloc(size, SESSION)
    before = arena.segment.allocated_bytes
    check_heap(heap)
    assert arena.segment.allocated_bytes == before == arena.budget.committed


# -- page by page ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [*range(1, 20), 50, 64, 65, 100, 1000, 4096])
def test_every_page_size_gives_the_same_walk(populated: Heap, limit: int) -> None:
    """Cut anywhere, the pieces make the whole."""
    assert walk_all(populated, limit=limit) == walk_all(populated, limit=100_000)


def test_a_page_has_at_most_as_many_entries_as_asked_for(populated: Heap) -> None:
    """So that an answer fits in a message."""
    cursor = 0
    for _ in range(10_000):
        page, cursor = walk(populated, cursor, 5, everyone)
        assert 1 <= len(page) <= 5
        if not cursor:
            return
    pytest.fail("the walk does not end")


@pytest.mark.parametrize("cursor", [1, 5, 2**42, 2**42 + 4096, 7 << 42 | 999, 2**63 - 1, (1 << 42) + 2**41])
def test_a_cursor_that_nobody_gave_out_is_survived(populated: Heap, cursor: int) -> None:
    """Some entries or none, never an exception, and the walk ends."""
    for _ in range(10_000):
        _, cursor = walk(populated, cursor, 50, everyone)
        if not cursor:
            return
    pytest.fail("the walk does not end")


def busy(entries: list[Entry]) -> Counter[int]:
    return Counter(entry.address for entry in entries if entry.kind is EntryKind.BUSY)


@pytest.mark.parametrize("limit", [1, 3, 17])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_that_live_through_the_walk_are_told_exactly_once(make_heap: MakeHeap, seed: int, limit: int) -> None:
    """Others come and go between two pages of it: slabs and regions appear, vanish, and change what they are."""
    random_ = random.Random(seed)
    heap = make_heap(maximum=0 if seed % 2 else 64 * MIB)
    sizes = [40, 500, 3000, 5000, 8192, 20_000, 90_000, 1_200_000]
    steady = [heap.alloc(random_.choice(sizes), SESSION) for _ in range(40)]
    passing = [heap.alloc(random_.choice(sizes), SESSION) for _ in range(60)]
    random_.shuffle(passing)
    for grant in passing[30:]:
        heap.free(grant.address, grant.generation)
    del passing[30:]
    seen: list[Entry] = []
    cursor = 0
    while True:
        page, cursor = walk(heap, cursor, limit, everyone)
        seen += page
        if not cursor:
            break
        for _ in range(2):
            if passing and random_.random() < 0.5:
                gone = passing.pop(random_.randrange(len(passing)))
                heap.free(gone.address, gone.generation)
            elif len(passing) < 40:
                passing.append(heap.alloc(random_.choice(sizes), SESSION))
    told = busy(seen)
    assert {grant.address: told[grant.address] for grant in steady} == {grant.address: 1 for grant in steady}
    check_heap(heap)


def test_a_cursor_inside_what_became_one_large_run_goes_on_behind_it(make_heap: MakeHeap) -> None:
    """The blocks behind the run are still told, as blocks."""
    heap = make_heap(maximum=MIB)
    small = [heap.alloc(8 * KIB, SESSION) for _ in range(6)]
    cursor = 0
    while True:
        page, cursor = walk(heap, cursor, 1, everyone)
        if page[0].address == small[1].address and page[0].kind is EntryKind.BUSY:
            break
    for grant in small[:4]:
        heap.free(grant.address, grant.generation)
    run = heap.alloc(32 * KIB, SESSION)
    assert run.address == small[0].address
    rest: list[Entry] = []
    while cursor:
        page, cursor = walk(heap, cursor, 1, everyone)
        rest += page
    assert sorted(busy(rest)) == [small[4].address, small[5].address]


def test_a_region_that_goes_while_the_walk_stands_in_it_hides_no_other(heap: Heap) -> None:
    """Large blocks come last in the walk although some are older: those not told yet are told after it."""
    old = heap.alloc(2 * MIB, SESSION)
    passing = heap.alloc(500 * KIB, SESSION)
    new = heap.alloc(3 * MIB, SESSION)
    cursor, seen = 0, list[Entry]()
    while passing.address not in busy(seen):
        page, cursor = walk(heap, cursor, 1, everyone)
        seen += page
    heap.free(passing.address, passing.generation)
    while cursor:
        page, cursor = walk(heap, cursor, 1, everyone)
        seen += page
    assert busy(seen)[old.address] == 1
    assert busy(seen)[new.address] == 1


def test_a_large_block_that_goes_while_the_walk_stands_in_it_repeats_no_other(heap: Heap) -> None:
    """Regions told before it are not told again, however young they are."""
    blocks = [heap.alloc(2 * MIB, SESSION) for _ in range(3)]
    small = heap.alloc(500 * KIB, SESSION)
    cursor, seen = 0, list[Entry]()
    while blocks[1].address not in busy(seen):
        page, cursor = walk(heap, cursor, 1, everyone)
        seen += page
    heap.free(blocks[1].address, blocks[1].generation)
    while cursor:
        page, cursor = walk(heap, cursor, 1, everyone)
        seen += page
    assert busy(seen) == {grant.address: 1 for grant in (*blocks, small)}


def test_a_heap_that_has_had_a_million_regions_is_walked_as_any_other(
    populated: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of large blocks makes a region each: a cursor stays within 63 bits, and the order is that of birth."""
    monkeypatch.setattr(space, "MAX_SERIAL", 40)
    old = populated.alloc(2 * MIB, SESSION)
    for _ in range(100):
        new = populated.alloc(2 * MIB, SESSION)
        populated.free(old.address, old.generation)
        old = new
    assert [region.serial for region in populated.space.in_order()][-1] <= 40
    assert walk_all(populated, limit=3) == walk_all(populated)
    assert walk_all(populated)[-1].address == old.address
    check_heap(populated)


# -- scribbled words ---------------------------------------------------------------------------------------------------
def test_a_scribbled_size_never_reaches_beyond_its_block(heap: Heap) -> None:
    """The walk tells no more than the extent, whatever the word says."""
    grants = [heap.alloc(64, SESSION), heap.alloc(8192, SESSION), heap.alloc(64, SESSION)]
    for grant in grants[:2]:
        heap.arena.words[grant.slot] = 2**64 - 2
    entries = walk_all(heap)
    check_tiling(entries)
    assert all(entry.size <= entry.extent for entry in entries)


def test_a_free_block_that_claims_to_be_busy_is_told_as_free(heap: Heap) -> None:
    """What was never lent is no block, whatever a client wrote over its word."""
    one, two = heap.alloc(64, SESSION), heap.alloc(64, SESSION)
    heap.free(one.address, one.generation)
    heap.arena.words[one.slot] = SLAB_WORD.busy(SESSION, 5, 64)
    assert sorted(busy(walk_all(heap))) == [two.address]
