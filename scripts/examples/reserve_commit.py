"""Reserve and commit, watched page by page: what each call does to the pages of one small heap.

A reserved page is address space and costs nothing. A committed one has memory behind it; the last column is the
kernel's word on that, counted from the moment before the heap was made. A block that was freed stays committed, with
the process that freed it; `trim` gives it back to the heap, `compact` gives the heap's free pages back to the system.
"""

from __future__ import annotations

import os

from _stage import example

import heapd_client as hc
from heapd.layout import KIND_RUN, KIND_SLAB, PAGE_COMMITTED, PAGE_RESERVED, PageInfo

PAGE_SIZE = 4096
PAGE_COUNT = 48  # of the heap; a heap's reserve is a multiple of 16 pages
KIB = 1024
LEGEND = "-  nobody's    .  reserved    o  committed, free    s  small blocks    #  a block of whole pages"


def glyph(page: PageInfo) -> str:
    """One character for a page."""
    if page.state == PAGE_COMMITTED:
        return {KIND_SLAB: "s", KIND_RUN: "#"}.get(page.kind, "o")
    return "." if page.state == PAGE_RESERVED else "-"


class Watch:
    """Draws the pages of one heap, a line after each step."""

    def __init__(self, session: hc.Session, page_count: int) -> None:
        self._arena = session.arena
        self._page_count = page_count
        self._first_page = 0
        self._before = self._memory()

    def _memory(self) -> int:
        """Bytes that the kernel has given to the arena."""
        return os.stat(f"/dev/shm/{self._arena.name}").st_blocks * 512

    def follow(self, heap: hc.Heap) -> None:
        """Draw the pages of that heap from now on."""
        self._first_page = heap.info.base // PAGE_SIZE

    def show(self, step: str) -> None:
        """What the pages are after `step`."""
        spans = self._arena.spans(self._first_page, self._page_count)
        picture = "".join(glyph(page) * count for _, count, page in spans)
        print(f"{step:<28} {picture} {(self._memory() - self._before) // KIB:>4} KiB")


@example
def main(session: hc.Session) -> None:
    """Take one heap from reserve to release, and draw its pages after each step."""
    session.create_heap().destroy()  # the arena's own tables grow with its first heap; let them not be counted
    watch = Watch(session, PAGE_COUNT)
    heap = session.create_heap(initial=4 * PAGE_SIZE, maximum=PAGE_COUNT * PAGE_SIZE)
    watch.follow(heap)
    watch.show(f"create: reserve {PAGE_COUNT}, commit 4")
    small = heap.alloc_many(200, 50)
    watch.show("50 blocks of 200 bytes")
    large = heap.alloc(12 * PAGE_SIZE)
    watch.show("a block of 48 KiB")
    another = heap.alloc(8 * PAGE_SIZE)
    watch.show("a block of 32 KiB")
    try:
        heap.alloc(28 * PAGE_SIZE)
    except hc.HeapFullError as error:
        watch.show("112 KiB more: refused")
        print(f"  {error}")
    large.free()
    watch.show("free the 48 KiB")
    heap.trim()
    watch.show("trim")
    heap.compact()
    watch.show("compact")
    another.realloc(14 * PAGE_SIZE)
    watch.show("make the 32 KiB 56 KiB")
    heap.free_many(small)
    another.free()
    heap.compact()
    watch.show("free all, compact")
    heap.destroy()
    watch.show("destroy: released")
    print(LEGEND)


if __name__ == "__main__":
    main()
