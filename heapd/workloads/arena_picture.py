"""The picture of a whole arena, read from its page map without asking the daemon for anything but the heaps' names.

A page of a slab counts as used whether its blocks are busy or free: which of them are, only a walk tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import heapd_client as hc
from heapd.layout import HEAP_INDEX_BITS, KIND_RUN, KIND_SLAB, KIND_TABLE, PAGE_COMMITTED, PAGE_FREE, PageInfo
from heapd.units import PAGE_SHIFT, format_size
from heapd.workloads.picture import Part, Picture, Strip, cell_size_for

__all__ = ["picture_of_arena"]

_INDEX_MASK = (1 << HEAP_INDEX_BITS) - 1


class _Span(NamedTuple):
    first: int
    page_count: int
    info: PageInfo

    @property
    def size(self) -> int:
        return self.page_count << PAGE_SHIFT

    @property
    def part(self) -> Part:
        if self.info.state != PAGE_COMMITTED:
            return Part.RESERVED
        return Part.BUSY if self.info.kind in (KIND_SLAB, KIND_RUN) else Part.FREE


def picture_of_arena(session: hc.Session, cells: int) -> Picture:
    """The arena: each stretch of pages of one heap; pages of no heap, and the tables, are only counted.

    Args: cells (that it may take, about).
    """
    names = {info.heap_id & _INDEX_MASK: info.name or f"{info.heap_id}" for info in session.heaps()}
    spans = [_Span(*span) for span in session.arena.spans()]
    committed = sum(span.size for span in spans if span.info.state == PAGE_COMMITTED)
    unreserved = sum(span.size for span in spans if span.info.state == PAGE_FREE)
    reserved = sum(span.size for span in spans if _owner(span) is not None)
    note = f"not drawn: tables {format_size(session.statistics().tables)}, {format_size(unreserved)} of no heap"
    size = cell_size_for(reserved, committed, cells)
    picture = Picture(f"Arena of {session.endpoint}", size, busy="in use", note=note)
    for group in _groups(spans):
        _draw(picture, group, names)
    return picture


def _groups(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Neighbours that belong to one heap."""
    for owner, group in groupby(spans, _owner):
        if owner is not None:
            yield list(group)


def _owner(span: _Span) -> int | None:
    """The control index of the heap whose pages these are, None if they are no heap's."""
    return None if span.info.state == PAGE_FREE or span.info.kind == KIND_TABLE else span.info.heap


def _draw(picture: Picture, group: list[_Span], names: dict[int, str]) -> Strip:
    first, size = group[0], sum(span.size for span in group)
    committed = sum(span.size for span in group if span.info.state == PAGE_COMMITTED)
    owner = names.get(first.info.heap, "that has just gone")
    address = first.first << PAGE_SHIFT
    label = f"heap {owner} at {address:#x}: {format_size(size)} reserved, {format_size(committed)} committed"
    strip = picture.strip(label, address, size)
    for span in group:
        strip.add(span.first << PAGE_SHIFT, span.size, span.part)
    return strip
