"""Heap.alloc: where a block lies, how large it is, and what it costs, for every size there is."""

from __future__ import annotations

import itertools
import random
from contextlib import suppress

import pytest

from heapd.arena import Arena
from heapd.errors import BlockTooLargeError, HeapFullError
from heapd.heap import Heap
from heapd.layout import BUSY, FREE, MAX_BLOCK_SIZE, RUN_WORD, SLAB_WORD, WORD
from heapd.records import Grant
from heapd.sizeclass import CLASSES, MAX_CLASS_SIZE, SizeClass, class_of
from heapd.units import GIB, KIB, MIB, PAGE_SIZE, align_up
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap, fill, pattern, read

SESSION = 7
LARGE_SIZES = [MAX_CLASS_SIZE + 1, 100_000, 128 * KIB, MIB - 1, MIB, MIB + 1, 5 * MIB + 77, 16 * MIB, 20 * MIB]


# -- every size --------------------------------------------------------------------------------------------------------
def test_every_size_up_to_the_class_limit_gets_the_smallest_extent_that_holds_it(heap: Heap) -> None:
    """All 65,537 of them: the class's extent, alignment by size, a word that says who and how much."""
    words = heap.arena.words
    for kind in CLASSES:  # so that no slab comes and goes with every block
        heap.alloc(kind.extent, SESSION)
    for size in range(MAX_CLASS_SIZE + 1):
        grant = heap.alloc(size, SESSION)
        kind = class_of(size)
        assert grant.extent == kind.extent >= size
        assert grant.address % (PAGE_SIZE if kind.is_run else 64 if size > 48 else 16) == 0
        form = RUN_WORD if kind.is_run else SLAB_WORD
        word = words[grant.slot]
        assert (form.state(word), form.session(word), form.size(word)) == (BUSY, SESSION, size)
        assert form.generation(word) == grant.generation > 0
        heap.free(grant.address, grant.generation)
        assert form.state(words[grant.slot]) == FREE
    check_heap(heap)


@pytest.mark.parametrize("size", [4096, 8192, 12288, 61440, 65536, 69632, 128 * KIB])
def test_a_multiple_of_the_page_size_is_page_aligned(heap: Heap, size: int) -> None:
    """What is asked for in pages is given in pages."""
    heap.alloc(64, SESSION)
    grant = heap.alloc(size, SESSION)
    assert (grant.address % PAGE_SIZE, grant.extent) == (0, size)


@pytest.mark.parametrize("size", LARGE_SIZES)
def test_larger_blocks_are_whole_pages(heap: Heap, arena: Arena, size: int) -> None:
    """Page-aligned, rounded up to the page, committed to the last byte, and zero."""
    grant = heap.alloc(size, SESSION)
    assert (grant.address % PAGE_SIZE, grant.extent) == (0, align_up(size, PAGE_SIZE))
    assert grant.fresh
    assert arena.committed_in(grant.address // PAGE_SIZE, grant.extent // PAGE_SIZE) * PAGE_SIZE == grant.extent
    assert not any(read(arena, grant.address, size))
    check_heap(heap)


def test_a_block_of_no_bytes_is_a_block(heap: Heap) -> None:
    """alloc(0) gives an address of its own, as in Win32, and it must be freed."""
    one, other = heap.alloc(0, SESSION), heap.alloc(0, SESSION)
    assert one.address != other.address
    assert check_heap(heap).busy_blocks == 2
    heap.free(one.address, one.generation)


# -- every class -------------------------------------------------------------------------------------------------------
def fill_slab(heap: Heap, kind: SizeClass) -> list[Grant]:
    return [heap.alloc(kind.extent, SESSION) for _ in range(kind.block_count)]


def fill_up(heap: Heap, size: int) -> list[Grant]:
    """As many blocks as the heap gives."""
    grants = []
    with suppress(HeapFullError):
        while True:
            grants.append(heap.alloc(size, SESSION))
    return grants


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: str(kind.extent))
def test_blocks_of_a_class_never_overlap_each_other_or_their_head(heap: Heap, arena: Arena, kind: SizeClass) -> None:
    """A slab and one more, each written to its last byte: every byte is as written, every word untouched."""
    grants = [*fill_slab(heap, kind), heap.alloc(kind.extent, SESSION)]
    for number, grant in enumerate(grants):
        fill(arena, grant.address, kind.extent, number)
    for number, grant in enumerate(grants):
        assert read(arena, grant.address, kind.extent) == pattern(kind.extent, number)
    assert check_heap(heap).busy == len(grants) * kind.extent
    for grant in grants:
        heap.free(grant.address, grant.generation)
    assert check_heap(heap).busy_blocks == 0


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if not kind.is_run], ids=lambda kind: str(kind.extent))
def test_a_slab_is_committed_page_by_page_as_it_is_carved(heap: Heap, arena: Arena, kind: SizeClass) -> None:
    """The first block costs the page of the head and what the block touches; each later one only what it reaches."""
    heap.alloc(MAX_CLASS_SIZE, SESSION)
    before = arena.segment.allocated_bytes - arena.committed_in(0, arena.shape.first_page) * PAGE_SIZE
    for number in range(1, kind.block_count + 1):
        heap.alloc(kind.extent, SESSION)
        tables = arena.committed_in(0, arena.shape.first_page) * PAGE_SIZE
        touched = align_up(kind.first_offset + number * kind.extent, PAGE_SIZE)
        # a page of the initial commit may be there already
        assert arena.segment.allocated_bytes - tables - before in (touched, touched - PAGE_SIZE)
    assert heap.space.committed * PAGE_SIZE == arena.segment.allocated_bytes - tables


