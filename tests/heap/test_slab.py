"""heapd.heap.slab by itself, and every size class's geometry: exhaustively."""

from __future__ import annotations

import random

import pytest

from heapd.heap.slab import Slab
from heapd.layout import FREE, SLAB_MAGIC, SLAB_WORD, slab_class_index
from heapd.sizeclass import CLASSES, MAX_CLASS_SIZE, SizeClass, class_index, class_of
from heapd.units import PAGE_SIZE

SLAB_CLASSES = [kind for kind in CLASSES if not kind.is_run]
every_slab_class = pytest.mark.parametrize("kind", SLAB_CLASSES, ids=lambda kind: str(kind.extent))


@every_slab_class
def test_head_and_blocks_fit_and_do_not_overlap(kind: SizeClass) -> None:
    """Descriptor and a word a block before the first block; the last block ends within the slab."""
    assert 8 + 8 * kind.block_count <= kind.first_offset <= PAGE_SIZE
    assert kind.first_offset + kind.block_count * kind.extent <= kind.page_count * PAGE_SIZE
    assert kind.first_offset % (64 if kind.extent >= 64 else 16) == 0
    assert kind.block_count >= 4


@every_slab_class
def test_no_slab_has_a_page_that_no_block_touches(kind: SizeClass) -> None:
    """The last page is there for the last block."""
    assert kind.first_offset + kind.block_count * kind.extent > (kind.page_count - 1) * PAGE_SIZE


def test_classes_grow_by_an_eighth_at_most_and_each_size_finds_the_smallest() -> None:
    """Every size up to the limit: it fits its class and not the one before; from 512 B up at most 1/8 is padding."""
    extents = [kind.extent for kind in CLASSES]
    assert extents == sorted(set(extents))
    for size in range(MAX_CLASS_SIZE + 1):
        kind = class_of(size)
        assert kind.index == class_index(size)
        assert kind.extent >= size
        assert kind.index == 0 or CLASSES[kind.index - 1].extent < max(size, 1)
        assert size < 512 or kind.extent - size <= size / 8 + 1


def make(kind: SizeClass) -> tuple[Slab, memoryview]:
    words = memoryview(bytearray((3 + kind.page_count) * PAGE_SIZE)).cast("Q")
    slab = Slab(kind, 3, kind.page_count)
    slab.write_head(words, 12345)
    return slab, words


@every_slab_class
def test_a_new_head_names_its_class_and_frees_every_block(kind: SizeClass) -> None:
    """The descriptor, then free words from the seed on; no byte of a block is written."""
    slab, words = make(kind)
    assert words[3 * PAGE_SIZE // 8] == SLAB_MAGIC << 32 | kind.index
    assert slab_class_index(words[slab.slot - 1]) == kind.index
    for word in words[slab.slot : slab.slot + kind.block_count]:
        assert (SLAB_WORD.state(word), SLAB_WORD.session(word), SLAB_WORD.generation(word)) == (FREE, 0, 12345)
    assert not any(words.cast("B")[slab.base : (3 + kind.page_count) * PAGE_SIZE])


@every_slab_class
def test_only_first_bytes_of_blocks_have_an_index(kind: SizeClass) -> None:
    """Every address of the slab and a little beyond."""
    slab, _ = make(kind)
    starts = {slab.base + number * kind.extent: number for number in range(kind.block_count)}
    end = (3 + kind.page_count) * PAGE_SIZE
    for address in range(3 * PAGE_SIZE - 64, end + 64):
        if address in starts or address % 16 == 0 or address % 977 == 0:
            assert slab.index_of(address) == starts.get(address)


def test_lending_and_taking_back_in_any_order_keeps_the_counts() -> None:
    """lent, free and carved add up; blocks are carved in order; the one taken back last is lent first."""
    random_ = random.Random(1)
    kind = class_of(500)
    slab, _ = make(kind)
    lent: list[int] = []
    last: list[int] = []
    for _ in range(2000):
        if lent and (slab.is_full or random_.random() < 0.5):
            index = lent.pop(random_.randrange(len(lent)))
            slab.take_back(index)
            last.append(index)
        else:
            carved = slab.carved
            index = slab.lend(7)
            assert index == (last.pop() if last else carved)
            lent.append(index)
        assert slab.lent_count == len(lent) == len(slab.lent) - slab.lent.count(0)
        assert len(slab.free) + len(slab.hollow) + slab.lent_count == slab.carved <= kind.block_count
        assert slab.is_full == (len(lent) == kind.block_count)
        assert slab.carved_end == slab.base + slab.carved * kind.extent
        assert slab.pages_touched * PAGE_SIZE >= slab.carved_end - 3 * PAGE_SIZE


def test_slabs_sort_by_place() -> None:
    """So that the lowest one with room is found first."""
    kind = class_of(64)
    assert sorted([Slab(kind, first, kind.page_count) for first in (9, 2, 5)], key=None)[0].first_page == 2
