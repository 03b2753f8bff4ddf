"""The picture of an arena or a heap as SVG: one row of columns per stretch of addresses, plain shapes, no script.

Each column is one cell and is stacked: the share of its bytes that is busy from the bottom, then overhead, then what
sits in front ends' caches, then committed free; the pale rest is reserved. Neighbours that are alike are one shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

from heapd.units import format_size
from heapd.workloads.picture import Part, Picture, Strip, format_offset

__all__ = ["CELLS_PER_ROW", "draw_svg"]

CELLS_PER_ROW = 256
_CELL_WIDTH = 3  # all in pixels
_ROW_HEIGHT = 18
_ROW_PITCH = 22
_LEFT = 128
_RIGHT = 32
_PLOT_WIDTH = CELLS_PER_ROW * _CELL_WIDTH
_WIDTH = _LEFT + _PLOT_WIDTH + _RIGHT
_HEAD_HEIGHT = 128

# Told apart by people who see few colours, and by lightness alone.
_COLOURS = {
    Part.RESERVED: "#eceff3",
    Part.FREE: "#9ad3a8",
    Part.CACHED: "#f2c14e",
    Part.OVERHEAD: "#6b7280",
    Part.BUSY: "#1d4f91",
}
_NAMES = {
    Part.BUSY: "busy",
    Part.OVERHEAD: "overhead",
    Part.CACHED: "free, in a front end",
    Part.FREE: "committed, free",
    Part.RESERVED: "reserved",
}
_STACK = (Part.BUSY, Part.OVERHEAD, Part.CACHED, Part.FREE)  # from the bottom


@dataclass(slots=True)
class _Canvas:
    """Shapes so far, and how far down the next goes (pixels)."""

    shapes: list[str]
    y: float

    def rect(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.shapes.append(f'<rect x="{x:g}" y="{y:.2f}" width="{width:g}" height="{height:.2f}" fill="{colour}"/>')

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start") -> None:
        kind = f' class="{style}"' if style else ""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.shapes.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="#9aa3af"/>')


def draw_svg(picture: Picture) -> str:
    """The picture as the text of an SVG file."""
    canvas = _Canvas([], _HEAD_HEIGHT)
    _draw_head(canvas, picture)
    for strip in picture.strips:
        _draw_strip(canvas, strip)
    if not picture.strips:
        canvas.text(_LEFT, canvas.y + 16, "nothing is reserved")
        canvas.y += 32
    height = canvas.y + 16
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {_WIDTH} {height:g}" font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12" '
        'fill="#1f2937">',
        f"<title>{escape(picture.title)}</title>",
        "<style>.title{font-size:18px;font-weight:bold}.head{font-weight:bold}.axis{fill:#57606a;font-size:11px}"
        "</style>",
        f'<rect width="{_WIDTH}" height="{height:g}" fill="#ffffff"/>',
        *canvas.shapes,
        "</svg>\n",
    ))  # fmt: skip


def _draw_head(canvas: _Canvas, picture: Picture) -> None:
    totals = picture.totals()
    canvas.text(16, 28, picture.title, "title")
    x = 16.0
    for part, name in _NAMES.items():
        text = f"{picture.busy if part is Part.BUSY else name} {format_size(totals[part])}"
        canvas.rect(x, 44, 14, 14, _COLOURS[part])
        canvas.text(x + 20, 56, text)
        x += 20 + 7.2 * len(text) + 14
    note = f"; {picture.note}" if picture.note else ""
    canvas.text(16, 80, f"a column is {format_size(picture.cell_size)}, filled from the bottom{note}", "axis")
    _draw_axis(canvas, picture.cell_size * CELLS_PER_ROW)


def _draw_axis(canvas: _Canvas, row_size: int) -> None:
    """Ticks for the offset within a row, and what the two axes say."""
    y = _HEAD_HEIGHT - 8
    canvas.text(_LEFT - 12, y - 8, "row begins at", "axis", "end")
    for quarter in range(5):
        x = _LEFT + _PLOT_WIDTH * quarter / 4
        canvas.line(x, y - 4, x, y)
        text = f"+{format_size(row_size * quarter // 4)}" + (" into the row" if quarter == 0 else "")
        canvas.text(x, y - 8, text, "axis", "start" if quarter == 0 else "end" if quarter == 4 else "middle")
    canvas.line(_LEFT, y, _LEFT + _PLOT_WIDTH, y)


def _draw_strip(canvas: _Canvas, strip: Strip) -> None:
    canvas.text(_LEFT, canvas.y + 16, strip.label, "head")
    canvas.y += 24
    expected = 0
    row_count = -(-strip.cell_count // CELLS_PER_ROW)
    for row in [*sorted({index // CELLS_PER_ROW for index in strip.cells}), row_count]:
        if row > expected:
            _draw_gap(canvas, strip, expected, row)
        if row < row_count:
            _draw_row(canvas, strip, row)
        expected = row + 1
    canvas.y += 12


def _draw_gap(canvas: _Canvas, strip: Strip, first: int, stop: int) -> None:
    """Rows that are reserved and nothing else: one pale row that says how much it stands for."""
    row_size = CELLS_PER_ROW * strip.cell_size
    start, end = first * row_size, min(stop * row_size, strip.size)
    width = _PLOT_WIDTH * min(1.0, (end - start) / row_size)
    canvas.text(_LEFT - 12, canvas.y + 13, f"+{format_offset(start)}", "axis", "end")
    canvas.rect(_LEFT, canvas.y, max(width, 1), _ROW_HEIGHT, _COLOURS[Part.RESERVED])
    if stop - first > 1:
        canvas.text(_LEFT + 8, canvas.y + 13, f"{format_size(end - start)} reserved, none committed", "axis")
    canvas.y += _ROW_PITCH


def _draw_row(canvas: _Canvas, strip: Strip, row: int) -> None:
    first = row * CELLS_PER_ROW
    count = min(CELLS_PER_ROW, strip.cell_count - first)
    canvas.text(_LEFT - 12, canvas.y + 13, f"+{format_offset(first * strip.cell_size)}", "axis", "end")
    canvas.rect(_LEFT, canvas.y, count * _CELL_WIDTH, _ROW_HEIGHT, _COLOURS[Part.RESERVED])
    for start, width, counts in _alike(strip, first, count):
        _draw_column(canvas, _LEFT + start * _CELL_WIDTH, width * _CELL_WIDTH, counts)
    canvas.y += _ROW_PITCH


def _alike(strip: Strip, first: int, count: int) -> Iterator[tuple[int, int, list[int]]]:
    """(first column, columns, bytes by Part) of stretches of a row whose cells are the same."""
    start = 0
    for counts, group in groupby(strip.cell(first + column) for column in range(count)):
        width = len(list(group))
        yield start, width, counts
        start += width


def _draw_column(canvas: _Canvas, x: float, width: float, counts: list[int]) -> None:
    size = sum(counts)
    bottom = canvas.y + _ROW_HEIGHT
    for part in _STACK:
        height = _ROW_HEIGHT * counts[part] / size
        if counts[part]:
            bottom -= height
            canvas.rect(x, bottom, width, height, _COLOURS[part])
