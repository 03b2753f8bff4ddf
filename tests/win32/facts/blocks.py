"""HeapAlloc, HeapReAlloc, HeapSize, HeapFree."""

from __future__ import annotations

from itertools import pairwise

from heapd_client import win32
from tests.win32.facts import holds
from tests.win32.tools import (
    BEYOND,
    KIB,
    MIB,
    NO_BLOCK,
    Elsewhere,
    busy,
    expect,
    new_heap,
    raised_by,
    raw,
    read,
    summary,
    walk,
    write,
)

SIZES = (0, 1, 12, 64, 100, 4_096, 5_000, 65_536, 100_000, 2 * MIB)
ZERO = win32.HEAP_ZERO_MEMORY
IN_PLACE = win32.HEAP_REALLOC_IN_PLACE_ONLY


@holds("K-01", "H-ALLOC-06")
def blocks_are_16_byte_aligned_and_no_more() -> None:
    with new_heap() as heap:
        blocks = [win32.HeapAlloc(heap, 0, size) for size in (*SIZES, *[16] * 8)]
        assert all(block % 16 == 0 for block in blocks)
        assert any(block & 16 for block in blocks)


@holds("H-ALLOC-01", "H-ALLOC-02", "H-VALID-07")
def a_failing_alloc_is_null_sets_8_and_leaves_the_heap_valid() -> None:
    with new_heap(maximum=MIB) as heap:
        block = win32.HeapAlloc(heap, 0, 100)
        for size in (2 * MIB, 1 << 40, -1, -8):
            expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, size)
            expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapReAlloc, heap, 0, block, size)
            assert win32.HeapValidate(heap, 0, None)
        assert busy(heap) == [(block, 100)]


@holds("H-ALLOC-04")
def blocks_of_0_bytes_are_real() -> None:
    with new_heap() as heap:
        one, two = (win32.HeapAlloc(heap, 0, 0) for _ in range(2))
        assert one
        assert two
        assert one != two
        assert [win32.HeapSize(heap, 0, block) for block in (one, two)] == [0, 0]
        assert sorted(busy(heap)) == sorted([(one, 0), (two, 0)])
        assert win32.HeapFree(heap, 0, one)
        assert busy(heap) == [(two, 0)]


@holds("H-ALLOC-05")
def the_largest_size_is_refused() -> None:
    with new_heap() as heap:
        for size in (win32.SIZE_T_MAX, -1, win32.SIZE_T_MAX - 8):
            expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, size)


@holds("H-ALLOC-08")
def zero_memory_zeroes_fresh_and_reused_blocks() -> None:
    with new_heap() as heap:
        for size in SIZES:
            for _ in range(3):
                block = win32.HeapAlloc(heap, ZERO, size)
                assert read(block, size) == bytes(size)
                write(block, b"\xff" * size)
                win32.HeapFree(heap, 0, block)


@holds("H-ALLOC-09")
def a_fresh_big_block_reads_as_zero() -> None:
    with new_heap() as heap:
        assert read(win32.HeapAlloc(heap, 0, 3 * MIB), 3 * MIB) == bytes(3 * MIB)


@holds("H-ALLOC-14", "H-LOCK-04", "H-ALLOC-15")
def no_serialize_on_a_call_spares_it_the_lock() -> None:
    with new_heap() as heap:
        block, flag = win32.HeapAlloc(heap, 0, 100), win32.HEAP_NO_SERIALIZE
        assert win32.HeapLock(heap)
        new = Elsewhere(win32.HeapAlloc, heap, flag | ZERO, 50).get()
        assert read(new, 50) == bytes(50)
        assert Elsewhere(win32.HeapReAlloc, heap, flag, block, 120).get()
        assert Elsewhere(win32.HeapFree, heap, flag, new).get()
        assert Elsewhere(win32.HeapValidate, heap, flag, None).get()
        waiting = Elsewhere(win32.HeapAlloc, heap, 0, 50)
        assert waiting.is_waiting()
        assert win32.HeapUnlock(heap)
        assert waiting.get()


