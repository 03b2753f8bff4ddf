"""Handles: they lead to the block while it lives, and to a clear error ever after."""

from __future__ import annotations

import pytest

import heapd_client as hc
from heapd.layout import Handle
from heapd_client import errors


@pytest.mark.parametrize("size", [0, 1, 16, 500, 4_096, 5_000, 65_536, 100_000, 3_000_000])
def test_a_handle_leads_to_its_block(session: hc.Session, heap: hc.Heap, size: int) -> None:
    """Size, place, extent and bytes are those of the block, also through the handle's 40 bytes."""
    block = heap.alloc(size)
    block.view[:] = b"x" * size
    for handle in (block.handle, block.handle.encode()):
        found = session.open(handle)
        assert (found.size, found.address, found.extent) == (size, block.address, block.extent)
        assert found.heap is heap
        assert bytes(found.view) == b"x" * size


def test_a_handle_of_a_freed_block_is_stale(session: hc.Session, heap: hc.Heap) -> None:
    """Freed, freed and used again, or its slab gone: always StaleHandleError."""
    for size in (64, 8_192, 300_000):
        keep, block = heap.alloc(size), heap.alloc(size)
        handle = block.handle
        block.free()
        with pytest.raises(errors.StaleHandleError):
            session.open(handle)
        again = heap.alloc(size)
        with pytest.raises(errors.StaleHandleError):
            session.open(handle)
        again.free()
        keep.free()
        heap.compact()
        with pytest.raises(errors.StaleHandleError):
            session.open(handle)


def test_a_handle_into_a_destroyed_heap_is_stale(session: hc.Session) -> None:
    """The pages are nobody's any more."""
    heap = session.create_heap()
    handle = heap.alloc(100).handle
    heap.destroy()
    with pytest.raises(errors.StaleHandleError):
        session.open(handle)


def test_a_handle_of_another_arena_is_stale(session: hc.Session, heap: hc.Heap) -> None:
    """The instance is part of the handle."""
    handle = heap.alloc(8).handle
    with pytest.raises(errors.StaleHandleError):
        session.open(handle._replace(instance=bytes(16)))


def test_a_forged_handle_is_refused(session: hc.Session, heap: hc.Heap) -> None:
    """Addresses and slots out of range, misplaced or mixed never give a block, and never fault."""
    small, large = heap.alloc(64).handle, heap.alloc(100_000).handle
    size = session.arena.size
    forged = [
        small._replace(address=small.address + 16),
        small._replace(slot=small.slot + 1),
        small._replace(slot=small.slot - 1),
        small._replace(slot=large.slot),
        large._replace(slot=small.slot),
        large._replace(address=large.address + 4096),
        large._replace(slot=large.slot + 1),
        small._replace(slot=0),
        small._replace(slot=size // 8),
        small._replace(slot=size // 8 - 1),
        small._replace(slot=-1),
        small._replace(slot=2**70),
        small._replace(address=size),
        small._replace(address=-64),
        small._replace(generation=small.generation + 1),
        small._replace(generation=-1),
    ]
    for handle in forged:
        with pytest.raises((errors.StaleHandleError, errors.NotABlockError, errors.InvalidArgumentError)):
            session.open(handle)
    for text in (b"", b"x" * 39, b"x" * 41):
        with pytest.raises(errors.InvalidArgumentError):
            session.open(text)
    for junk in (None, 5, "handle", (1, 2, 3, 4), (b"", 0, 0), Handle(b"", 0, 0, "x")):  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgumentError):
            session.open(junk)  # type: ignore[arg-type]
    assert heap.validate() == []


def test_no_slot_of_the_heap_but_block_words_opens(session: hc.Session, heap: hc.Heap) -> None:
    """Every word of a slab is tried as a state word: only the blocks' own lead anywhere."""
    blocks = heap.alloc_many(100, 10)
    handles = {block.handle for block in blocks}
    for block in blocks:
        block.view[:] = b"\xff" * 100
    first = min(block.address for block in blocks) // 4096 * 512
    opened = set()
    for slot in range(first, first + 512):
        word = session.arena.words[slot]
        for block in blocks[:2]:
            handle = Handle(session.instance, slot, block.address, word >> 33)
            try:
                opened.add(session.open(handle).handle)
            except (errors.StaleHandleError, errors.NotABlockError, errors.InvalidArgumentError):
                continue
    assert opened <= handles


def test_opening_touches_no_uncommitted_page(session: hc.Session, heap: hc.Heap) -> None:
    """Handles to pages without memory are refused without giving them some."""
    import os

    handle = heap.alloc(64).handle
    before = os.stat(f"/dev/shm/{session.segment}").st_blocks
    for page in range(handle.slot // 512 + 1, handle.slot // 512 + 400, 7):
        with pytest.raises((errors.StaleHandleError, errors.InvalidArgumentError)):
            session.open(handle._replace(slot=page * 512 + 1, address=page * 4096))
    assert os.stat(f"/dev/shm/{session.segment}").st_blocks == before
