"""Heap.free: one misuse a test, each with its own error, and nothing has changed; and what a free gives back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from heapd.arena import Arena
from heapd.errors import DoubleFreeError, HeapdError, NotABlockError, StaleHandleError
from heapd.heap import Heap
from heapd.layout import FREE, SLAB_WORD
from heapd.records import Grant
from heapd.units import KIB, MIB, PAGE_SIZE
from tests.arenas import Commits
from tests.heap.conftest import MakeHeap
from tests.invariants import check_arena, check_heap, heap_picture

SESSION = 7
SMALL, RUN, BIG = 64, 8 * KIB, 2 * MIB


@pytest.fixture(params=[SMALL, RUN, BIG], ids=["slab", "run", "big"])
def size(request: pytest.FixtureRequest) -> int:
    """A block of each kind."""
    value: int = request.param
    return value


@pytest.fixture
def pair(heap: Heap, size: int) -> tuple[Grant, Grant]:
    """Two blocks of the size, so that the slab of one outlives the other."""
    return heap.alloc(size, SESSION), heap.alloc(size, SESSION)


def check_refused(
    heap: Heap, error: type[HeapdError] | tuple[type[HeapdError], ...], call: Callable[[], object]
) -> None:
    """The call raises that error, and the heap is as it was."""
    before = heap_picture(heap)
    with pytest.raises(error):
        call()
    assert heap_picture(heap) == before
    check_heap(heap)


# -- one misuse a test -------------------------------------------------------------------------------------------------
def test_double_free_of_a_slab_block(heap: Heap) -> None:
    """The slab lives on and knows."""
    block, _ = heap.alloc(SMALL, SESSION), heap.alloc(SMALL, SESSION)
    heap.free(block.address, block.generation)
    check_refused(heap, DoubleFreeError, lambda: heap.free(block.address, block.generation))


def test_double_free_of_a_run(heap: Heap) -> None:
    """Its pages are spare since, and its word remembers."""
    block, _ = heap.alloc(RUN, SESSION), heap.alloc(RUN, SESSION)
    heap.free(block.address, block.generation)
    check_refused(heap, DoubleFreeError, lambda: heap.free(block.address, block.generation))


def test_double_free_of_the_last_block_of_a_slab(heap: Heap) -> None:
    """The slab is gone with it: that a block was there nobody knows any more, but that none is there is certain."""
    block = heap.alloc(SMALL, SESSION)
    heap.free(block.address, block.generation)
    check_refused(heap, (DoubleFreeError, NotABlockError), lambda: heap.free(block.address, block.generation))


def test_double_free_of_a_big_run(heap: Heap) -> None:
    """Its region is released: the same."""
    block = heap.alloc(BIG, SESSION)
    heap.free(block.address, block.generation)
    check_refused(heap, (DoubleFreeError, NotABlockError), lambda: heap.free(block.address, block.generation))


def test_double_free_after_a_neighbour_was_freed_too(heap: Heap) -> None:
    """Spare pages coalesced over the place; the block's address is now inside an extent."""
    one, two, _ = (heap.alloc(RUN, SESSION) for _ in range(3))
    heap.free(one.address, one.generation)
    heap.free(two.address, two.generation)
    check_refused(heap, DoubleFreeError, lambda: heap.free(two.address, two.generation))


def test_a_stale_generation(heap: Heap, pair: tuple[Grant, Grant], size: int) -> None:
    """The block was freed and given out again: the old handle does not free the new one."""
    old = pair[0]
    heap.free(old.address, old.generation)
    new = heap.alloc(size, SESSION)
    assert (new.address, new.slot) == (old.address, old.slot)
    check_refused(heap, StaleHandleError, lambda: heap.free(old.address, old.generation))
    heap.free(new.address, new.generation)


def test_a_generation_that_never_was(heap: Heap, pair: tuple[Grant, Grant]) -> None:
    """Zero, one too many, and far beyond what a word can hold."""
    block = pair[0]
    for generation in (0, block.generation + 1, 2**62):
        check_refused(heap, StaleHandleError, lambda generation=generation: heap.free(block.address, generation))


@pytest.mark.parametrize("offset", [1, 8, 16, 63])
def test_an_interior_address(heap: Heap, pair: tuple[Grant, Grant], offset: int) -> None:
    """Only a block's first byte names it."""
    block = pair[0]
    check_refused(heap, NotABlockError, lambda: heap.free(block.address + offset, block.generation))


def test_the_address_of_a_later_page_of_a_run(heap: Heap) -> None:
    """Page-aligned, inside a run, and no block's beginning."""
    for block in (heap.alloc(RUN, SESSION), heap.alloc(BIG, SESSION)):
        check_refused(heap, NotABlockError, lambda block=block: heap.free(block.address + PAGE_SIZE, block.generation))


def test_the_head_of_a_slab(heap: Heap) -> None:
    """State words and descriptor lie there; no block does."""
    block = heap.alloc(SMALL, SESSION)
    start = block.address // PAGE_SIZE * PAGE_SIZE
    for address in (start, start + 8, start + 64):
        check_refused(heap, NotABlockError, lambda address=address: heap.free(address, block.generation))


def test_a_block_that_was_not_carved_yet(heap: Heap) -> None:
    """The place of the slab's next block: nobody was ever given it."""
    block = heap.alloc(SMALL, SESSION)
    check_refused(heap, NotABlockError, lambda: heap.free(block.address + SMALL, block.generation))