@holds("H-ALLOC-16", "H-SIZE-01", "H-REALLOC-09")
def the_size_is_what_was_asked_for() -> None:
    with new_heap() as heap:
        for size in (*range(70), *SIZES):
            block = win32.HeapAlloc(heap, 0, size)
            assert win32.HeapSize(heap, 0, block) == size
            for new in (size // 2, size + 1, 3 * size):
                block = win32.HeapReAlloc(heap, 0, block, new)
                assert win32.HeapSize(heap, 0, block) == new


# -- resize ----------------------------------------------------------------------------------------------------------
@holds("H-REALLOC-01", "H-REALLOC-12")
def content_stays_whether_a_block_moves_or_not() -> None:
    text = bytes(range(256)) * 8 * KIB
    with new_heap() as heap:
        block, size = win32.HeapAlloc(heap, ZERO, 100), 100
        write(block, text[:100])
        kept = 100
        for new in (50, 60, 5_000, 100_000, 2 * MIB, 1_500_000, 300_000, 10, 2 * MIB):
            block = win32.HeapReAlloc(heap, ZERO, block, new)
            kept = min(kept, new)
            assert read(block, new) == text[:kept] + bytes(new - kept), (size, new)
            size = new


@holds("H-REALLOC-02")
def a_failing_resize_leaves_the_block_as_it_was() -> None:
    with new_heap(maximum=MIB) as heap:
        block = win32.HeapAlloc(heap, 0, 100)
        write(block, b"x" * 100)
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapReAlloc, heap, 0, block, 2 * MIB)
        assert (read(block, 100), win32.HeapSize(heap, 0, block)) == (b"x" * 100, 100)
        assert win32.HeapFree(heap, 0, block)


@holds("H-REALLOC-03", "H-REALLOC-04")
def zero_memory_zeroes_beyond_the_size_asked_for() -> None:
    with new_heap() as heap:
        for size, new in ((10, 16), (10, 1_000), (5_000, 5_100), (100_000, 101_000), (2 * MIB - 50, 2 * MIB)):
            block = win32.HeapAlloc(heap, 0, size + 6)
            write(block, b"x" * (size + 6))
            block = win32.HeapReAlloc(heap, 0, block, size)
            block = win32.HeapReAlloc(heap, ZERO, block, new)
            assert read(block, new) == b"x" * size + bytes(new - size)


@holds("H-REALLOC-05")
def in_place_only_never_moves() -> None:
    with new_heap() as heap:
        block, _ = win32.HeapAlloc(heap, 0, 64), win32.HeapAlloc(heap, 0, 64)
        write(block, b"x" * 64)
        expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapReAlloc, heap, IN_PLACE, block, 5_000)
        assert (read(block, 64), win32.HeapSize(heap, 0, block)) == (b"x" * 64, 64)
        assert win32.HeapReAlloc(heap, IN_PLACE, block, 40) == block


@holds("H-REALLOC-06")
def null_is_not_allocated() -> None:
    with new_heap() as heap:
        for nothing in (None, 0):
            expect(0, win32.NO_ERROR, win32.HeapReAlloc, heap, 0, nothing, 10)


@holds("H-REALLOC-07")
def a_resize_to_0_keeps_the_block() -> None:
    with new_heap() as heap:
        for size in SIZES:
            block = win32.HeapAlloc(heap, 0, size)
            assert win32.HeapReAlloc(heap, 0, block, 0) == block
            assert win32.HeapSize(heap, 0, block) == 0
            assert win32.HeapFree(heap, 0, block)


@holds("H-REALLOC-08")
def a_resize_to_the_largest_sizes_is_refused() -> None:
    with new_heap() as heap:
        block = win32.HeapAlloc(heap, 0, 100)
        for size in (-1, -8):
            expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapReAlloc, heap, 0, block, size)
            assert win32.HeapValidate(heap, 0, block)


@holds("H-REALLOC-10")
def what_was_given_up_can_be_had_again_in_place() -> None:
    with new_heap() as heap:
        block = win32.HeapAlloc(heap, 0, 768 * KIB)
        for size in (384 * KIB, 512 * KIB):
            assert win32.HeapReAlloc(heap, IN_PLACE, block, size) == block
    with new_heap(maximum=2 * MIB) as heap:
        block = win32.HeapAlloc(heap, 0, 512 * KIB)
        for size in (384 * KIB, 512 * KIB):
            assert win32.HeapReAlloc(heap, IN_PLACE, block, size) == block


@holds("H-REALLOC-15", "H-FREE-05", "H-VALID-05", "S-09")
def beyond_the_arena_is_no_access() -> None:
    with new_heap() as heap:
        for address in (BEYOND, -16, win32.SIZE_T_MAX):
            expect(0, win32.ERROR_NOACCESS, win32.HeapReAlloc, heap, 0, address, 10)
            expect(False, win32.ERROR_NOACCESS, win32.HeapFree, heap, 0, address)
            expect(False, None, win32.HeapValidate, heap, 0, address)


