"""Pictures: every byte is counted once, and both renderings show what was counted."""

from __future__ import annotations

import io
import random
from xml.etree import ElementTree

import pytest
from rich.console import Console

from heapd.records import Entry, EntryKind
from heapd.units import KIB, MIB
from heapd.workloads.picture import (
    Part,
    Picture,
    Strip,
    cell_size_for,
    cells_per_line,
    format_offset,
    picture_of_walk,
    render,
)
from heapd.workloads.svg import CELLS_PER_ROW, draw_svg


def _text(picture: Picture, columns: int = 80) -> str:
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(render(picture, columns))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _region(address: int, size: int, *parts: tuple[EntryKind, int]) -> list[Entry]:
    entries = [Entry(EntryKind.REGION, address, size, size, 0, committed=sum(size for _, size in parts))]
    at = address
    for kind, extent in parts:
        entries.append(Entry(kind, at, extent, extent, 0))
        at += extent
    return entries


def test_each_byte_of_a_strip_is_counted_once() -> None:
    """Whatever is added, the parts of each cell add up to its size, and those of all cells to the strip's."""
    rng = random.Random(1)
    strip = Strip("s", 4096, 100_000, 256)
    at, expected = 4096, dict.fromkeys(Part, 0)
    while at < 4096 + 100_000:
        extent = min(rng.randrange(1, 3000), 4096 + 100_000 - at)
        part = rng.choice(list(Part))
        strip.add(at, extent, part)
        expected[part] += extent
        at += extent
    assert strip.totals() == [expected[part] for part in Part]
    for index in range(strip.cell_count):
        counts = strip.cell(index)
        assert sum(counts) == min(256, 100_000 - index * 256)
        assert min(counts) >= 0


def test_a_terabyte_reserved_costs_one_line() -> None:
    """What is reserved and not committed is neither stored nor drawn cell by cell."""
    picture = picture_of_walk("big", _region(0, 1 << 40, (EntryKind.BUSY, 64 * KIB)), 4 * KIB)
    assert len(picture.strips[0].cells) == 16
    text = _text(picture)
    assert len(text.splitlines()) < 12
    assert "(1024 GiB more alike)" in text
    ElementTree.fromstring(draw_svg(picture))


@pytest.mark.parametrize(
    ("parts", "glyphs"),
    [
        (((EntryKind.BUSY, 128),), "█·"),
        (((EntryKind.FREE, 128),), "░·"),
        (((EntryKind.BUSY, 32), (EntryKind.FREE, 96)), "▒·"),
        (((EntryKind.BUSY, 96), (EntryKind.FREE, 32)), "▓·"),
        (((EntryKind.CACHED, 128),), "░·"),
        (((EntryKind.UNCOMMITTED, 256),), "··"),
    ],
)
def test_a_glyph_shows_how_busy_the_committed_bytes_are(parts: tuple[tuple[EntryKind, int], ...], glyphs: str) -> None:
    """Reserved, free, under half, over half and all busy each have their own glyph, told apart without colour."""
    picture = picture_of_walk("p", _region(0, 256, *parts), 128)
    assert f"+0 B {glyphs}\n" in _text(picture)


@pytest.mark.parametrize("columns", [40, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    """Rows of cells fit with their labels at any width from 44 up; narrower terminals get 32 cells."""
    picture = picture_of_walk("p", _region(0, MIB, (EntryKind.BUSY, 300_000), (EntryKind.FREE, 100_000)), 512)
    rows = [line for line in _text(picture, max(columns, 48)).splitlines() if "+" in line]
    assert rows
    assert max(map(len, rows)) <= max(columns, 48)


@pytest.mark.parametrize(("columns", "cells"), [(20, 32), (80, 64), (100, 64), (120, 96), (141, 128), (500, 128)])
def test_rows_begin_at_round_offsets(columns: int, cells: int) -> None:
    """The cells of a line are a multiple of 32, as many as fit, at most 128."""
    assert cells_per_line(columns) == cells


@pytest.mark.parametrize(
    ("reserved", "committed", "size"),
    [(0, 0, 64), (MIB, MIB, 4 * KIB), (MIB + 1, MIB + 1, 8 * KIB), (1 << 40, MIB, 16 * KIB), (2 * MIB, MIB, 8 * KIB)],
)
def test_the_cell_size_follows_what_will_be_drawn(reserved: int, committed: int, size: int) -> None:
    """A power of two; far reserves do not blur what is committed."""
    assert cell_size_for(reserved, committed, 256) == size


@pytest.mark.parametrize(
    ("offset", "text"),
    [
        (0, "0 B"),
        (100, "100 B"),
        (2048, "2 KiB"),
        (1280 * KIB, "1.25 MiB"),
        (1025 * KIB, "1025 KiB"),
        (3 << 30, "3 GiB"),
    ],
)
def test_offsets_are_exact(offset: int, text: str) -> None:
    """An offset is never rounded: rows would seem to begin where they do not."""
    assert format_offset(offset) == text


def test_the_svg_has_a_shape_for_each_part_and_adds_up() -> None:
    """The coloured area of each part in the rows is its share of the bytes."""
    size = CELLS_PER_ROW * 64
    parts = ((EntryKind.BUSY, size // 2), (EntryKind.FREE, size // 4), (EntryKind.CACHED, size // 8))
    root = ElementTree.fromstring(draw_svg(picture_of_walk("p", _region(0, size, *parts), 64)))
    areas: dict[str, float] = {}
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        if float(rect.get("x", 0)) >= 100 and float(rect.get("y", 0)) > 100:
            area = float(rect.attrib["width"]) * float(rect.attrib["height"])
            areas[rect.attrib["fill"]] = areas.get(rect.attrib["fill"], 0) + area
    reserved, busy, free, cached = (areas[c] for c in ("#eceff3", "#1d4f91", "#9ad3a8", "#f2c14e"))
    assert (busy / reserved, free / reserved, cached / reserved) == pytest.approx((0.5, 0.25, 0.125))


def test_an_empty_picture_says_so() -> None:
    """Nothing reserved is not an error, in either rendering."""
    picture = Picture("p", 64)
    assert "nothing is reserved" in _text(picture)
    assert "nothing is reserved" in draw_svg(picture)
