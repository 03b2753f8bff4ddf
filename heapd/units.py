"""Byte and page arithmetic: pure integers, no I/O, nothing of heapd's own state.

Source: page size and allocation granularity are Win32's (4 KiB and 64 KiB).
"""

from __future__ import annotations

import re

__all__ = [
    "GIB",
    "GRANULE_PAGES",
    "GRANULE_SIZE",
    "KIB",
    "MIB",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "TIB",
    "align_down",
    "align_up",
    "format_size",
    "pages_for",
    "parse_size",
]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT  # 4,096: unit of reserve and commit
GRANULE_SIZE = 64 * KIB  # regions start on such a boundary
GRANULE_PAGES = GRANULE_SIZE // PAGE_SIZE  # 16

_SUFFIXES = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", re.IGNORECASE)


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is >= `value`."""
    return (value + alignment - 1) & -alignment


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of `alignment` (a power of two) that is <= `value`."""
    return value & -alignment


def pages_for(size: int) -> int:
    """Pages that `size` bytes occupy; 0 for 0."""
    return (size + PAGE_SIZE - 1) >> PAGE_SHIFT


def parse_size(text: str) -> int:
    """Bytes meant by `text`: a count with an optional binary suffix ("4096", "64KiB", "64k", "1.5 GiB").

    Raises: ValueError if the text is no size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:40]!r} is no size; write bytes or a suffix, such as 4096, 64KiB or 1.5GiB")
    return (
        int(float(match[1]) * _SUFFIXES[match[2].lower()])
        if "." in match[1]
        else (int(match[1]) * _SUFFIXES[match[2].lower()])
    )


def format_size(size: int) -> str:
    """`size` in the largest binary unit that keeps it readable: "17 B", "4 KiB", "1.5 GiB"."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{size} B"
