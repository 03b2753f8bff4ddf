"""Blocks that tell whether anybody else wrote into them: any changed byte is found."""

from __future__ import annotations

import pytest

from heapd.workloads.checked import (
    HEADER_SIZE,
    MAX_SIZE,
    CheckError,
    Stamp,
    check,
    check_prefix,
    check_zero,
    fill,
    read_stamp,
)

_STAMP = Stamp(7, 12345)


@pytest.mark.parametrize("size", [HEADER_SIZE, HEADER_SIZE + 1, 48, 4096, 65_537, MAX_SIZE])
def test_a_filled_block_checks(size: int) -> None:
    """Every size from the header alone up; the stamp can be read back."""
    view = memoryview(bytearray(size))
    fill(view, _STAMP)
    check(view, _STAMP)
    assert read_stamp(view) == _STAMP


def test_any_changed_byte_is_found() -> None:
    """One bit of one byte, wherever it is."""
    view = memoryview(bytearray(200))
    fill(view, _STAMP)
    for index in range(200):
        if 28 <= index < 32:
            continue  # unused, but under the CRC, too: checked below
        view[index] ^= 1
        with pytest.raises(CheckError):
            check(view, _STAMP)
        view[index] ^= 1
    view[29] ^= 1
    with pytest.raises(CheckError, match="CRC-32"):
        check(view, _STAMP)


def test_another_writer_or_an_older_write_is_found() -> None:
    """A whole block of somebody else, or of a moment ago, is not taken for the right one."""
    view = memoryview(bytearray(100))
    for other in (Stamp(8, 12345), Stamp(7, 12344)):
        fill(view, other)
        with pytest.raises(CheckError, match=f"write {other.sequence} of client {other.owner}"):
            check(view, _STAMP)


def test_the_error_says_where() -> None:
    """The first byte that differs is named."""
    view = memoryview(bytearray(100))
    fill(view, _STAMP)
    view[60] ^= 255
    with pytest.raises(CheckError, match="1 bytes differ, the first at offset 60"):
        check(view, _STAMP)


@pytest.mark.parametrize(("old", "new"), [(100, 300), (300, 100), (100, 100)])
def test_what_a_resize_keeps_is_checked(old: int, new: int) -> None:
    """The common part must be the pattern; a changed byte of it is found, one beyond it is not looked at."""
    whole = memoryview(bytearray(300))
    fill(whole[:old], _STAMP)
    check_prefix(whole[:new], _STAMP, old)
    whole[min(old, new) - 1] ^= 1
    with pytest.raises(CheckError, match="resized"):
        check_prefix(whole[:new], _STAMP, old)


def test_a_dirty_byte_of_a_zeroed_block_is_found() -> None:
    """Zero means all of it."""
    view = memoryview(bytearray(100))
    check_zero(view)
    view[99] = 1
    with pytest.raises(CheckError, match="1 of 100 bytes"):
        check_zero(view)
