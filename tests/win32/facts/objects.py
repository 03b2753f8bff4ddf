"""The Global and Local functions. Where they agree, each check goes over both."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from heapd_client import win32
from tests.win32.facts import holds
from tests.win32.tools import BEYOND, KIB, SENTINEL, expect, read, write

MADE_UP = 0xDEAD_BEE8  # a handle by its last bits


class Family(NamedTuple):
    name: str
    alloc: Callable[..., int]
    realloc: Callable[..., int]
    size: Callable[..., int]
    free: Callable[..., int]
    lock: Callable[..., int]
    unlock: Callable[..., bool]
    flags: Callable[..., int]
    handle: Callable[..., int]
    discard: Callable[..., int]


def _family(name: str) -> Family:
    names = ("Alloc", "ReAlloc", "Size", "Free", "Lock", "Unlock", "Flags", "Handle", "Discard")
    return Family(name, *(getattr(win32, name + function) for function in names))


GLOBAL, LOCAL = _family("Global"), _family("Local")
BOTH = (GLOBAL, LOCAL)
FIXED, MOVEABLE, ZEROINIT, MODIFY = win32.GMEM_FIXED, win32.GMEM_MOVEABLE, win32.GMEM_ZEROINIT, win32.GMEM_MODIFY
DISCARDED = int(win32.GMEM_DISCARDED)


def discardable(of: Family) -> int:
    return int(win32.GMEM_DISCARDABLE if of is GLOBAL else win32.LMEM_DISCARDABLE)


def freed_handle(of: Family) -> int:
    handle = of.alloc(MOVEABLE, 10)
    assert of.free(handle) == 0
    return handle


def bad_handles(of: Family) -> tuple[int, int]:
    return freed_handle(of), MADE_UP


# -- allocate --------------------------------------------------------------------------------------------------------
@holds("G-ALLOC-01", "G-ALLOC-11")
def a_failing_alloc_is_null_with_an_error() -> None:
    for of in BOTH:
        for flags in (FIXED, MOVEABLE):
            expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, of.alloc, flags, -1)
        expect(0, win32.ERROR_INVALID_PARAMETER, of.alloc, 0x10000, 10)
        expect(0, win32.ERROR_INVALID_PARAMETER, of.alloc, 1, 10)


@holds("G-ALLOC-02", "G-LOCK-02", "G-ALLOC-12", "G-ALLOC-13")
def a_fixed_object_is_its_data() -> None:
    for of in BOTH:
        memory = of.alloc(FIXED, 10)
        assert memory % 16 == 0
        for _ in range(3):
            assert of.lock(memory) == memory
        assert of.flags(memory) == 0
        assert 10 <= of.size(memory) <= 16
        assert win32.HeapSize(win32.GetProcessHeap(), 0, memory) == of.size(memory)
        assert of.free(memory) == 0


@holds("G-ALLOC-03", "G-ALLOC-04", "G-ALLOC-09", "G-LOCK-01", "G-HANDLE-01")
def a_moveable_object_has_a_handle_that_is_not_its_data() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE | FIXED, 10)
        data = of.lock(handle)
        assert data
        assert data != handle
        assert (handle % 16, data % 16) == (8, 0)
        assert of.lock(handle) == data
        assert of.flags(handle) & 0xFF == 2
        assert of.handle(data) == handle
        assert of.size(handle) == 10
        assert of.free(handle) == 0


@holds("G-ALLOC-05")
def a_fixed_object_of_0_bytes() -> None:
    for of, size in ((GLOBAL, 1), (LOCAL, 0)):
        memory = of.alloc(FIXED, 0)
        assert memory
        assert of.size(memory) == size
        of.free(memory)


@holds("G-ALLOC-06", "G-LOCK-03", "G-SIZE-01")
def a_moveable_object_of_0_bytes_is_discarded() -> None:
    for of in BOTH:
        for asked in (0, discardable(of)):
            handle = of.alloc(MOVEABLE | asked, 0)
            assert handle
            assert of.flags(handle) == DISCARDED | asked
            expect(0, None, of.size, handle)
            expect(0, win32.ERROR_DISCARDED, of.lock, handle)
            assert of.free(handle) == 0


@holds("G-ALLOC-07")
def zeroinit_zeroes() -> None:
    for of in BOTH:
        for flags in (FIXED, MOVEABLE):
            for _ in range(3):
                memory = of.alloc(flags | ZEROINIT, 100)
                data = of.lock(memory)
                assert read(data, 100) == bytes(100)
                write(data, b"x" * 100)
                of.free(memory)


@holds("G-ALLOC-08", "G-FREE-06", "L-01")
def there_are_65536_handles_for_both_families() -> None:
    handles = []
    while handle := (GLOBAL if len(handles) % 2 else LOCAL).alloc(MOVEABLE, 0):
        handles.append(handle)
        assert len(handles) <= 65_536
    assert win32.GetLastError() == win32.ERROR_NOT_ENOUGH_MEMORY
    assert len(handles) == len(set(handles)) == 65_536
    for of in BOTH:
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, of.alloc, MOVEABLE, 10)
        assert of.free(of.alloc(FIXED, 10)) == 0
    for handle in handles:
        assert LOCAL.free(handle) == 0
    again = [GLOBAL.alloc(MOVEABLE, 0) for _ in range(1_000)]
    assert all(again)
    for handle in again:
        GLOBAL.free(handle)


@holds("G-ALLOC-10")
def historical_flags_are_accepted() -> None:
    for name in ("NOCOMPACT", "NODISCARD", "NOT_BANKED", "LOWER", "NOTIFY", "DDESHARE"):
        handle = win32.GlobalAlloc(MOVEABLE | getattr(win32, f"GMEM_{name}"), 10)
        assert handle, name
        win32.GlobalFree(handle)
    for name in ("NOCOMPACT", "NODISCARD"):
        assert win32.LocalFree(win32.LocalAlloc(getattr(win32, f"LMEM_{name}"), 10)) == 0


# -- lock, unlock, flags, handle -------------------------------------------------------------------------------------
@holds("G-LOCK-04", "G-UNLOCK-01", "G-UNLOCK-02", "G-UNLOCK-03", "G-FLAGS-01")
def locks_are_counted_up_to_255() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE, 10)
        for count in range(1, 257):
            of.lock(handle)
            assert of.flags(handle) == min(count, 255)
        for _ in range(254):
            expect(True, None, of.unlock, handle)
        expect(False, win32.NO_ERROR, of.unlock, handle)
        expect(False, win32.ERROR_NOT_LOCKED, of.unlock, handle)
        of.free(handle)


@holds("G-LOCK-05", "G-FREE-05")
def a_bad_handle_cannot_be_locked() -> None:
    for of in BOTH:
        for handle in bad_handles(of):
            expect(0, win32.ERROR_INVALID_HANDLE, of.lock, handle)
            expect(0, win32.ERROR_INVALID_HANDLE, of.size, handle)
            expect(0, win32.ERROR_INVALID_HANDLE, of.realloc, handle, 10, MOVEABLE)
            expect(handle, win32.ERROR_INVALID_HANDLE, of.free, handle)


@holds("G-LOCK-06", "G-UNLOCK-06", "L-03")
def an_address_beyond_the_arena_cannot_be_locked() -> None:
    expect(0, win32.ERROR_INVALID_HANDLE, win32.GlobalLock, BEYOND)
    expect(0, None, win32.LocalLock, BEYOND)
    expect(True, None, win32.GlobalUnlock, BEYOND)
    expect(False, win32.ERROR_NOT_LOCKED, win32.LocalUnlock, BEYOND)


@holds("G-UNLOCK-04", "G-UNLOCK-05", "L-03")
def the_families_differ_in_what_may_be_unlocked() -> None:
    memory = win32.GlobalAlloc(FIXED, 10)
    for _ in range(2):
        expect(True, None, win32.GlobalUnlock, memory)
        expect(False, win32.ERROR_NOT_LOCKED, win32.LocalUnlock, memory)
    win32.GlobalFree(memory)
    for handle in bad_handles(GLOBAL):
        expect(True, win32.ERROR_INVALID_HANDLE, win32.GlobalUnlock, handle)
        expect(False, win32.ERROR_INVALID_HANDLE, win32.LocalUnlock, handle)


@holds("G-FLAGS-02", "G-FLAGS-03", "L-04")
def flags_tell_what_is_remembered() -> None:
    assert win32.LMEM_DISCARDABLE == 0xF00
    handle = win32.GlobalAlloc(0x7F72, 10)  # all there are
    assert win32.GlobalFlags(handle) == win32.GMEM_DISCARDABLE | win32.GMEM_DDESHARE
    assert win32.LocalFlags(handle) in (0xF00, 0x100)
    win32.GlobalFree(handle)
    memory = win32.GlobalAlloc(0x7F72 & ~MOVEABLE, 10)
    assert win32.GlobalFlags(memory) == win32.LocalFlags(memory) == 0
    win32.GlobalFree(memory)


@holds("G-FLAGS-04", "L-03")
def flags_of_what_is_no_object() -> None:
    for of in BOTH:
        for handle in bad_handles(of):
            expect(0x8000, win32.ERROR_INVALID_HANDLE, of.flags, handle)
    expect(0x8000, win32.ERROR_INVALID_HANDLE, win32.GlobalFlags, BEYOND)
    expect(0x8000, win32.ERROR_NOACCESS, win32.LocalFlags, BEYOND)


@holds("G-HANDLE-02")
def the_handle_of_a_block_is_the_block() -> None:
    heap = win32.GetProcessHeap()
    block = win32.HeapAlloc(heap, 0, 10)
    for of in BOTH:
        memory = of.alloc(FIXED, 10)
        assert (of.handle(memory), of.handle(block)) == (memory, block)
        of.free(memory)
    win32.HeapFree(heap, 0, block)


@holds("G-HANDLE-03", "G-HANDLE-04", "L-03")
def the_handle_of_what_is_no_object() -> None:
    expect(0, win32.ERROR_INVALID_HANDLE, win32.GlobalHandle, BEYOND)
    expect(0, win32.ERROR_NOACCESS, win32.LocalHandle, BEYOND)
    for of in BOTH:
        expect(0, win32.ERROR_INVALID_PARAMETER, of.handle, None)
        for handle in bad_handles(of):
            expect(0, win32.ERROR_INVALID_HANDLE, of.handle, handle)


# -- size, free ------------------------------------------------------------------------------------------------------
@holds("G-SIZE-01")
def the_size_of_what_is_no_object_is_0() -> None:
    for of in BOTH:
        for bad in (*bad_handles(of), BEYOND):
            expect(0, win32.ERROR_INVALID_HANDLE, of.size, bad)


@holds("G-FREE-01", "G-FREE-02", "G-FREE-03")
def free_takes_locked_objects_and_null() -> None:
    for of in BOTH:
        expect(0, None, of.free, None)
        handle = of.alloc(MOVEABLE, 10)
        of.lock(handle)
        expect(0, None, of.free, handle)
        expect(0, None, of.free, of.alloc(FIXED, 10))


@holds("G-FREE-04")
def free_returns_what_it_cannot_free() -> None:
    for of in BOTH:
        for handle in bad_handles(of):
            expect(handle, win32.ERROR_INVALID_HANDLE, of.free, handle)
        expect(BEYOND, win32.ERROR_NOACCESS, of.free, BEYOND)


@holds("L-02")
def objects_of_one_family_can_be_freed_by_the_other() -> None:
    for one, other in ((GLOBAL, LOCAL), (LOCAL, GLOBAL)):
        for flags in (FIXED, MOVEABLE):
            expect(0, None, other.free, one.alloc(flags, 10))


# -- resize ----------------------------------------------------------------------------------------------------------
@holds("G-REALLOC-01", "G-REALLOC-07")
def a_resize_of_what_is_no_object_is_null() -> None:
    for of in BOTH:
        win32.SetLastError(SENTINEL)
        assert of.realloc(None, 10, MOVEABLE) == 0
        for handle in bad_handles(of):
            for flags in (0, MOVEABLE, MODIFY):
                expect(0, win32.ERROR_INVALID_HANDLE, of.realloc, handle, 10, flags)
        expect(0, win32.ERROR_NOACCESS, of.realloc, BEYOND, 10, MOVEABLE)


@holds("G-REALLOC-02", "G-REALLOC-22", "G-REALLOC-30")
def modify_ignores_the_size() -> None:
    for of in BOTH:
        for size in (12, 128 * KIB):
            memory = of.alloc(FIXED, size)
            for asked in (0, 5, 10 * size):
                assert of.realloc(memory, asked, MODIFY) == memory
                assert of.size(memory) == size
            of.free(memory)
            handle = of.alloc(MOVEABLE, size)
            data = of.lock(handle)
            for flags in (MODIFY, MODIFY | MOVEABLE, MODIFY | discardable(of), MODIFY | MOVEABLE | discardable(of)):
                for asked in (0, 5, 10 * size):
                    assert of.realloc(handle, asked, flags) == handle
                    assert (of.size(handle), of.flags(handle) & 0xFF) == (size, 1)
            assert of.flags(handle) & discardable(of)
            assert of.lock(handle) == data
            of.free(handle)


@holds("G-REALLOC-03", "G-REALLOC-04", "G-REALLOC-36")
def a_resized_object_keeps_handle_and_content() -> None:
    for of in BOTH:
        for flags in (0, MOVEABLE):
            handle = of.alloc(MOVEABLE, 12)
            write(of.lock(handle), b"hello world!")
            of.unlock(handle)
            for size in (512, 100_000, 20):
                assert of.realloc(handle, size, flags | ZEROINIT) == handle
                assert of.size(handle) == size
                data = of.lock(handle)
                assert read(data, size) == b"hello world!" + bytes(size - 12)
                of.unlock(handle)
            of.free(handle)


@holds("G-REALLOC-05", "G-REALLOC-26", "G-REALLOC-31", "G-REALLOC-08")
def discardable_needs_modify() -> None:
    for of in BOTH:
        for kind in (FIXED, MOVEABLE):
            memory = of.alloc(kind, 12)
            for flags in (discardable(of), discardable(of) | MOVEABLE):
                for size in (512, 10, 0):
                    expect(0, win32.ERROR_INVALID_PARAMETER, of.realloc, memory, size, flags)
                    assert (of.size(memory), of.flags(memory)) == (12, 0)
            of.free(memory)


@holds("G-REALLOC-08")
def the_data_of_a_handle_is_no_object_of_its_own() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE, 12)
        data = of.lock(handle)
        write(data, b"hello world!")
        for flags in (0, MOVEABLE, MODIFY, MODIFY | MOVEABLE):
            expect(0, win32.ERROR_INVALID_HANDLE, of.realloc, data, 10, flags)
        assert (of.handle(data), of.size(handle), read(of.lock(handle), 12)) == (handle, 12, b"hello world!")
        of.free(handle)


@holds("G-REALLOC-06", "G-REALLOC-37")
def a_discarded_object_can_live_again() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE, 12)
        assert of.realloc(handle, 0, MOVEABLE) == handle
        assert (of.flags(handle), of.size(handle)) == (DISCARDED, 0)
        assert of.realloc(handle, 0, MOVEABLE) == handle
        assert of.realloc(handle, 30, MOVEABLE | ZEROINIT) == handle
        assert (of.flags(handle), of.size(handle)) == (0, 30)
        assert read(of.lock(handle), 30) == bytes(30)
        of.free(handle)


@holds("G-REALLOC-20")
def a_fixed_object_without_moveable_is_resized_in_place() -> None:
    for of in BOTH:
        memory = of.alloc(FIXED, 128 * KIB)
        for size in (128 * KIB + 512, 10, 0):
            assert of.realloc(memory, size, 0) == memory
            assert win32.HeapSize(win32.GetProcessHeap(), 0, memory) == size
        of.free(memory)
        small, neighbour = of.alloc(FIXED, 12), of.alloc(FIXED, 12)
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, of.realloc, small, 512, 0)
        assert of.size(small) == 12
        of.free(small)
        of.free(neighbour)


@holds("G-REALLOC-21")
def a_fixed_object_with_moveable_stays_fixed() -> None:
    for of in BOTH:
        memory = of.alloc(FIXED, 12)
        write(memory, b"0123456789ab")
        for size in (512, 13, 10, 0):
            memory = of.realloc(memory, size, MOVEABLE)
            assert memory
            assert memory % 16 == 0
            assert win32.HeapSize(win32.GetProcessHeap(), 0, memory) == size
            assert read(memory, min(size, 10)) == b"0123456789"[:size]
        of.free(memory)


@holds("G-REALLOC-23", "G-REALLOC-25", "G-REALLOC-24", "L-03")
def modify_and_moveable_convert_a_global_object_alone() -> None:
    for size in (12, 128 * KIB):
        for flags in (MODIFY | MOVEABLE, MODIFY | MOVEABLE | win32.GMEM_DISCARDABLE):
            memory = win32.GlobalAlloc(FIXED, size)
            write(memory, b"hello world!")
            handle = win32.GlobalReAlloc(memory, 5, flags)
            assert handle % 16 == 8
            data = win32.GlobalLock(handle)
            assert data != memory
            assert (win32.GlobalSize(handle), read(data, 12)) == (size, b"hello world!")
            assert win32.GlobalFlags(handle) == 1 | flags & win32.GMEM_DISCARDABLE
            win32.GlobalFree(handle)
        memory = win32.LocalAlloc(FIXED, size)
        assert win32.LocalReAlloc(memory, 5, MODIFY | MOVEABLE) == memory
        assert (win32.LocalSize(memory), win32.LocalFlags(memory)) == (size, 0)
        win32.LocalFree(memory)


@holds("G-REALLOC-32", "G-REALLOC-33", "G-REALLOC-34", "G-REALLOC-35")
def a_locked_object_moves_only_if_it_may() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE, 12)
        data = of.lock(handle)
        write(data, b"hello world!")
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, of.realloc, handle, 512, 0)
        assert of.size(handle) == 12
        for flags in (0, MOVEABLE):
            assert of.realloc(handle, 10, flags) == handle
            assert of.lock(handle) == data
            assert not of.unlock(handle) or of.flags(handle) == 1
            win32.SetLastError(SENTINEL)
            assert of.realloc(handle, 0, flags) == 0
            assert (of.size(handle), read(data, 10)) == (10, b"hello worl")
        assert of.realloc(handle, 512, MOVEABLE) == handle
        assert of.flags(handle) == 1
        assert read(of.lock(handle), 10) == b"hello worl"
        of.free(handle)


@holds("G-REALLOC-38")
def an_object_that_may_not_move_is_not_discarded() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE, 12)
        assert of.realloc(handle, 0, 0) == 0
        assert (of.size(handle), of.flags(handle)) == (12, 0)
        of.free(handle)


@holds("G-REALLOC-39")
def a_large_locked_object_grows_in_place() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE, 128 * KIB)
        data = of.lock(handle)
        for number, flags in enumerate((0, MOVEABLE), 1):
            size = 128 * KIB + number * 512
            assert of.realloc(handle, size, flags) == handle
            assert (of.lock(handle), of.size(handle)) == (data, size)
        of.free(handle)


@holds("G-DISCARD-01", "G-DISCARD-02", "G-DISCARD-03")
def discard() -> None:
    for of in BOTH:
        handle = of.alloc(MOVEABLE, 12)
        of.lock(handle)
        assert of.discard(handle) == 0
        assert of.size(handle) == 12
        of.unlock(handle)
        assert of.discard(handle) == handle
        assert of.flags(handle) == DISCARDED
        of.free(handle)
        memory = of.alloc(FIXED, 12)
        for _ in range(2):
            assert of.discard(memory) == memory
        of.free(memory)