def test_a_new_heap_with_one_small_block_costs_one_page(heap: Heap, arena: Arena) -> None:
    """The page that a heap commits when it is made serves its first block."""
    before = arena.segment.allocated_bytes
    heap.alloc(64, SESSION)
    assert arena.segment.allocated_bytes == before
    assert heap.space.committed == 1


# -- which block -------------------------------------------------------------------------------------------------------
def test_the_block_freed_last_is_given_out_first(heap: Heap) -> None:
    """Its bytes are likeliest still in the cache; its generation tells it from the one before."""
    grants = [heap.alloc(64, SESSION) for _ in range(5)]
    for grant in (grants[1], grants[3]):
        heap.free(grant.address, grant.generation)
    again = [heap.alloc(64, SESSION) for _ in range(2)]
    assert [grant.address for grant in again] == [grants[3].address, grants[1].address]
    assert again[0].generation == grants[3].generation + 1


def test_free_blocks_are_used_before_new_ones_are_carved(heap: Heap) -> None:
    """No page is committed while a free block of the class is there."""
    grants = [heap.alloc(1000, SESSION) for _ in range(20)]
    committed = heap.space.committed
    for grant in grants[5:10]:
        heap.free(grant.address, grant.generation)
    for _ in range(5):
        heap.alloc(1000, SESSION)
    assert heap.space.committed == committed


def test_the_lowest_slab_with_room_is_used_first(heap: Heap) -> None:
    """So that higher slabs empty, and their pages come back."""
    kind = class_of(1024)
    slabs = [fill_slab(heap, kind) for _ in range(3)]
    for grants in reversed(slabs):
        heap.free(grants[4].address, grants[4].generation)
    assert heap.alloc(1024, SESSION).address == min(grants[4].address for grants in slabs)


def test_generations_of_a_slab_go_on_from_a_seed_of_its_own(heap: Heap) -> None:
    """A handle into a slab that is gone does not name a block of the slab that came in its place."""
    seen = set()
    for _ in range(50):
        grant = heap.alloc(64, SESSION)
        seen.add((grant.address, grant.generation))
        heap.free(grant.address, grant.generation)
    assert len(seen) == 50


def test_the_generation_of_a_run_skips_zero_when_it_comes_round(heap: Heap) -> None:
    """After the largest comes 1, so that a handle of zeros never names a block."""
    generations = []
    for _ in range(RUN_WORD.generation_mask + 10):
        grant = heap.alloc(4096, SESSION)
        generations.append(grant.generation)
        heap.free(grant.address, grant.generation)
    assert min(generations) == 1
    assert max(generations) == RUN_WORD.generation_mask
    assert all(one != other for one, other in itertools.pairwise(generations))


BETWEEN = [
    kind
    for kind, larger in itertools.pairwise(CLASSES)
    if kind.page_count >= 8 and not kind.is_run and not larger.is_run
]  # classes of long slabs whose next larger class has slabs, too


@pytest.mark.parametrize("kind", BETWEEN, ids=lambda kind: str(kind.extent))
def test_a_block_that_comes_from_the_next_larger_class_is_one_of_that_class(heap: Heap, kind: SizeClass) -> None:
    """A free one there is lent before a long slab is made for one block: extent, word and free are as any other's."""
    larger = CLASSES[kind.index + 1]
    anchor, hole = heap.alloc(larger.extent, SESSION), heap.alloc(larger.extent, SESSION)
    heap.free(hole.address, hole.generation)
    grant = heap.alloc(kind.extent, SESSION)
    assert grant.extent in (kind.extent, larger.extent)
    found = check_heap(heap)
    assert (found.busy, found.padding) == (larger.extent + kind.extent, grant.extent - kind.extent)
    again = heap.resize(grant.address, grant.generation, grant.extent, in_place_only=True)
    assert again.extent == grant.extent
    for gone in (grant, anchor):
        heap.free(gone.address, gone.generation)
    assert check_heap(heap).busy_blocks == 0


