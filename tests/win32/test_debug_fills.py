"""Tail and free checking: the fillers, who notices damage to them, and that nobody else is disturbed."""

from __future__ import annotations

import pytest

from heapd_client import win32
from tests.client.programs import in_child

TAIL = b"\xab" * 16
FREED = bytes.fromhex("eefeeefe")
NEW = bytes.fromhex("0df0adba")


@pytest.fixture
def checked(attached: str) -> int:
    """A heap with both kinds of checking."""
    return win32.HeapCreate(win32.HEAP_TAIL_CHECKING_ENABLED | win32.HEAP_FREE_CHECKING_ENABLED, 0, 0)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 15, 16, 17, 33, 63, 1_000, 5_000, 100_000, 2_000_000])
def test_a_block_has_its_fillers_from_birth_to_death(checked: int, size: int) -> None:
    """0xAB right behind the last byte, 0xBAADF00D in whole DWORDs, 0xFEEEFEEE from the 17th byte on once freed."""
    block = win32.HeapAlloc(checked, 0, size)
    assert win32.HeapSize(checked, 0, block) == size
    assert win32.memory(block, size - size % 4) == NEW * (size // 4)
    assert win32.memory(block + size, 16) == TAIL
    zeroed = win32.HeapAlloc(checked, win32.HEAP_ZERO_MEMORY, size)
    assert win32.memory(zeroed, size + 16) == bytes(size) + TAIL
    assert win32.HeapValidate(checked, 0, None)
    if size < 1 << 20:  # a larger one's memory goes back to the system
        win32.HeapFree(checked, 0, block)
        assert win32.memory(block + 16, size - size % 4) == (FREED * (size // 4 + 1))[: size - size % 4]
        assert win32.HeapValidate(checked, 0, None)


@pytest.mark.parametrize("offset", [0, 7, 15])
def test_a_damaged_tail_is_noticed_by_validate_alone(checked: int, offset: int) -> None:
    """By that of the block and that of the heap; mended, both are content again. Size, resize and free go on."""
    block, other = (win32.HeapAlloc(checked, 0, 50) for _ in range(2))
    byte = win32.memory(block + 50 + offset, 1)
    byte[0] ^= 1
    assert not win32.HeapValidate(checked, 0, block)
    assert not win32.HeapValidate(checked, 0, None)
    assert win32.HeapValidate(checked, 0, other)
    byte[0] ^= 1
    assert win32.HeapValidate(checked, 0, block)
    assert win32.HeapValidate(checked, 0, None)
    byte[0] ^= 1
    assert win32.HeapSize(checked, 0, block) == 50
    assert win32.HeapReAlloc(checked, 0, block, 40) == block
    win32.memory(block + 40, 1)[0] = 0
    assert win32.HeapFree(checked, 0, block)


def test_a_write_to_a_freed_block_is_noticed(checked: int) -> None:
    """Also by another process; until the block is given out again."""
    block, _ = (win32.HeapAlloc(checked, 0, 200) for _ in range(2))
    win32.HeapFree(checked, 0, block)
    byte = win32.memory(block + 150, 1)
    byte[0] ^= 1
    assert not win32.HeapValidate(checked, 0, None)

    def look() -> None:
        assert not win32.HeapValidate(checked, 0, None)
        byte[0] ^= 1
        assert win32.HeapValidate(checked, 0, None)
        byte[0] ^= 1

    assert in_child(look) == 0
    assert block in [win32.HeapAlloc(checked, 0, 200) for _ in range(100)]
    assert win32.HeapValidate(checked, 0, None)


def test_a_resize_moves_the_fillers(checked: int) -> None:
    """The old bytes stay, those of a partial DWORD included; what is new is filled, or zero; 0xAB follows."""
    block = win32.HeapAlloc(checked, 0, 10)
    win32.memory(block, 10)[:] = b"0123456789"
    block = win32.HeapReAlloc(checked, 0, block, 30)
    assert win32.memory(block, 10) == b"0123456789"
    assert win32.memory(block + 12, 16) == NEW * 4
    assert win32.memory(block + 30, 16) == TAIL
    block = win32.HeapReAlloc(checked, win32.HEAP_ZERO_MEMORY, block, 90)
    assert win32.memory(block + 30, 60) == bytes(60)
    assert win32.memory(block + 90, 16) == TAIL
    block = win32.HeapReAlloc(checked, 0, block, 5)
    assert win32.memory(block, 21) == b"01234" + TAIL
    assert win32.HeapValidate(checked, 0, None)


def test_memory_used_as_something_else_is_not_taken_for_damage(checked: int) -> None:
    """Slabs that emptied and were cut anew, pages that went back and came again: a sound heap stays sound."""
    for round_ in range(3):
        for size in (16, 200, 48, 3_000, 500, 20_000, 70_000):
            blocks = [win32.HeapAlloc(checked, 0, size) for _ in range(40)]
            for block in blocks:
                win32.memory(block, size)[:] = bytes([round_]) * size
            for block in blocks[round_:]:
                assert win32.HeapFree(checked, 0, block)
            assert win32.HeapValidate(checked, 0, None), (round_, size)
        win32.HeapCompact(checked, 0)
        assert win32.HeapValidate(checked, 0, None), round_


def test_one_kind_alone(attached: str) -> None:
    """Tail checking fills nothing else, free checking leaves no tail."""
    tails = win32.HeapCreate(win32.HEAP_TAIL_CHECKING_ENABLED, 0, 0)
    block = win32.HeapAlloc(tails, win32.HEAP_ZERO_MEMORY, 64)
    win32.HeapAlloc(tails, 0, 64)
    win32.HeapFree(tails, 0, block)
    assert win32.memory(block, 80) == bytes(64) + TAIL
    frees = win32.HeapCreate(win32.HEAP_FREE_CHECKING_ENABLED, 0, 0)
    block = win32.HeapAlloc(frees, 0, 64)
    win32.memory(block + 64, 16)[:] = bytes(16)
    assert win32.HeapValidate(frees, 0, block)
