"""Blocks: bytes in place, views that cannot dangle, resize, free."""

from __future__ import annotations

import ctypes

import pytest

import heapd_client as hc
from heapd_client import errors
from tests.client.tools import count_requests


def test_a_view_has_exactly_the_requested_size(heap: hc.Heap) -> None:
    """The view of a block is as long as was asked for, whatever the block occupies."""
    for size in (1, 15, 16, 17, 100, 4096, 65_536, 65_537, 1_000_001):
        with heap.alloc(size) as block:
            assert (block.size, block.view.nbytes, block.view.format) == (size, size, "B")
            assert block.extent >= size


def test_an_empty_block_is_a_real_block(heap: hc.Heap) -> None:
    """alloc(0) gives a block with an address and a handle of its own, which frees like any other."""
    one, other = heap.alloc(0), heap.alloc(0)
    assert one.view.nbytes == 0
    assert one.address != other.address
    heap.free_many([one, other])
    assert heap.statistics().busy_blocks == 0


def test_a_view_is_the_same_object_each_time(heap: hc.Heap) -> None:
    """Taking the view again makes no second one."""
    with heap.alloc(10) as block:
        assert block.view is block.view


def test_a_view_released_by_its_user_is_made_anew(heap: hc.Heap) -> None:
    """`with block.view as view` may be written more than once."""
    block = heap.alloc(4)
    with block.view as view:
        view[:] = b"abcd"
    assert bytes(block.view) == b"abcd"
    block.free()


@pytest.mark.parametrize(
    "derive",
    [
        lambda block: block.view,
        lambda block: block.view[1:],
        lambda block: block.view.cast("H"),
        lambda block: memoryview(block.view),
        lambda block: (ctypes.c_char * 4).from_buffer(block.view),
    ],
    ids=["view", "slice", "cast", "copy", "ctypes"],
)
def test_free_with_a_live_view_is_refused(heap: hc.Heap, derive) -> None:  # type: ignore[no-untyped-def]
    """While anything can reach the block's bytes free raises, and the block stays whole."""
    block = heap.alloc(64)
    block.view[:4] = b"keep"
    view = derive(block)
    with pytest.raises(errors.BlockInUseError):
        block.free()
    with pytest.raises(errors.BlockInUseError):
        block.realloc(128)
    assert bytes(block.view[:4]) == b"keep"
    assert (block.size, block.is_free) == (64, False)
    del view
    block.free()


def test_free_many_with_a_live_view_frees_none(heap: hc.Heap) -> None:
    """One block in use keeps the whole list."""
    blocks = heap.alloc_many(32, 3)
    view = blocks[1].view[:1]
    with pytest.raises(errors.BlockInUseError):
        heap.free_many(blocks)
    assert heap.statistics().busy_blocks == 3
    del view
    heap.free_many(blocks)


def test_leaving_with_frees_and_releases_the_own_view(heap: hc.Heap) -> None:
    """`with block` may keep its view in a variable, as `with open()` may its file."""
    with heap.alloc(8) as block:
        view = block.view
    assert block.is_free
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_leaving_with_refuses_while_a_derived_view_lives(heap: hc.Heap) -> None:
    """A slice that outlives the `with` is an error, and the block is still there."""
    block = heap.alloc(8)
    with pytest.raises(errors.BlockInUseError), block:
        part = block.view[2:]
    assert not block.is_free
    del part
    block.free()


def test_leaving_with_does_not_mask_an_exception(heap: hc.Heap) -> None:
    """What the body raised gets out; that the block could not be freed is a note of it."""
    block = heap.alloc(8)
    kept = []

    def work() -> None:
        with block:
            kept.append(block.view[2:])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        work()
    assert "was not freed" in caught.value.__notes__[0]
    kept.clear()
    block.free()


def test_a_block_freed_inside_its_with_is_left_alone(heap: hc.Heap) -> None:
    """`with` frees what is still to be freed."""
    with heap.alloc(8) as block:
        block.free()
    assert block.is_free


def test_a_freed_block_refuses_everything(heap: hc.Heap) -> None:
    """Every method of a block freed through this object says so."""
    block = heap.alloc(8)
    block.free()
    for use in (lambda: block.view, block.free, lambda: block.realloc(9), block.__enter__, lambda: block.ndarray(1)):
        with pytest.raises(errors.ClosedError):
            use()


def test_a_second_object_cannot_free_again(session: hc.Session, heap: hc.Heap) -> None:
    """A block freed through one object is not freed again through another."""
    block, other = heap.alloc(8), heap.alloc(8)
    twin = session.open(block.handle)
    block.free()
    with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
        twin.free()
    other.free()  # the slab goes with its last block
    with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
        twin.free()


def test_zeroed_blocks_are_zero_on_dirty_memory(heap: hc.Heap) -> None:
    """zero=True reads as zero, also where a freed block left its bytes."""
    for size in (40, 5_000, 300_000):
        keep = heap.alloc(size)
        dirty = heap.alloc(size)
        dirty.view[:] = b"\xff" * size
        dirty.free()
        with heap.alloc(size, zero=True) as block:
            assert not any(block.view)
        keep.free()