def test_a_full_slab_of_the_next_larger_class_is_not_asked(heap: Heap) -> None:
    """Its last free block is lent; the one after it comes from a slab of its own class."""
    kind = BETWEEN[0]
    larger = fill_slab(heap, CLASSES[kind.index + 1])
    heap.free(larger[2].address, larger[2].generation)
    grants = [heap.alloc(kind.extent, SESSION) for _ in range(4)]
    check_heap(heap)
    assert [grant.extent for grant in grants[1:]] == [kind.extent] * 3
    assert len({grant.address for grant in grants}) == 4


# -- fresh -------------------------------------------------------------------------------------------------------------
def test_fresh_is_never_said_of_a_byte_that_is_not_zero(heap: Heap, arena: Arena) -> None:
    """Runs of random sizes, each filled with ones and freed: what is called fresh reads as zeros."""
    random_ = random.Random(3)
    live: list[Grant] = []
    called_fresh = 0
    for _ in range(400):
        size = random_.choice([4096, 8192, 70_000, 300_000, 2 * MIB])
        grant = heap.alloc(size, SESSION)
        if grant.fresh:
            called_fresh += 1
            assert read(arena, grant.address, grant.extent) == bytes(grant.extent)
        arena.segment.buffer[grant.address : grant.address + grant.extent] = b"\xff" * grant.extent
        live.append(grant)
        while len(live) > 12:
            gone = live.pop(random_.randrange(len(live)))
            heap.free(gone.address, gone.generation)
    assert 0 < called_fresh < 400


def test_a_block_cut_from_a_slab_is_not_called_fresh(heap: Heap) -> None:
    """Its page may have been another block's: nobody wiped it."""
    assert not heap.alloc(64, SESSION).fresh


# -- too large, and full -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [256 * MIB + 1, MAX_BLOCK_SIZE + 1, 2**63, 2**64 - 1])
def test_more_than_the_arena_is_too_large_for_a_growable_heap(heap: Heap, size: int) -> None:
    """No waiting or freeing will help: the error differs from that of a full heap."""
    with pytest.raises(BlockTooLargeError, match="at most"):
        heap.alloc(size, SESSION)
    check_heap(heap)


def test_a_fixed_heap_refuses_more_than_its_maximum(make_heap: MakeHeap) -> None:
    """Its whole region is the limit of one block."""
    heap = make_heap(maximum=MIB)
    with pytest.raises(BlockTooLargeError) as refused:
        heap.alloc(MIB + 1, SESSION)
    assert refused.value.details["limit"] == MIB
    assert heap.alloc(MIB, SESSION).extent == MIB


def test_a_heap_with_a_largest_block_refuses_anything_larger(make_heap: MakeHeap) -> None:
    """max_block binds growable and fixed heaps alike, to the byte."""
    for maximum in (0, MIB):
        heap = make_heap(max_block=5000, maximum=maximum)
        heap.alloc(5000, SESSION)
        with pytest.raises(BlockTooLargeError):
            heap.alloc(5001, SESSION)


def test_a_full_fixed_heap_says_so_and_serves_again_after_a_free(make_heap: MakeHeap) -> None:
    """HeapFullError of the bound "heap" with the heap's figures; nothing has changed."""
    heap = make_heap(maximum=64 * KIB)
    grants = [heap.alloc(16 * KIB, SESSION) for _ in range(4)]
    with pytest.raises(HeapFullError, match="larger maximum") as refused:
        heap.alloc(16 * KIB, SESSION)
    error = refused.value
    assert (error.bound, error.requested, error.used, error.limit) == ("heap", 16 * KIB, 64 * KIB, 64 * KIB)
    check_heap(heap)
    heap.free(grants[2].address, grants[2].generation)
    assert heap.alloc(16 * KIB, SESSION).address == grants[2].address


@pytest.mark.parametrize("size", [16, 100, 1000, 3000, 5000, 7000, 20_000])
@pytest.mark.parametrize("maximum", [64 * KIB, 128 * KIB])
def test_a_small_fixed_heap_gives_blocks_of_every_size_up_to_its_maximum(
    make_heap: MakeHeap, maximum: int, size: int
) -> None:
    """Also where no slab of the class's length fits: no page stays spare that could hold another block."""
    heap = make_heap(maximum=maximum)
    kind = class_of(size)
    fill_up(heap, size)
    found = check_heap(heap)
    with_words = found.busy_blocks * (kind.extent + WORD)
    assert with_words > maximum * 9 // 10
    assert not kind.blocks_in(heap.space.spare.largest)


