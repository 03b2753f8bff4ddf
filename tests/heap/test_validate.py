"""Validate: each broken invariant is found, named, placed, and never an exception; a sound heap has none."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from heapd.arena import Arena
from heapd.heap import Heap, validate_block, validate_heap
from heapd.heap import validate as validate_module
from heapd.heap.validate import MAX_VIOLATIONS
from heapd.layout import KIND_RUN, MAPPED, PAGE_COMMITTED, RUN_WORD, SLAB_WORD, make_page_word
from heapd.records import Grant, Violation
from heapd.units import MIB, PAGE_SIZE
from tests.arenas import finish
from tests.invariants import check_heap, everyone

SESSION = 7
KNOWN = {SESSION, 8}


def validate(heap: Heap) -> list[Violation]:
    found: list[Violation] = finish(validate_heap(heap, KNOWN.__contains__))
    return found


@pytest.fixture
def blocks(heap: Heap) -> dict[str, Grant]:
    """A slab block, a run and a large run, each with a neighbour, and one freed slab block."""
    names = ("small", "other", "free", "run", "run2", "big")
    sizes = (64, 64, 64, 8192, 8192, 2 * MIB)
    grants = {name: heap.alloc(size, SESSION) for name, size in zip(names, sizes, strict=True)}
    heap.free(grants["free"].address, grants["free"].generation)
    assert validate(heap) == []
    return grants


def only(found: list[Violation], what: str, address: int) -> Violation:
    """The one violation there is, which must be of that kind and place."""
    assert [(violation.what, violation.address) for violation in found] == [(what, address)], found
    assert found[0].detail
    return found[0]


# -- state words -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["small", "run", "big"])
def test_a_lent_block_whose_word_says_free(heap: Heap, blocks: dict[str, Grant], name: str) -> None:
    """Somebody wiped it: the block is still out."""
    grant = blocks[name]
    heap.arena.words[grant.slot] = heap.arena.shape.word_format(grant.slot).free(grant.generation)
    only(validate(heap), "state-word", grant.address)


@pytest.mark.parametrize("name", ["small", "run", "big"])
def test_a_word_of_a_session_that_never_was(heap: Heap, blocks: dict[str, Grant], name: str) -> None:
    """The finding tells the number that was written, and names the session that the block was lent to."""
    grant = blocks[name]
    form = heap.arena.shape.word_format(grant.slot)
    heap.arena.words[grant.slot] = form.busy(4242, grant.generation, 10)
    found = only(validate(heap), "state-word", grant.address)
    assert found.session == SESSION
    assert "4242" in found.detail


@pytest.mark.parametrize("name", ["small", "run", "big"])
def test_a_size_beyond_the_block(heap: Heap, blocks: dict[str, Grant], name: str) -> None:
    """More than the extent was never granted."""
    grant = blocks[name]
    form = heap.arena.shape.word_format(grant.slot)
    heap.arena.words[grant.slot] = form.busy(SESSION, grant.generation, grant.extent + 1)
    assert only(validate(heap), "state-word", grant.address).session == SESSION


@pytest.mark.parametrize(
    "word", [SLAB_WORD.busy(SESSION, 3, 64), SLAB_WORD.cached(SESSION, 3), SLAB_WORD.busy(0, 3, 1)]
)
def test_a_free_block_whose_word_says_otherwise(heap: Heap, blocks: dict[str, Grant], word: int) -> None:
    """A stale write of a client that freed it, or a forgery."""
    heap.arena.words[blocks["free"].slot] = word
    only(validate(heap), "state-word", blocks["free"].address)


def test_every_known_owner_and_state_of_a_lent_block_is_sound(heap: Heap, blocks: dict[str, Grant]) -> None:
    """Busy or cached, by any session that is or was there, with any size that fits."""
    grant = blocks["small"]
    for session in KNOWN:
        for size in (0, 1, 64):
            heap.arena.words[grant.slot] = SLAB_WORD.busy(session, grant.generation, size)
            assert validate(heap) == []
        heap.arena.words[grant.slot] = SLAB_WORD.cached(session, grant.generation)
        assert validate(heap) == []


# -- heads and page map ------------------------------------------------------------------------------------------------
def test_a_slab_head_that_names_another_class(heap: Heap, blocks: dict[str, Grant]) -> None:
    """An overrun of the page before would do it."""
    start = blocks["small"].address // PAGE_SIZE * PAGE_SIZE
    heap.arena.words[start // 8] += 1
    only(validate(heap), "slab-head", start)


@pytest.mark.parametrize("name", ["small", "run"])
def test_a_page_word_that_says_something_else(heap: Heap, arena: Arena, blocks: dict[str, Grant], name: str) -> None:
    """State, kind, heap and start are each compared."""
    page = blocks[name].address // PAGE_SIZE
    slot = arena.shape.page_map // 8 + page
    right = arena.words[slot]
    for wrong in (0, right ^ 1 << 62, right ^ 1 << 56, right ^ 1 << 40, right ^ 1):
        arena.words[slot] = wrong
        only(validate(heap), "page-map", page * PAGE_SIZE)
    arena.words[slot] = right
    assert validate(heap) == []


def test_a_directory_entry_that_leads_to_an_uncommitted_page(heap: Heap, arena: Arena) -> None:
    """Found page by page, and the page of the map it names is not touched."""
    grant = heap.alloc(10 * MIB, SESSION)
    chunk = (grant.address // PAGE_SIZE >> 9) + 2
    arena.words[arena.shape.directory // 8 + chunk] = MAPPED
    before = arena.segment.allocated_bytes
    found = validate(heap)
    assert {violation.what for violation in found} == {"page-map"}
    assert min(violation.address for violation in found) == chunk * 512 * PAGE_SIZE
    assert arena.segment.allocated_bytes == before


def test_a_mapped_chunk_whose_directory_entry_was_overwritten(
    heap: Heap, arena: Arena, blocks: dict[str, Grant]
) -> None:
    """Readers would believe the entry; the daemon says so, and goes on."""
    chunk = blocks["small"].address // PAGE_SIZE >> 9
    arena.words[arena.shape.directory // 8 + chunk] = make_page_word(PAGE_COMMITTED, KIND_RUN, 3, 5)
    assert {violation.what for violation in validate(heap)} == {"page-map"}
    heap.alloc(100_000, SESSION)
    heap.free(blocks["run"].address, blocks["run"].generation)


# -- the daemon's own records ------------------------------------------------------------------------------------------
def forget_a_run(heap: Heap, grant: Grant) -> None:
    del heap.runs[grant.address // PAGE_SIZE]


def lengthen_a_run(heap: Heap, grant: Grant) -> None:
    heap.runs[grant.address // PAGE_SIZE] += 10_000


def lend_without_counting(heap: Heap, grant: Grant) -> None:
    slab = heap.pool.at(heap.space.in_order()[0].first)
    assert slab is not None
    slab.lent_count += 1


def file_wrong(heap: Heap, grant: Grant) -> None:
    for slabs in heap.pool.partial:
        slabs.clear()


def lose_spare_pages(heap: Heap, grant: Grant) -> None:
    heap.space.spare.take(1)


def miscount_spare_pages(heap: Heap, grant: Grant) -> None:
    heap.space.spare.total += 1


def decommit_a_slab_s_page(heap: Heap, grant: Grant) -> None:
    page = grant.address // PAGE_SIZE
    assert heap.pool.at(page)
    heap.arena.decommit(page, 1, heap.index)


def test_blocks_on_a_page_that_is_not_committed_are_found(heap: Heap) -> None:
    """Whoever touched them would bring the page back unasked."""
    grants = [heap.alloc(900, SESSION) for _ in range(8)]
    decommit_a_slab_s_page(heap, grants[-1])
    assert {violation.what for violation in validate(heap)} >= {"commit", "page-map"}


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (forget_a_run, "tiling"),
        (lengthen_a_run, "tiling"),
        (lend_without_counting, "slab-lists"),
        (file_wrong, "slab-lists"),
        (lose_spare_pages, "tiling"),
        (miscount_spare_pages, "extents"),
    ],
)
def test_a_fault_in_the_daemon_s_own_records_is_found(
    heap: Heap, blocks: dict[str, Grant], harm: Callable[[Heap, Grant], None], what: str
) -> None:
    """The same equations hold for what no client can write: a bug of ours shows."""
    harm(heap, blocks["run"])
    assert what in {violation.what for violation in validate(heap)}


# -- as an operation ---------------------------------------------------------------------------------------------------
def test_a_heap_broken_everywhere_is_not_described_without_end(heap: Heap) -> None:
    """At most 1,000 findings."""
    grants = [heap.alloc(16, SESSION) for _ in range(3000)]
    for grant in grants:
        heap.arena.words[grant.slot] = 0
    assert len(validate(heap)) == MAX_VIOLATIONS


def test_validation_pauses_and_survives_what_happens_meanwhile(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, slabs and regions come and go between two slices: none of it is a violation."""
    monkeypatch.setattr(validate_module, "_BLOCKS_A_SLICE", 30)
    random_ = random.Random(9)
    live = [heap.alloc(size, SESSION) for size in (16, 300, 1100, 5000, 8192, 70_000, 2 * MIB) * 20]
    pauses = 0

    def change() -> None:
        nonlocal pauses
        pauses += 1
        for _ in range(4):
            grant = live.pop(random_.randrange(len(live)))
            heap.free(grant.address, grant.generation)
            live.append(heap.alloc(random_.choice([16, 300, 5000, 8192, 70_000, 2 * MIB]), SESSION))

    assert finish(validate_heap(heap, everyone), change) == []
    assert pauses > 5


