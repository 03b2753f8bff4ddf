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


@pytest.mark.parametrize("size", [0, 1, 500, 4_096, 5_000, 65_536, 3_000_000])
def test_an_address_leads_to_the_block_that_begins_there(session: hc.Session, heap: hc.Heap, size: int) -> None:
    """Of any kind, also to one that another session allocated in a heap that this one has not opened."""
    with hc.connect(session.endpoint, autostart=False) as other:
        theirs = other.create_heap().alloc(size)
        for block in (heap.alloc(size), theirs):
            found = session.block_at(block.address)
            assert (found.size, found.extent, found.handle) == (size, block.extent, block.handle)
            assert found.heap.id == block.heap.id


def test_an_address_at_which_no_block_begins_is_refused(session: hc.Session, heap: hc.Heap) -> None:
    """Within a block, in a slab's head, freed, in the tables, beyond the arena, not even a number."""
    small, run, large = (heap.alloc(size) for size in (100, 8_192, 300_000))
    freed = heap.alloc(64)
    freed.free()
    nowhere = [block.address + step for block in (small, run, large) for step in (1, 16, -8)]
    nowhere += [run.address + 4_096, small.address & -4_096, freed.address, 0, 4_096, session.arena.size - 16]
    for address in nowhere:
        with pytest.raises(errors.NotABlockError, match=f"{address:#x}"):
            session.block_at(address)
    for address in (-16, session.arena.size, 2**70, None, "0", 1.0):
        with pytest.raises(errors.InvalidArgumentError):
            session.block_at(address)  # type: ignore[arg-type]
    heap.destroy()
    with pytest.raises(errors.NotABlockError):
        session.block_at(large.address)
