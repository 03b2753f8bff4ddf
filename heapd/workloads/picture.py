"""A picture of an arena or a heap: what is reserved, committed, free and busy, cell by cell.

Theory: a *strip* is a contiguous range (a region, the tables). It is cut into cells of one size, the same in the
whole picture; each cell counts its bytes by part. What nobody counted is reserved and not committed, so a region of
a terabyte costs nothing to draw. Terminal and SVG are two renderings of the same strips (`svg.py` has the other).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text

from heapd.records import Entry, EntryKind
from heapd.units import GIB, KIB, MIB, format_size

__all__ = [
    "Part",
    "Picture",
    "Strip",
    "cell_size_for",
    "cells_per_line",
    "format_offset",
    "picture_of_walk",
    "render",
]


class Part(IntEnum):
    """What a byte of a strip is; RESERVED is what no other part claims."""

    RESERVED = 0
    FREE = 1
    CACHED = 2
    OVERHEAD = 3
    BUSY = 4


_PARTS = len(Part)
_SMALLEST_CELL = 64  # bytes; arbitrary: a finer cell shows padding, not blocks

_PART_OF = {
    EntryKind.BUSY: Part.BUSY,
    EntryKind.FREE: Part.FREE,
    EntryKind.CACHED: Part.CACHED,
    EntryKind.OVERHEAD: Part.OVERHEAD,
}


@dataclass(slots=True)
class Strip:
    """A contiguous range and what its bytes are.

    Fields: label, address (of the first byte), size (bytes), cell_size (bytes), cells (cell index to bytes by Part;
    a cell that is missing is all reserved).
    """

    label: str
    address: int
    size: int
    cell_size: int
    cells: dict[int, list[int]] = field(default_factory=dict)

    @property
    def cell_count(self) -> int:
        return -(-self.size // self.cell_size)

    def add(self, address: int, extent: int, part: Part) -> None:
        """Count `extent` bytes from `address` as `part`."""
        if part is Part.RESERVED:
            return
        start = address - self.address
        end = start + extent
        while start < end:
            index = start // self.cell_size
            stop = min(end, (index + 1) * self.cell_size)
            self.cells.setdefault(index, [0] * _PARTS)[part] += stop - start
            start = stop

    def cell(self, index: int) -> list[int]:
        """Bytes by Part of a cell; they add up to the cell's size."""
        counts = list(self.cells.get(index, [0] * _PARTS))
        size = min(self.cell_size, self.size - index * self.cell_size)
        counts[Part.RESERVED] = size - sum(counts[1:])
        return counts

    def totals(self) -> list[int]:
        """Bytes by Part of the whole strip."""
        sums = [sum(column) for column in zip(*self.cells.values(), strict=True)] or [0] * _PARTS
        sums[Part.RESERVED] = self.size - sum(sums[1:])
        return sums


@dataclass(slots=True)
class Picture:
    """Strips under one title, all with cells of `cell_size` bytes; `busy` is what Part.BUSY is called in it, `note` a
    sentence under the title."""

    title: str
    cell_size: int
    strips: list[Strip] = field(default_factory=list)
    busy: str = "busy"
    note: str = ""

    def strip(self, label: str, address: int, size: int) -> Strip:
        """Append a strip."""
        self.strips.append(Strip(label, address, size, self.cell_size))
        return self.strips[-1]

    def totals(self) -> list[int]:
        """Bytes by Part of all strips."""
        return [sum(column) for column in zip(*(strip.totals() for strip in self.strips), strict=True)] or [0] * _PARTS


def cell_size_for(reserved: int, committed: int, cells: int) -> int:
    """The cell size, a power of two in bytes, with which a picture takes about `cells` cells.

    What is reserved and far from anything committed takes no room, so it counts only up to four times (arbitrary)
    what is committed.
    """
    size = _SMALLEST_CELL
    while min(reserved, 4 * committed) > size * cells:
        size *= 2
    return size


def picture_of_walk(title: str, entries: Iterable[Entry], cell_size: int) -> Picture:
    """The picture of one heap from its walk, taken in one pass: a million entries are never held at once."""
    picture = Picture(title, cell_size)
    strip: Strip | None = None
    for entry in entries:
        if entry.kind == EntryKind.REGION:
            text = f"region {entry.region} at {entry.address:#x}: {format_size(entry.size)} reserved"
            strip = picture.strip(f"{text}, {format_size(entry.committed)} committed", entry.address, entry.size)
        elif strip is not None:
            strip.add(entry.address, entry.extent, _PART_OF.get(EntryKind(entry.kind), Part.RESERVED))
    return picture