def test_pages_that_a_slab_does_not_use_yet_are_there_for_other_sizes(make_heap: MakeHeap) -> None:
    """One block of 1,000 bytes does not keep the pages of a whole slab from slabs of other classes and from runs."""
    heap = make_heap(maximum=64 * KIB)
    grants = [heap.alloc(size, SESSION) for size in (1000, 100, 5000, 3000, 8192, 16 * KIB)]
    slabs = sorted((slab.first_page, slab.page_count) for slab in heap.slabs.values())
    assert sum(count for _, count in slabs) <= 10
    check_heap(heap)
    again = [heap.alloc(size, SESSION) for size in (1000, 100, 3000)]
    check_heap(heap)
    for grant in (*grants, *again):
        heap.free(grant.address, grant.generation)
    assert check_heap(heap).busy_blocks == 0
    heap.alloc(64 * KIB, SESSION)


@pytest.mark.parametrize(("size", "other"), [(1000, 3000), (9000, 6000), (5000, 40 * KIB)])
def test_pages_of_freed_blocks_are_there_for_other_sizes(make_heap: MakeHeap, size: int, other: int) -> None:
    """Also where their slab has one left; it gives back what is behind that, and has blocks to give again."""
    heap = make_heap(maximum=128 * KIB)
    first, *rest = fill_up(heap, size)
    for grant in rest:
        heap.free(grant.address, grant.generation)
    check_heap(heap)
    assert len(fill_up(heap, other)) * other > 70 * KIB
    check_heap(heap)
    assert heap.resize(first.address, first.generation, size - 1, in_place_only=True).address == first.address


def test_where_no_page_is_left_a_block_of_a_larger_class_does(make_heap: MakeHeap) -> None:
    """One up to twice as large as what was asked for; a larger one is not wasted so."""
    heap = make_heap(maximum=64 * KIB)
    grants = fill_up(heap, 1000)
    for grant in (grants[3], grants[7]):
        heap.free(grant.address, grant.generation)
    for size in (200, 448):
        with pytest.raises(HeapFullError):
            heap.alloc(size, SESSION)
    assert [heap.alloc(size, SESSION).address for size in (520, 900)] == [grants[7].address, grants[3].address]
    check_heap(heap)


def test_a_block_that_no_address_space_is_left_for_is_refused(heap: Heap, arena: Arena) -> None:
    """The bound "reserve": 100 MiB fit twice into what the tables leave of 256 MiB, if the limit allowed it."""
    arena.budget.limit = GIB
    heap.alloc(120 * MIB, SESSION)
    with pytest.raises(HeapFullError) as refused:
        heap.alloc(150 * MIB, SESSION)
    assert refused.value.bound == "reserve"
    check_heap(heap)
    check_arena(arena, [heap])


def test_a_block_over_the_commit_limit_is_refused_and_others_are_served(heap: Heap, arena: Arena) -> None:
    """The bound "commit"; what the failed attempt had committed is given back."""
    heap.alloc(150 * MIB, SESSION)
    with pytest.raises(HeapFullError) as refused:
        heap.alloc(60 * MIB, SESSION)
    assert refused.value.bound == "commit"
    check_heap(heap)
    arena.settle_all()
    check_arena(arena, [heap])
    heap.alloc(40 * MIB, SESSION)
    check_arena(arena, [heap])


def test_a_free_block_is_found_although_a_lower_slab_cannot_be_carved_further(heap: Heap, arena: Arena) -> None:
    """At the commit limit: the first slab with room needs a page, but another has a block that is free now."""
    kind = class_of(1024)
    first, second = fill_slab(heap, kind), fill_slab(heap, kind)
    for grant in first[:]:
        heap.free(grant.address, grant.generation)
    low = [heap.alloc(1024, SESSION)]
    while heap.pool.at(low[0].address // PAGE_SIZE).free or (low[-1].address + 2 * 1024) % PAGE_SIZE > 1024:
        low.append(heap.alloc(1024, SESSION))
    heap.free(second[3].address, second[3].generation)
    arena.budget.limit = arena.budget.committed
    assert low[0].address < second[3].address
    for _ in range(4):
        try:
            grant = heap.alloc(1024, SESSION)
        except HeapFullError:
            pytest.fail(f"refused, and {check_heap(heap).free_blocks} blocks are free")
        if grant.address == second[3].address:
            return