@holds("H-REALLOC-16", "H-FREE-06", "H-VALID-03", "H-VALID-04")
def what_is_no_block_fails_and_keeps_the_last_error() -> None:
    with new_heap() as heap:
        block, run = win32.HeapAlloc(heap, 0, 100), win32.HeapAlloc(heap, 0, 100_000)
        for address in (NO_BLOCK, block + 1, block + 16, block - 8, run + 4_096, run + 16):
            expect(0, None, win32.HeapReAlloc, heap, 0, address, 10)
            expect(False, None, win32.HeapFree, heap, 0, address)
            expect(False, None, win32.HeapValidate, heap, 0, address)
        assert sorted(size for _, size in busy(heap)) == [100, 100_000]


@holds("H-REALLOC-18")
def a_failing_resize_raises_if_asked_to() -> None:
    with new_heap() as heap:
        block, flag = win32.HeapAlloc(heap, 0, 100), win32.HEAP_GENERATE_EXCEPTIONS
        assert raised_by(win32.HeapReAlloc, heap, flag, block, -1) == win32.STATUS_NO_MEMORY
        assert raised_by(win32.HeapReAlloc, heap, flag, BEYOND, 10) == win32.STATUS_ACCESS_VIOLATION
        assert raised_by(win32.HeapAlloc, heap, flag, -1) == win32.STATUS_NO_MEMORY


# -- size, free ------------------------------------------------------------------------------------------------------
@holds("H-SIZE-02")
def the_size_of_what_is_no_block_is_minus_1() -> None:
    with new_heap() as heap, new_heap() as other:
        block = win32.HeapAlloc(heap, 0, 10)
        for where, address in ((heap, NO_BLOCK), (heap, 0), (heap, None), (other, block), (heap, block + 1)):
            assert win32.HeapSize(where, 0, address) == win32.SIZE_T_MAX
        expect(win32.SIZE_T_MAX, win32.ERROR_INVALID_PARAMETER, win32.HeapSize, heap, 0, NO_BLOCK)


@holds("H-SIZE-03")
def a_block_of_another_heap_is_none() -> None:
    with new_heap() as heap, new_heap() as other:
        block = win32.HeapAlloc(other, 0, 10)
        assert win32.HeapSize(heap, 0, block) == win32.SIZE_T_MAX
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapFree, heap, 0, block)
        assert win32.HeapFree(other, 0, block)


@holds("H-FREE-01", "H-FREE-04", "H-VALID-02")
def a_block_is_freed_once() -> None:
    with new_heap() as heap:
        for size in SIZES:
            keep, block = win32.HeapAlloc(heap, 0, size), win32.HeapAlloc(heap, 0, size)
            assert win32.HeapValidate(heap, 0, block)
            expect(True, None, win32.HeapFree, heap, 0, block)
            expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapFree, heap, 0, block)
            expect(False, None, win32.HeapValidate, heap, 0, block)
            assert win32.HeapFree(heap, 0, keep)


@holds("H-FREE-02", "H-FREE-03")
def freeing_null_succeeds() -> None:
    with new_heap() as heap:
        for where, nothing in ((heap, None), (heap, 0), (None, None), (0, 0)):
            expect(True, None, win32.HeapFree, where, 0, nothing)


@holds("H-FREE-07", "B-08", "H-COMPACT-03")
def neighbours_that_are_free_are_one() -> None:
    with new_heap() as heap:
        blocks = [win32.HeapAlloc(heap, 0, 100) for _ in range(5)]
        assert all(a < b for a, b in pairwise(blocks))
        before = len(walk(heap))
        for block in blocks[1:4]:
            win32.HeapFree(heap, 0, block)
        (hole,) = [entry for entry in walk(heap) if entry.lpData == blocks[1]]
        assert (hole.wFlags, hole.cbData) == (0, blocks[4] - blocks[1])
        assert len(walk(heap)) == before - 2


@holds("H-FREE-08", "H-WALK-18", "H-ALLOC-11")
def a_big_block_comes_and_goes_without_a_trace() -> None:
    with new_heap() as heap:
        win32.HeapAlloc(heap, 0, 100)
        before, sums = raw(walk(heap)), bytes(summary(heap))
        block = win32.HeapAlloc(heap, 0, 3 * MIB)
        assert raw(walk(heap))[:-1] == before
        win32.HeapFree(heap, 0, block)
        assert bytes(summary(heap)) == sums  # before any walk has given back what is cached
        assert raw(walk(heap)) == before
