"""The picture of a whole arena, read from its page map without asking the daemon for anything but the heaps' names.

A page of a slab counts as used whether its blocks are busy or free: which of them are, only a walk tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import heapd_client as hc
from heapd.layout import HEAP_INDEX_BITS, KIND_RUN, KIND_SLAB, KIND_TABLE, PAGE_COMMITTED, PAGE_FREE, PageInfo
from heapd.units import PAGE_SHIFT, format_size
from heapd.workloads.picture import Part, Picture, Strip

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
        return Part.BUSY if self.info.kind in (KIND_TABLE, KIND_SLAB, KIND_RUN) else Part.FREE


def picture_of_arena(session: hc.Session, cell_size: Callable[[int], int]) -> Picture:
    """The arena: its tables, then each stretch of pages of one heap; pages of no heap are only counted.

    Args: cell_size (the size of a cell for so many committed bytes).
    """
    names = {info.heap_id & _INDEX_MASK: info.name or f"{info.heap_id}" for info in session.heaps()}
    spans = [_Span(*span) for span in session.arena.spans()]
    committed = sum(span.size for span in spans if span.info.state == PAGE_COMMITTED)
    unreserved = sum(span.size for span in spans if span.info.state == PAGE_FREE)
    title = f"Arena of {session.endpoint}: {format_size(session.arena.size)}, {format_size(unreserved)} of it no heap's"
    picture = Picture(title, cell_size(committed), busy="in use")
    for group in _groups(spans):
        _draw(picture, group, names)
    return picture


def _groups(spans: list[_Span]) -> Iterator[list[_Span]]:
    """Neighbours that belong to the tables or to one heap."""
    group: list[_Span] = []
    for span in spans:
        if group and _owner(span) != _owner(group[-1]):
            yield group
            group = []
        if span.info.state != PAGE_FREE:
            group.append(span)
    if group:
        yield group


def _owner(span: _Span) -> tuple[bool, bool, int]:
    return span.info.state == PAGE_FREE, span.info.kind == KIND_TABLE, span.info.heap


def _draw(picture: Picture, group: list[_Span], names: dict[int, str]) -> Strip:
    first, size = group[0], sum(span.size for span in group)
    committed = sum(span.size for span in group if span.info.state == PAGE_COMMITTED)
    is_table = first.info.kind == KIND_TABLE
    owner = "tables" if is_table else f"heap {names.get(first.info.heap, 'that has just gone')}"
    address = first.first << PAGE_SHIFT
    label = f"{owner} at {address:#x}: {format_size(size)} reserved, {format_size(committed)} committed"
    strip = picture.strip(label, address, size)
    for span in group:
        strip.add(span.first << PAGE_SHIFT, span.size, span.part)
    return strip