# -- terminal ----------------------------------------------------------------------------------------------------------
# (least share of a cell's committed bytes that is busy, in percent; glyph; style). The glyphs differ without colour.
_LEVELS = ((95, "█", "blue"), (50, "▓", "blue"), (1, "▒", "cyan"), (0, "░", "green"))
_RESERVED = ("·", "bright_black")
_LABEL_WIDTH = 11  # "+1023.5 MiB"


def _glyph(counts: list[int]) -> tuple[str, str]:
    committed = sum(counts[1:])
    if committed == 0:
        return _RESERVED
    taken = counts[Part.BUSY] + counts[Part.OVERHEAD]
    share = 100 * taken // committed if taken * 100 >= committed else (1 if taken else 0)
    return next((glyph, style) for least, glyph, style in _LEVELS if share >= least)


def _rows(strip: Strip, width: int) -> Iterator[tuple[int, int, Text]]:
    """(first row, rows it stands for, the line) of a strip; rows of reserved cells alone are drawn as one."""
    row_count = -(-strip.cell_count // width)
    drawn = sorted({index // width for index in strip.cells})
    expected = 0
    for row in [*drawn, row_count]:
        if row > expected:
            yield expected, row - expected, _line(strip, expected, width)
        if row < row_count:
            yield row, 1, _line(strip, row, width)
        expected = row + 1


def _line(strip: Strip, row: int, width: int) -> Text:
    """A row of glyphs, labelled with its offset in the strip."""
    line = Text.assemble((f"{'+' + format_offset(row * width * strip.cell_size):>{_LABEL_WIDTH}} ", "bright_black"))
    indices = range(row * width, min((row + 1) * width, strip.cell_count))
    for (glyph, style), group in groupby(_glyph(strip.cell(index)) for index in indices):
        line.append(glyph * len(list(group)), style)
    line.no_wrap = True
    return line


def format_offset(offset: int) -> str:
    """`offset` (bytes) exactly, in the largest unit that needs at most three decimals: "1.25 MiB", "1025 KiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if offset >= unit and offset * 1000 % unit == 0:
            return f"{offset / unit:.10g} {name}"
    return f"{offset} B"


def _strip_lines(strip: Strip, width: int) -> Iterator[Text]:
    yield Text(strip.label, style="bold")
    for row, count, line in _rows(strip, width):
        yield line
        if count > 1:
            rest = strip.size - (row + 1) * width * strip.cell_size
            span = min((count - 1) * width * strip.cell_size, rest)
            yield Text(f"{'':{_LABEL_WIDTH}} ({format_size(span)} more alike)", style="bright_black")


def _legend(picture: Picture) -> Text:
    text = Text()
    for glyph, style, meaning in (
        (*_RESERVED, "reserved"), ("░", "green", "committed, free"), ("▒", "cyan", f"under half {picture.busy}"),
        ("▓", "blue", "over half"), ("█", "blue", f"all {picture.busy}"),
    ):  # fmt: skip
        text.append(glyph, style)
        text.append(f" {meaning}  ")
    text.rstrip()
    return text


def _sums(picture: Picture) -> Text:
    totals = picture.totals()
    free = totals[Part.FREE] + totals[Part.CACHED]
    figures = (
        f"{picture.busy} {format_size(totals[Part.BUSY])}, overhead {format_size(totals[Part.OVERHEAD])}, "
        f"free {format_size(free)}, reserved only {format_size(totals[Part.RESERVED])}"
    )
    return Text(figures)


def render(picture: Picture, columns: int) -> RenderableType:
    """The picture as lines of at most `columns` characters (at least 40)."""
    width = cells_per_line(columns)
    lines: list[RenderableType] = [
        Text(picture.title, style="bold"),
        Text(f"one character is {format_size(picture.cell_size)}", style="bright_black"),
    ]
    if picture.note:
        lines.append(Text(picture.note, style="bright_black"))
    for strip in picture.strips:
        lines += _strip_lines(strip, width)
    if not picture.strips:
        lines.append(Text("nothing is reserved"))
    return Group(*lines, _sums(picture), _legend(picture))


def cells_per_line(columns: int) -> int:
    """Cells drawn in a line of a terminal of `columns`: 32, 64, 96 or 128, so that rows begin at round offsets."""
    return max(32, min(128, (columns - _LABEL_WIDTH - 2) // 32 * 32))
