"""heapd.arena.pagemap by itself: against a plain list of words, over plain memory, page by page."""

from __future__ import annotations

import random

import pytest

from heapd.arena.pagemap import PageMap
from heapd.errors import HeapFullError
from heapd.layout import (
    CHUNK_PAGES,
    KIND_RUN,
    KIND_SLAB,
    KIND_TABLE,
    MAPPED,
    PAGE_COMMITTED,
    PAGE_RESERVED,
    ArenaShape,
    make_page_word,
    page_word,
    split_page_word,
)
from heapd.units import MIB, PAGE_SIZE

SHAPE = ArenaShape(40 * MIB // PAGE_SIZE)
FIRST, END = SHAPE.first_page, SHAPE.page_count


class Memory:
    """Plain bytes in place of an arena; knows which pages of the tables were committed, and may refuse to commit."""

    def __init__(self) -> None:
        self.bytes = bytearray(SHAPE.first_page * PAGE_SIZE)
        self.words = memoryview(self.bytes).cast("Q")
        self.committed: set[int] = set()
        self.is_full = False

    def commit(self, address: int, size: int) -> None:
        if self.is_full:
            raise HeapFullError("full")
        self.committed.update(range(address // PAGE_SIZE, (address + size + PAGE_SIZE - 1) // PAGE_SIZE))

    def check_only_committed_was_written(self) -> None:
        for page in range(SHAPE.directory // PAGE_SIZE, SHAPE.first_page):
            if page not in self.committed:
                assert not any(self.bytes[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]), f"page {page} was written"


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def pages(memory: Memory) -> PageMap:
    """A page map that is ready for use."""
    pages = PageMap(memory.words, SHAPE, memory.commit)
    pages.prepare()
    return pages


def word_of(number: int) -> int:
    return make_page_word(PAGE_COMMITTED, KIND_SLAB, number & 0xFFFF, number)


def test_a_fresh_map_says_table_below_and_free_above(pages: PageMap, memory: Memory) -> None:
    """The tables' own pages are known as such, everything else is free, and only the directory is committed."""
    assert {split_page_word(pages.word(page)).kind for page in range(FIRST)} == {KIND_TABLE}
    assert {pages.word(page) for page in range(FIRST, END)} == {0}
    assert memory.committed == {SHAPE.directory // PAGE_SIZE}


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_ranges_reads_back_page_by_page(pages: PageMap, memory: Memory, seed: int) -> None:
    """Ranges of any length and place, chunk boundaries preferred: each page has the word it was given last."""
    random_ = random.Random(seed)
    expected = [0] * END
    for number in range(1, 200):
        first = random_.randrange(FIRST, END)
        if random_.random() < 0.3:
            first = first // CHUNK_PAGES * CHUNK_PAGES
        count = min(random_.choice([1, 16, random_.randrange(1, 100), CHUNK_PAGES, 3 * CHUNK_PAGES]), END - first)
        pages.map_edges(first, count)
        pages.set(first, count, word_of(number))
        expected[first : first + count] = [word_of(number)] * count
        probe = random_.randrange(FIRST, END)
        assert pages.word(probe) == expected[probe]
    assert [pages.word(page) for page in range(FIRST, END)] == expected[FIRST:]
    memory.check_only_committed_was_written()


def test_a_uniform_chunk_has_no_map_behind_it(pages: PageMap, memory: Memory) -> None:
    """A terabyte that is all alike costs a directory word a 2 MiB, not a page."""
    before = len(memory.committed)
    pages.set(FIRST, 4 * CHUNK_PAGES, word_of(1))
    assert len(memory.committed) == before
    assert not pages.is_mapped(FIRST // CHUNK_PAGES)
    assert pages.word(FIRST + 3 * CHUNK_PAGES) == word_of(1)


def test_a_chunk_whose_pages_differ_is_mapped_and_keeps_its_words(pages: PageMap, memory: Memory) -> None:
    """Splitting a uniform chunk changes no page but those it is split for; its map and run words cost two pages."""
    pages.set(FIRST, CHUNK_PAGES, word_of(1))
    before = len(memory.committed)
    pages.map_range(FIRST + 5, 1)
    assert len(memory.committed) == before + 2
    pages.set(FIRST + 5, 1, word_of(2))
    words = [pages.word(page) for page in range(FIRST, FIRST + CHUNK_PAGES)]
    assert words == [word_of(1)] * 5 + [word_of(2)] + [word_of(1)] * (CHUNK_PAGES - 6)


def test_a_mapped_chunk_stays_mapped(pages: PageMap, memory: Memory) -> None:
    """Readers may be looking there: it never goes back to one word, and is not committed twice."""
    pages.map_range(FIRST, CHUNK_PAGES)
    before = set(memory.committed)
    pages.set(FIRST, CHUNK_PAGES, word_of(3))
    pages.map_edges(FIRST, CHUNK_PAGES)
    assert pages.is_mapped(FIRST // CHUNK_PAGES)
    assert memory.committed == before


@pytest.mark.parametrize(
    ("first", "count", "mapped"),
    [(0, CHUNK_PAGES, {0}), (0, 1, {0}), (0, CHUNK_PAGES + 1, {0, 1}), (5, 3 * CHUNK_PAGES, {0, 3}), (0, 1024, {0})],
)
def test_the_edges_of_a_range_are_what_is_mapped(pages: PageMap, first: int, count: int, mapped: set[int]) -> None:
    """The chunk it begins in, for the run's state word, and one that it covers in part."""
    pages.map_edges(FIRST + first, count)
    assert {chunk for chunk in range(8) if pages.is_mapped(FIRST // CHUNK_PAGES + chunk)} == mapped


def test_a_map_that_cannot_grow_changes_nothing(pages: PageMap, memory: Memory) -> None:
    """HeapFullError, and every page reads as before; once there is memory the same call succeeds."""
    pages.set(FIRST, 2 * CHUNK_PAGES, word_of(1))
    memory.is_full = True
    with pytest.raises(HeapFullError):
        pages.map_range(FIRST + 3, CHUNK_PAGES)
    assert {pages.word(page) for page in range(FIRST, FIRST + 2 * CHUNK_PAGES)} == {word_of(1)}
    memory.is_full = False
    pages.map_range(FIRST + 3, CHUNK_PAGES)
    memory.check_only_committed_was_written()


def test_setting_needs_no_memory_once_the_edges_are_mapped(pages: PageMap, memory: Memory) -> None:
    """So giving pages back never fails for lack of memory."""
    pages.map_edges(FIRST + 7, 2 * CHUNK_PAGES)
    memory.is_full = True
    pages.set(FIRST + 7, 2 * CHUNK_PAGES, make_page_word(PAGE_RESERVED, KIND_RUN, 1, FIRST + 7))
    pages.set(FIRST + 7, 2 * CHUNK_PAGES, 0)
    assert pages.word(FIRST + CHUNK_PAGES) == 0


def test_the_entry_that_says_mapped_comes_after_the_words_it_leads_to(pages: PageMap, memory: Memory) -> None:
    """A reader that sees MAPPED finds a committed page with every word in it."""
    pages.set(FIRST, CHUNK_PAGES, word_of(9))
    entry = SHAPE.directory // 8 + FIRST // CHUNK_PAGES
    seen: list[int] = []
    plain = memory.commit

    def commit(address: int, size: int) -> None:
        seen.append(memory.words[entry])
        plain(address, size)

    pages._commit_table = commit
    pages.map_range(FIRST, 1)
    assert seen == [word_of(9)] * 2
    assert memory.words[entry] == MAPPED
    assert page_word(memory.words, SHAPE, FIRST) == word_of(9)


def test_a_scribbled_directory_leads_to_no_uncommitted_page(pages: PageMap, memory: Memory) -> None:
    """A client may write MAPPED over a uniform chunk, or a word over a mapped one: the truth is kept in private."""
    uniform, mapped = FIRST // CHUNK_PAGES, FIRST // CHUNK_PAGES + 1
    pages.map_range(mapped * CHUNK_PAGES, 1)
    memory.words[SHAPE.directory // 8 + uniform] = MAPPED
    memory.words[SHAPE.directory // 8 + mapped] = word_of(1)
    assert not pages.is_mapped(uniform)
    assert pages.is_mapped(mapped)
    assert pages.word(FIRST) == MAPPED
    pages.set(mapped * CHUNK_PAGES + 3, 5, word_of(2))
    memory.check_only_committed_was_written()
