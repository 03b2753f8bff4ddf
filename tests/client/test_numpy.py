"""Arrays over blocks: no copy, and as good as a view."""

from __future__ import annotations

import gc
import sys

import pytest

import heapd_client as hc
from heapd_client import errors

np = pytest.importorskip("numpy")


def test_an_array_is_the_block(heap: hc.Heap) -> None:
    """What is written to the array is in the block, and the other way round; it is 64-byte aligned."""
    block = heap.alloc(800)
    array = block.ndarray((10, 10), "f8")
    array[3, 4] = 2.5
    assert block.view.cast("d")[34] == 2.5
    assert array.ctypes.data % 64 == 0
    assert array.flags.writeable


def test_an_array_counts_as_a_view(heap: hc.Heap) -> None:
    """Neither the array nor a slice of it may outlive the block."""
    block = heap.alloc(64)
    array = block.ndarray(8, "u8")
    part = array[2:]
    with pytest.raises(errors.BlockInUseError):
        block.free()
    del array
    with pytest.raises(errors.BlockInUseError):
        block.free()
    del part
    block.free()


def test_an_array_made_by_hand_counts_as_a_view(heap: hc.Heap) -> None:
    """numpy.ndarray(buffer=view) keeps no buffer open; it is found all the same."""
    block = heap.alloc(64)
    array = np.ndarray(8, "u8", buffer=block.view)
    with pytest.raises(errors.BlockInUseError):
        block.free()
    del array
    block.free()


def test_an_array_that_does_not_fit_is_refused(heap: hc.Heap) -> None:
    """Too many elements, a negative length, Python objects."""
    with heap.alloc(64) as block:
        for shape, kind in ((9, "u8"), ((2, 33), "u1"), (-1, "u1"), ((-2, -2), "u1"), (1, "O")):
            with pytest.raises(errors.InvalidArgumentError):
                block.ndarray(shape, kind)


def test_a_type_may_be_an_array_itself(heap: hc.Heap) -> None:
    """Its lengths come after those of the shape, as everywhere in numpy; so does a type of several fields."""
    with heap.alloc(64) as block:
        assert block.ndarray(2, ("i4", 3)).shape == (2, 3)
        assert block.ndarray((2, 2), "i4,f8")["f1"].shape == (2, 2)


def test_an_empty_array_is_possible(heap: hc.Heap) -> None:
    """A shape with a zero in it takes no bytes."""
    with heap.alloc(0) as block:
        assert block.ndarray((3, 0), "f4").shape == (3, 0)


def test_an_array_outlives_its_session(shared_daemon) -> None:  # type: ignore[no-untyped-def]
    """The mapping stays while an array refers to it, whatever else is gone."""
    session = hc.connect(shared_daemon.endpoint, autostart=False)
    array = session.create_heap().alloc(80).ndarray(10, "u8")
    array[:] = range(10)
    session.close()
    del session
    gc.collect()
    array += 1
    assert len(array) == 10


def test_without_numpy_the_error_says_what_to_install(heap: hc.Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    """MissingExtraError names the extra."""
    monkeypatch.setitem(sys.modules, "numpy", None)
    with heap.alloc(8) as block, pytest.raises(errors.MissingExtraError, match=r"heapd\[numpy\]"):
        block.ndarray(1, "u8")
