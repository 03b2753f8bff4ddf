"""heapd.units by itself."""

from __future__ import annotations

import pytest

from heapd.units import (
    GIB,
    GRANULE_PAGES,
    GRANULE_SIZE,
    KIB,
    MIB,
    PAGE_SHIFT,
    PAGE_SIZE,
    TIB,
    align_down,
    align_up,
    format_size,
    pages_for,
    parse_size,
)


def test_pages_and_granules_are_win32s() -> None:
    """A page is 4 KiB and a granule 64 KiB; both are part of the arena's layout."""
    assert (PAGE_SIZE, GRANULE_SIZE, GRANULE_PAGES) == (4096, 65536, 16)
    assert 1 << PAGE_SHIFT == PAGE_SIZE


@pytest.mark.parametrize("alignment", [1, 2, 16, 64, 4096, 65536])
def test_align_rounds_to_the_nearest_multiple_on_its_side(alignment: int) -> None:
    """align_up is the next multiple at or above, align_down the one at or below, for values round every multiple."""
    for multiple in (0, alignment, 7 * alignment, 2**40):
        for value in {multiple, multiple + 1, multiple + alignment - 1}:
            down, up = align_down(value, alignment), align_up(value, alignment)
            assert down % alignment == up % alignment == 0
            assert down <= value <= up < value + alignment
            assert value - down < alignment


@pytest.mark.parametrize(
    ("size", "pages"), [(0, 0), (1, 1), (4095, 1), (4096, 1), (4097, 2), (65536, 16), (2**40 + 1, 2**28 + 1)]
)
def test_pages_for_counts_the_pages_that_hold_it(size: int, pages: int) -> None:
    """The last page may be used in part; nothing needs no page."""
    assert pages_for(size) == pages


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("17 B", 17),
        ("64KiB", 64 * KIB),
        ("64k", 64 * KIB),
        ("64 kb", 64 * KIB),
        ("1.5 GiB", GIB + 512 * MIB),
        ("0.5m", 512 * KIB),
        ("2T", 2 * TIB),
        ("  8 MiB ", 8 * MIB),
        ("9007199254740993", 9007199254740993),  # past what a float holds
    ],
)
def test_parse_size_reads_what_people_write(text: str, size: int) -> None:
    """A count of bytes, or one with a binary suffix, in any case, with or without spaces."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.2", "64 KiBs", "KiB", "1e6", "0x10", "1 2", "64P", "NaN"])
def test_parse_size_refuses_what_is_no_size(text: str) -> None:
    """Anything else is a ValueError that shows the text and an example."""
    with pytest.raises(ValueError, match="64KiB"):
        parse_size(text)


def test_parse_size_shows_only_the_start_of_a_long_text() -> None:
    """A huge argument does not become a huge message."""
    with pytest.raises(ValueError, match="is no size") as caught:
        parse_size("x" * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 * MIB, "64 MiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (64 * TIB, "64 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_format_size_uses_the_largest_unit(size: int, text: str) -> None:
    """One decimal at most, none when it would be 0."""
    assert format_size(size) == text


def test_parse_size_reads_what_format_size_writes() -> None:
    """Every power of two comes back as it was."""
    for shift in range(46):
        assert parse_size(format_size(1 << shift)) == 1 << shift