def test_validation_of_a_heap_that_is_closed_meanwhile_ends(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to be wrong."""
    monkeypatch.setattr(validate_module, "_BLOCKS_A_SLICE", 30)
    for size in (16, 300, 8192, 2 * MIB) * 20:
        heap.alloc(size, SESSION)
    job = validate_heap(heap, everyone)
    next(job)
    heap.close()
    assert finish(job) == []


# -- one block ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["small", "run", "big"])
def test_a_sound_block_has_no_violation(heap: Heap, blocks: dict[str, Grant], name: str) -> None:
    """By its first byte's address."""
    assert validate_block(heap, blocks[name].address, everyone) == []


@pytest.mark.parametrize("name", ["small", "run", "big"])
def test_a_scribbled_block_is_found_alone(heap: Heap, blocks: dict[str, Grant], name: str) -> None:
    """And its neighbour is not blamed."""
    heap.arena.words[blocks[name].slot] = 0
    only(validate_block(heap, blocks[name].address, everyone), "state-word", blocks[name].address)
    neighbour = blocks["other" if name == "small" else "run2"]
    assert validate_block(heap, neighbour.address, everyone) == []


@pytest.mark.parametrize("name", ["small", "run", "big"])
@pytest.mark.parametrize("offset", [1, 16, 4096, 2**50])
def test_no_block_there_is_a_violation(heap: Heap, blocks: dict[str, Grant], name: str, offset: int) -> None:
    """Interior and foreign addresses, as HeapValidate answers FALSE for them."""
    only(validate_block(heap, blocks[name].address + offset, everyone), "not-a-block", blocks[name].address + offset)


def test_a_free_or_cached_block_is_a_violation(heap: Heap, blocks: dict[str, Grant]) -> None:
    """Nobody has allocated it."""
    only(validate_block(heap, blocks["free"].address, everyone), "free-block", blocks["free"].address)
    [leased] = heap.lease(64, 1, SESSION)
    only(validate_block(heap, leased.address, everyone), "free-block", leased.address)
    [leased] = heap.lease(8192, 1, SESSION)
    only(validate_block(heap, leased.address, everyone), "free-block", leased.address)
    check_heap(heap)


def test_the_word_format_is_that_of_the_block_s_kind() -> None:
    """A run's word and a slab block's divide differently: 64 GiB against 64 KiB."""
    assert RUN_WORD.size(RUN_WORD.busy(1, 1, 2**36 - 2)) == 2**36 - 2
    assert SLAB_WORD.size(SLAB_WORD.busy(1, 1, 2**17 - 2)) == 2**17 - 2
    assert RUN_WORD.size(RUN_WORD.busy(1, 1, 0)) == SLAB_WORD.size(SLAB_WORD.busy(1, 1, 0)) == 0
