"""The page map: what each page is, for any process to read. The only writer of page words.

Two levels, so that reserving address space costs nothing: a directory entry a chunk of 512 pages either is the word
of all its pages, or says MAPPED: then the chunk's page of the map and its page of run words are committed and hold
them. A chunk is mapped the first time its pages differ, or a run begins in it, and stays so.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from itertools import groupby

from heapd.layout import (
    CHUNK_PAGES,
    CHUNK_SHIFT,
    KIND_TABLE,
    MAPPED,
    PAGE_RESERVED,
    WORD,
    ArenaShape,
    make_page_word,
    page_word,
)
from heapd.units import PAGE_SIZE

__all__ = ["PageMap"]


def _fill(word: int, count: int) -> memoryview:
    return memoryview(array("Q", [word]) * count)


class PageMap:
    """Writes page words; commits the map's own pages through `commit_table(address, size)` before it touches them.

    Which chunks are mapped, and the word of each that is not, is kept in private, too: a directory that a client
    scribbled on must not lead the daemon to a page of the map that is not committed, nor spread over it.
    """

    def __init__(self, words: memoryview, shape: ArenaShape, commit_table: Callable[[int, int], None]) -> None:
        self._words = words
        self._shape = shape
        self._commit_table = commit_table
        self._directory = shape.directory // WORD
        self._map = shape.page_map // WORD
        self._mapped = bytearray(shape.chunk_count)
        self._entries = array("Q", bytes(shape.chunk_count * WORD))

    def prepare(self) -> None:
        """Commit the directory and say that the tables' own pages are tables."""
        self._commit_table(self._shape.directory, self._shape.chunk_count * WORD)
        self._describe_tables()

    def restore(self, mapped: bytearray) -> None:
        """Take over the map of an earlier process. Args: mapped (1 for each chunk that is; kept)."""
        self._mapped = mapped
        for chunk in self.mapped_chunks():
            self._words[self._directory + chunk] = MAPPED
        self._describe_tables()

    def _describe_tables(self) -> None:
        self.set(0, self._shape.first_page, make_page_word(PAGE_RESERVED, KIND_TABLE, 0, 0))

    def word(self, page: int) -> int:
        """What a reader finds for the page; a directory entry that leads nowhere is returned as it is."""
        entry: int = self._words[self._directory + (page >> CHUNK_SHIFT)]
        return page_word(self._words, self._shape, page) if self._mapped[page >> CHUNK_SHIFT] else entry

    def is_mapped(self, chunk: int) -> bool:
        return self._mapped[chunk] == 1

    def mapped_chunks(self) -> Iterator[int]:
        chunk = self._mapped.find(1)
        while chunk >= 0:
            yield chunk
            chunk = self._mapped.find(1, chunk + 1)

    def map_range(self, first: int, count: int) -> None:
        """Make sure that every page of the range has a word and a run word of its own.

        Raises: HeapFullError if the map cannot be committed; chunks mapped until then stay so, which harms nothing.
        """
        for chunk in range(first >> CHUNK_SHIFT, (first + count - 1 >> CHUNK_SHIFT) + 1):
            if not self.is_mapped(chunk):
                self._map_chunk(chunk)

    def map_edges(self, first: int, count: int) -> None:
        """Map the chunks that a range covers in part, and the one it begins in: all that `set` may need to write.

        Raises: HeapFullError as map_range does.
        """
        self.map_range(first, 1)
        if (first + count) % CHUNK_PAGES:
            self.map_range(first + count - 1, 1)

    def _map_chunk(self, chunk: int) -> None:
        shape = self._shape
        self._commit_table(shape.page_map + chunk * PAGE_SIZE, PAGE_SIZE)
        self._commit_table(shape.run_words + chunk * PAGE_SIZE, PAGE_SIZE)
        at = self._map + (chunk << CHUNK_SHIFT)
        self._words[at : at + CHUNK_PAGES] = _fill(self._entries[chunk], CHUNK_PAGES)
        self._mapped[chunk] = 1
        self._words[self._directory + chunk] = MAPPED  # last: readers may look there from now on

    def set(self, first: int, count: int, word: int) -> None:
        """Give the pages of a range one word; its edges are mapped (`map_edges`), so that nothing is committed here."""
        end = first + count
        while first < end:
            chunk = first >> CHUNK_SHIFT
            stop = min(end, (chunk + 1) << CHUNK_SHIFT)
            if self.is_mapped(chunk):
                # Mapped chunks that follow one another are one stretch of the map.
                while stop < end and self.is_mapped(stop >> CHUNK_SHIFT):
                    stop = min(end, stop + CHUNK_PAGES)
                self._words[self._map + first : self._map + stop] = _fill(word, stop - first)
            else:
                assert stop - first == CHUNK_PAGES, "a chunk covered in part was not mapped"
                self._entries[chunk] = self._words[self._directory + chunk] = word
            first = stop

    def spans(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """A range as (first page, pages, what a reader finds for each of them); chunk by chunk, in order."""
        end = first + count
        while first < end:
            chunk = first >> CHUNK_SHIFT
            stop = min(end, (chunk + 1) << CHUNK_SHIFT)
            entry: int = self._words[self._directory + chunk]
            if entry == MAPPED and self._mapped[chunk]:
                for word, group in groupby(self._words[self._map + first : self._map + stop].tolist()):
                    length = sum(1 for _ in group)
                    yield first, length, word
                    first += length
            else:
                yield first, stop - first, entry
                first = stop