def test_zeroed_batches_are_zero_on_dirty_memory(heap: hc.Heap) -> None:
    """alloc_many(zero=True) zeroes each block."""
    for block in (dirty := heap.alloc_many(48, 100)):
        block.view[:] = b"\xff" * 48
    heap.free_many(dirty[1:])
    assert not any(any(block.view) for block in heap.alloc_many([48] * 99, zero=True))


@pytest.mark.parametrize(
    ("old", "new"), [(100, 120), (100, 50), (100, 5_000), (5_000, 200_000), (200_000, 100), (9, 0)]
)
def test_realloc_keeps_the_common_bytes(session: hc.Session, heap: hc.Heap, old: int, new: int) -> None:
    """The first min(old, new) bytes survive; the object stays the block; a handle to where it was is stale."""
    keep = heap.alloc(old)  # so that the block has neighbours
    block = heap.alloc(old)
    heap.alloc(old)
    pattern = bytes(index * 7 % 251 for index in range(old))
    block.view[:] = pattern
    before = block.handle
    assert block.realloc(new) is block
    kept = min(old, new)
    assert bytes(block.view[:kept]) == pattern[:kept]
    assert (block.size, block.view.nbytes) == (new, new)
    assert session.open(block.handle).size == new
    assert session.open(block.handle).extent == block.extent
    if block.address == before.address:
        assert session.open(before).size == new
    else:
        with pytest.raises(errors.StaleHandleError):
            session.open(before)
    assert heap.validate() == []
    keep.free()


def test_realloc_zeroes_the_tail(heap: hc.Heap) -> None:
    """zero=True zeroes what lies beyond the old size, in place or moved."""
    for old, new in ((20, 30), (20, 4_000), (70_000, 300_000)):
        keep, block = heap.alloc(new), heap.alloc(new)
        block.view[:] = b"\xff" * new
        block.realloc(old)
        block.realloc(new, zero=True)
        assert bytes(block.view[:old]) == b"\xff" * old
        assert not any(block.view[old:])
        block.free()
        keep.free()


def test_realloc_in_place_only_fails_rather_than_move(heap: hc.Heap) -> None:
    """The block is as it was when there is no room where it is."""
    block = heap.alloc(100)
    block.view[:3] = b"abc"
    handle = block.handle
    with pytest.raises(errors.CannotResizeInPlaceError):
        block.realloc(1 << 20, in_place_only=True)
    assert (block.handle, bytes(block.view[:3])) == (handle, b"abc")


def test_realloc_of_a_small_block_asks_nobody(session: hc.Session, heap: hc.Heap) -> None:
    """Smaller, larger, in place or moved: once each size has blocks cached, no request is sent."""
    for size in (64, 200, 1_000):
        heap.free_many(heap.alloc_many(size, 10))
    block = heap.alloc(64)
    requests = count_requests(session)
    for size in (60, 200, 1_000, 990, 64, 1_000, 200, 64):
        block.realloc(size)
        assert block.size == size
    assert not requests
    block.free()
    assert heap.validate() == []


def test_realloc_that_finds_no_memory_leaves_the_block(session: hc.Session) -> None:
    """A heap that is full keeps the old block, bytes and all."""
    heap = session.create_heap(maximum=1 << 20)
    block = heap.alloc(1000)
    block.view[:3] = b"abc"
    with pytest.raises(errors.BlockTooLargeError):
        block.realloc(64 << 20)
    rest = heap.alloc(700_000)
    with pytest.raises(errors.HeapFullError):
        block.realloc(600_000)
    rest.free()
    assert (block.size, bytes(block.view[:3])) == (1000, b"abc")
    assert heap.validate() == []
    assert heap.statistics().busy_blocks == 1


def test_payloads_are_aligned(heap: hc.Heap) -> None:
    """16 bytes always, 64 from 64 B up, a page for multiples of it."""
    for size in (1, 16, 63, 64, 100, 1000, 4_096, 8_192, 70_000):
        block = heap.alloc(size)
        assert block.address % (4096 if size % 4096 == 0 else 64 if size >= 64 else 16) == 0


def test_two_blocks_do_not_share_bytes(heap: hc.Heap) -> None:
    """What is written to one block shows in no other."""
    blocks = heap.alloc_many(list(range(1, 200)))
    for number, block in enumerate(blocks):
        block.view[:] = bytes([number]) * block.size
    for number, block in enumerate(blocks):
        assert bytes(block.view) == bytes([number]) * block.size
    heap.free_many(blocks)


def test_a_refused_free_can_be_repeated(session: hc.Session, heap: hc.Heap) -> None:
    """A block freed from elsewhere stays an error, not a crash, and its object stays usable for questions."""
    block = heap.alloc(8)
    heap.alloc(8)
    session.open(block.handle).free()
    for _ in range(2):
        with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
            block.free()
    assert not block.is_free