def test_spare_pages(heap: Heap) -> None:
    """Reserved for the heap, but no block."""
    block = heap.alloc(SMALL, SESSION)
    region = heap.space.in_order()[0]
    last = (region.end - 1) * PAGE_SIZE
    for address in (last, last + 32):
        check_refused(heap, NotABlockError, lambda address=address: heap.free(address, block.generation))


@pytest.mark.parametrize("address", [0, 8, 4096, 2**20, 2**40, 2**63 - 1, 2**64 - 1, 2**70])
def test_an_address_outside_every_heap(heap: Heap, address: int) -> None:
    """Tables, the arena's end, and far beyond."""
    heap.alloc(SMALL, SESSION)
    check_refused(heap, NotABlockError, lambda: heap.free(address, 1))


def test_a_block_of_another_heap(make_heap: MakeHeap, size: int) -> None:
    """Each heap knows its own; the other's block is untouched."""
    mine, other = make_heap(), make_heap()
    mine.alloc(size, SESSION)
    block = other.alloc(size, SESSION)
    check_refused(mine, NotABlockError, lambda: mine.free(block.address, block.generation))
    check_heap(other)
    other.free(block.address, block.generation)


def test_the_address_of_a_run_that_a_slab_took_the_place_of(heap: Heap) -> None:
    """The page begins a slab now: its head is no block."""
    block = heap.alloc(4096, SESSION)
    heap.free(block.address, block.generation)
    small = heap.alloc(SMALL, SESSION)
    assert small.address // PAGE_SIZE == block.address // PAGE_SIZE
    check_refused(heap, NotABlockError, lambda: heap.free(block.address, block.generation))


def test_checking_a_free_refuses_the_same_and_frees_nothing(heap: Heap, pair: tuple[Grant, Grant]) -> None:
    """What free_many asks of each block before it frees the first."""
    block = pair[0]
    heap.check_free(block.address, block.generation)
    check_refused(heap, StaleHandleError, lambda: heap.check_free(block.address, block.generation + 1))
    check_refused(heap, NotABlockError, lambda: heap.check_free(block.address + 4, block.generation))
    heap.free(block.address, block.generation)


# -- what a free gives back --------------------------------------------------------------------------------------------
def test_a_freed_block_s_word_is_free_and_keeps_its_generation(heap: Heap, pair: tuple[Grant, Grant]) -> None:
    """FREE, no session, no size; the next block there has the next generation."""
    block, form = pair[0], heap.arena.shape.word_format(pair[0].slot)
    heap.free(block.address, block.generation)
    word = heap.arena.words[block.slot]
    assert (form.state(word), form.session(word), form.size(word)) == (FREE, 0, 0)
    assert form.generation(word) == block.generation


def test_an_empty_slab_gives_its_pages_back(heap: Heap) -> None:
    """Another class can have them at once; its head no longer says that it is a slab."""
    grants = [heap.alloc(SMALL, SESSION) for _ in range(10)]
    for grant in grants:
        heap.free(grant.address, grant.generation)
    assert check_heap(heap).slabs == 0
    assert heap.arena.words[grants[0].slot - 1] == 0
    assert heap.pool.at(grants[0].address // PAGE_SIZE) is None


def test_freeing_everything_in_any_order_leaves_the_heap_as_it_was_made(heap: Heap, arena: Arena) -> None:
    """For who looks: its first region, with no more than its initial commit; every other region released."""
    before = heap.space.committed, heap.space.reserved
    grants = [heap.alloc(17 * number * number % 200_000, SESSION) for number in range(300)]
    for grant in [*grants[::3], *grants[1::3], *reversed(grants[2::3])]:
        heap.free(grant.address, grant.generation)
    heap.tidy()
    assert heap.space.committed <= before[0]
    assert heap.space.reserved == before[1]
    check_heap(heap)
    arena.settle_all()
    check_arena(arena, [heap])


def test_a_freed_big_block_is_gone_from_the_system_at_once(heap: Heap, arena: Arena) -> None:
    """Up to 16 MiB; larger ones in slices, by settle."""
    before = arena.budget.committed
    block = heap.alloc(16 * MIB, SESSION)
    arena.segment.buffer[block.address : block.address + block.extent] = b"x" * block.extent
    heap.free(block.address, block.generation)
    assert arena.segment.allocated_bytes - before <= 64 * KIB  # pages of the page map
    assert heap.owns(block.address) is False


def test_giving_back_needs_no_memory(heap: Heap, arena: Arena) -> None:
    """With the limit reached to the byte every block can be freed, in any order."""
    grants = [heap.alloc(size, SESSION) for size in (10, 5000, 70_000, 3 * MIB, 40, 2 * MIB, 300_000) * 4]
    arena.budget.limit = arena.budget.committed
    for grant in grants[::2] + grants[1::2]:
        heap.free(grant.address, grant.generation)
        check_heap(heap)
    assert check_heap(heap).busy_blocks == 0


def test_freeing_with_every_commit_failing_works(heap: Heap, commits: Commits) -> None:
    """Nor does a free, or the release of a slab or region, ask the system for anything."""
    grants = [heap.alloc(size, SESSION) for size in (10, 5000, 70_000, 3 * MIB, 40, 2 * MIB, 300_000) * 4]
    commits.fail(1, persistent=True)
    for grant in grants[1::2] + grants[::2]:
        heap.free(grant.address, grant.generation)
    assert commits.calls == 0
    assert SLAB_WORD.state(heap.arena.words[grants[0].slot]) == FREE
