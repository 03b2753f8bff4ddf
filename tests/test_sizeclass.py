"""heapd.sizeclass by itself: every size, every class."""

from __future__ import annotations

from itertools import pairwise

import pytest

from heapd.sizeclass import CLASS_COUNT, CLASSES, MAX_CLASS_SIZE, SizeClass, class_index, class_of
from heapd.units import PAGE_SIZE

EVERY_SIZE = range(MAX_CLASS_SIZE + 1)
WORD = 8

every_class = pytest.mark.parametrize("entry", CLASSES, ids=lambda entry: str(entry.extent))
every_slab = pytest.mark.parametrize(
    "entry", [entry for entry in CLASSES if not entry.is_run], ids=lambda entry: str(entry.extent)
)


def test_every_size_gets_the_smallest_class_that_holds_it() -> None:
    """The class fits, and the one before it would not."""
    for size in EVERY_SIZE:
        entry = class_of(size)
        assert entry.extent >= size
        assert entry.index == 0 or CLASSES[entry.index - 1].extent < size


def test_class_of_and_class_index_agree() -> None:
    """Both ways to ask give the same class, for every size."""
    assert all(class_of(size) is CLASSES[class_index(size)] for size in EVERY_SIZE)


def test_a_larger_size_never_gets_a_smaller_class() -> None:
    """Classes rise with the size, one at a time, and each one is used."""
    indexes = [class_index(size) for size in EVERY_SIZE]
    assert sorted(set(indexes)) == list(range(CLASS_COUNT))
    assert all(after - before in (0, 1) for before, after in pairwise(indexes))


def test_a_size_past_the_last_class_is_not_found() -> None:
    """The table ends where it says: the caller has to serve larger requests otherwise."""
    with pytest.raises(IndexError):
        class_of(MAX_CLASS_SIZE + 1)


def test_rounding_up_costs_at_most_the_step() -> None:
    """What a block has beyond the request is under 16 B up to 48 B, under 64 B up to 512 B, then under 1/8."""
    for size in EVERY_SIZE[1:]:
        rest = class_of(size).extent - size
        if size <= 48:
            assert rest < 16
        elif size <= 512:
            assert rest < 64
        else:
            assert rest * 8 < size


def test_a_request_of_whole_pages_is_served_as_a_run() -> None:
    """A request that is a multiple of 4 KiB starts on a page, when it is small enough for a class at all."""
    for size in range(PAGE_SIZE, MAX_CLASS_SIZE + 1, PAGE_SIZE):
        assert class_of(size).extent == size
        assert class_of(size).is_run


@every_class
def test_classes_are_numbered_in_order(entry: SizeClass) -> None:
    """index is the place in CLASSES, and extents rise."""
    assert CLASSES[entry.index] is entry
    assert entry.index == 0 or CLASSES[entry.index - 1].extent < entry.extent


@every_class
def test_extents_keep_the_alignment(entry: SizeClass) -> None:
    """Extents are multiples of 16, from 64 B up of 64; those of whole pages, and only those, are runs."""
    assert entry.extent % (64 if entry.extent >= 64 else 16) == 0
    assert entry.is_run == (entry.extent % PAGE_SIZE == 0)
    if entry.is_run:
        assert (entry.page_count * PAGE_SIZE, entry.block_count, entry.first_offset) == (entry.extent, 1, 0)


@every_slab
def test_every_block_of_a_slab_is_aligned(entry: SizeClass) -> None:
    """16 bytes below 64 B, 64 bytes from there on, for each block of the slab."""
    alignment = 64 if entry.extent >= 64 else 16
    starts = [entry.first_offset + number * entry.extent for number in range(entry.block_count)]
    assert all(start % alignment == 0 for start in starts)


@every_slab
def test_the_blocks_of_a_slab_lie_between_its_head_and_its_end(entry: SizeClass) -> None:
    """The descriptor and the state words end before the first block, the last block before the slab."""
    assert entry.block_count >= 4
    assert WORD + entry.block_count * WORD <= entry.first_offset
    end = entry.first_offset + entry.block_count * entry.extent
    assert (entry.page_count - 1) * PAGE_SIZE < end <= entry.page_count * PAGE_SIZE


@every_slab
def test_a_slab_used_once_touches_few_pages(entry: SizeClass) -> None:
    """The head and the first block, or the first KiB of a larger one, lie in the slab's first page."""
    assert entry.first_offset + min(entry.extent, 1024) <= PAGE_SIZE


@every_slab
def test_a_full_slab_wastes_little(entry: SizeClass) -> None:
    """Head and rest of a full slab are at most 4 % of it, the words' own share (8 B a block) apart."""
    pages = entry.page_count * PAGE_SIZE
    lost = pages - entry.block_count * (entry.extent + WORD)
    assert lost / pages <= 0.04
