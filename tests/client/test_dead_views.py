"""No view of a block that is gone: however it went, and whether a view of it was taken before or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import heapd_client as hc
from heapd_client import errors

# What ends a block (heap, the other session's Heap, the block), and the error that tells of it.
ENDS: dict[str, tuple[Callable[[hc.Heap, hc.Heap, hc.Block], object], type[Exception]]] = {
    "freed by its handle": (
        lambda mine, theirs, block: theirs.session.open(block.handle).free(),
        errors.StaleHandleError,
    ),
    "freed by its address": (
        lambda mine, theirs, block: theirs.session.block_at(block.address).free(),
        errors.StaleHandleError,
    ),
    "heap destroyed elsewhere": (lambda mine, theirs, block: theirs.destroy(), errors.HeapDestroyedError),
    "heap destroyed here": (lambda mine, theirs, block: mine.destroy(), errors.HeapDestroyedError),
    "heap closed": (lambda mine, theirs, block: mine.close(), errors.ClosedError),
    "session closed": (lambda mine, theirs, block: mine.session.close(), errors.ClosedError),
    "freed here": (lambda mine, theirs, block: block.free(), errors.ClosedError),
}

BEFORE = ["nothing", "a view", "a view and a handle", "a view of its last life"]
# A first view looks at no word of a block that no handle was made of: who frees it all the same is a vandal.
LEFT = [("freed by its address", "nothing"), ("freed by its address", "a view of its last life")]


@pytest.mark.parametrize("serialize", [True, False], ids=["serialized", "unserialized"])
@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize(
    ("end", "before"), [(end, before) for end in ENDS for before in BEFORE if (end, before) not in LEFT]
)
def test_a_block_that_is_gone_has_no_view(
    session: hc.Session, other: hc.Session, end: str, before: str, size: int, serialize: bool
) -> None:
    """StaleHandleError, HeapDestroyedError or ClosedError, and never somebody else's bytes."""
    heap = session.create_heap(f"{end} {before} {size} {serialize}", serialize=serialize)
    theirs = other.open_heap(heap.name or "")
    heap.free_many(heap.alloc_many(size, 8))
    block = heap.alloc(size)
    if before == "a view of its last life":
        block.view[:1] = b"x"
        for _ in range(20):  # the object comes again
            last = block.address
            block.free()
            del block
            block = heap.alloc(size)
            if block.address == last:
                break
    elif before != "nothing":
        block.view[:1] = b"x"
    if before.endswith("handle"):
        assert block.handle
    call, error = ENDS[end]
    call(heap, theirs, block)
    for _ in range(2):
        with pytest.raises(error):
            block.view  # noqa: B018


def test_a_block_that_is_gone_has_no_array(heap: hc.Heap, other: hc.Session) -> None:
    """What holds for views holds for arrays."""
    pytest.importorskip("numpy")
    block = heap.alloc(64)
    assert block.ndarray(8, "u8").shape == (8,)
    other.open(block.handle).free()
    with pytest.raises(errors.StaleHandleError):
        block.ndarray(8, "u8")


def test_a_view_is_the_same_object_while_its_block_is_there(free_heap: hc.Heap, other: hc.Session) -> None:
    """With a handle made and without, opened elsewhere, and after a trim; released, it is made anew."""
    free_heap.free_many(free_heap.alloc_many(64, 8))
    for size in (64, 100_000):
        block = free_heap.alloc(size)
        view = block.view
        assert block.view is view
        there = other.open(block.handle)
        assert block.view is view
        assert there.view is there.view
        free_heap.trim()
        assert block.view is view
        del view
        block.view.release()
        block.view[:4] = b"abcd"
        assert bytes(there.view[:4]) == b"abcd"
        there.view.release()
        block.view.release()
        block.free()


@pytest.mark.parametrize("sizes", [(100_000, 5_000), (100, 60)])
def test_a_block_resized_elsewhere_has_a_view_of_its_size_now(
    session: hc.Session, heap: hc.Heap, other: hc.Session, sizes: tuple[int, int]
) -> None:
    """Its last pages may be somebody else's by then. While the view of before is in use, there is no other."""
    heap.free_many(heap.alloc_many(sizes[0], 4))
    block = heap.alloc(sizes[0])
    there = other.open(block.handle)
    view = there.view
    view[:4] = b"keep"
    block.realloc(sizes[1], in_place_only=True)
    with pytest.raises(errors.BlockInUseError):
        there.view  # noqa: B018
    del view
    assert there.view.nbytes == there.size == sizes[1]
    assert bytes(there.view[:4]) == b"keep"
    there.realloc(sizes[1] - 1)
    assert block.view.nbytes == block.size == sizes[1] - 1  # its owner, too
    block.free()
