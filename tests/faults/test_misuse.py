"""One misuse a test, one exact diagnosis: through the library where it is refused, by `validate` where it was done
past everybody, with stores into the mapping. The daemon goes on, and a bystander has its blocks and their bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.errors import DoubleFreeError, InvalidArgumentError, NotABlockError, StaleHandleError, WrongHeapError
from heapd.layout import (
    C_FLAGS,
    C_HEAP_ID,
    C_LIVE,
    C_MUTEX,
    F_SERIALIZE,
    F_TAIL_CHECK,
    H_COMMITTED,
    H_INSTANCE,
    H_PAGE_COUNT,
    RUN_WORD,
    SLAB_WORD,
    TAIL,
)
from heapd.units import MIB, PAGE_SIZE
from heapd.wire.messages import HeapCreate, HeapDestroy, HeapFree, HeapFreeMany, HeapResize, HeapValidate, NamePublish
from tests.harness import Daemon, mark_run, unique_name

SIZES = {"slab": 100, "run": 8192, "large run": 2 * MIB}


@pytest.fixture(scope="module")
def bystander() -> Iterator[tuple[Daemon, hc.Heap, list[hc.Block]]]:
    """A daemon, and a session of somebody who has done nothing."""
    mark_run()
    directory = Path(tempfile.mkdtemp(prefix="heapd-", dir="/tmp"))
    daemon = Daemon(directory, unique_name())
    server = daemon.pid
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap()
        blocks = heap.alloc_many([100, 5000, 100_000, 2 * MIB])
        for block in blocks:
            block.view[:] = bytes([block.size % 251]) * block.size
        yield daemon, heap, blocks
        assert daemon.pid == server, "the daemon did not survive"
    daemon.check_clean_end()
    assert "Traceback" not in daemon.log, daemon.log
    shutil.rmtree(directory)


@pytest.fixture
def session(bystander: tuple[Daemon, hc.Heap, list[hc.Block]]) -> Iterator[hc.Session]:
    """The culprit's, without a front end: what it does the daemon hears of. Afterwards the bystander looks."""
    daemon, heap, blocks = bystander
    with hc.connect(daemon.endpoint, autostart=False, front_end=False) as session:
        yield session
    assert [violation for violation in heap.validate() if violation.what != "header"] == []
    for block in blocks:
        assert block.view == bytes([block.size % 251]) * block.size
    heap.alloc(64).free()


@pytest.fixture
def heap(session: hc.Session) -> hc.Heap:
    return session.create_heap()


@pytest.fixture(params=SIZES)
def block(request: pytest.FixtureRequest, heap: hc.Heap) -> hc.Block:
    """A block of each kind, with a neighbour."""
    heap.alloc(SIZES[request.param])
    return heap.alloc(SIZES[request.param])


# -- refused ---------------------------------------------------------------------------------------------------------
def test_a_block_freed_twice_through_one_object(block: hc.Block) -> None:
    """The object knows."""
    block.free()
    with pytest.raises(hc.ClosedError):
        block.free()


def test_a_block_freed_twice_through_two_objects(session: hc.Session, block: hc.Block) -> None:
    """The second is told that it is free already."""
    again = session.open(block.handle)
    block.free()
    with pytest.raises((DoubleFreeError, StaleHandleError)):
        again.free()


def test_a_block_freed_twice_by_request(session: hc.Session, heap: hc.Heap, block: hc.Block) -> None:
    """By its address and generation."""
    request = HeapFree(heap.id, block.address, block.generation)
    session.call(request)
    with pytest.raises((DoubleFreeError, NotABlockError)) as refused:
        session.call(HeapFree(heap.id, block.address, block.generation))
    assert f"{block.address:#x}" in str(refused.value)


def test_a_handle_to_a_block_that_was_freed(session: hc.Session, block: hc.Block) -> None:
    """Stale, at once."""
    handle = block.handle
    block.free()
    with pytest.raises(StaleHandleError):
        session.open(handle)


def test_a_handle_whose_memory_is_another_block_s(session: hc.Session, heap: hc.Heap, block: hc.Block) -> None:
    """Whoever has it now is not touched."""
    handle, size = block.handle, block.size
    block.free()
    again = heap.alloc(size)
    assert again.address == handle.address
    again.view[:3] = b"new"
    with pytest.raises(StaleHandleError):
        session.open(handle)
    with pytest.raises(StaleHandleError) as refused:
        session.call(HeapFree(heap.id, handle.address, handle.generation))
    assert str(handle.generation) in str(refused.value)
    assert bytes(again.view[:3]) == b"new"


def test_a_block_of_another_heap(session: hc.Session, heap: hc.Heap, block: hc.Block) -> None:
    """By the library, and by a request that a broken client sends: named with the heap that it is in."""
    other = session.create_heap("other")
    with pytest.raises(WrongHeapError):
        other.free(block)
    for request in (
        HeapFree(other.id, block.address, block.generation),
        HeapFreeMany(other.id, [block.address, block.generation]),
        HeapResize(other.id, block.address, block.generation, 10),
    ):
        with pytest.raises(WrongHeapError, match=str(heap.id)):
            session.call(request)
    other.destroy()


@pytest.mark.parametrize("offset", [1, 8, 16, 64, PAGE_SIZE])
def test_an_address_inside_a_block(session: hc.Session, heap: hc.Heap, offset: int) -> None:
    """No block begins there; the one around it stays."""
    block = heap.alloc(100_000)
    for request in (
        HeapFree(heap.id, block.address + offset, block.generation),
        HeapResize(heap.id, block.address + offset, block.generation, 10),
        NamePublish(heap.id, "x", block.address + offset, block.generation),
    ):
        with pytest.raises(NotABlockError, match=f"{block.address + offset:#x}"):
            session.call(request)
    assert [v.what for v in heap.validate()] == []
    assert block.size == 100_000


@pytest.mark.parametrize("address", [0, 1, PAGE_SIZE, 1 << 29, 2**62])
def test_an_address_that_is_nobody_s(session: hc.Session, heap: hc.Heap, address: int) -> None:
    """In the tables, in free space, beyond the arena."""
    with pytest.raises(NotABlockError, match="lies in no heap"):
        session.call(HeapFree(heap.id, address, 1))


def test_a_handle_that_is_none(session: hc.Session, block: hc.Block) -> None:
    """Of another arena, with another block's slot or address."""
    handle = block.handle
    foreign = (
        handle._replace(instance=os.urandom(16)),
        handle._replace(slot=handle.slot + 1),
        handle._replace(address=handle.address + 16),
        handle._replace(slot=2**60),
        handle._replace(slot=0),
    )
    for wrong in foreign:
        with pytest.raises((StaleHandleError, InvalidArgumentError, NotABlockError)):
            session.open(wrong)
    assert session.open(handle).size == block.size


def test_a_view_that_outlives_its_block_is_refused_its_free(block: hc.Block) -> None:
    """Freeing it would leave a view of somebody else's bytes."""
    part = block.view[10:20]
    with pytest.raises(hc.BlockInUseError):
        block.free()
    del part
    block.free()


# -- named by validate -----------------------------------------------------------------------------------------------
def found(heap: hc.Heap) -> list[tuple[str, int, int]]:
    """What, where, who."""
    return [(violation.what, violation.address, violation.session) for violation in heap.validate()]


Harm = Callable[[hc.Session, hc.Block], int]


def wipe_word(session: hc.Session, block: hc.Block) -> int:
    return 0


def name_a_stranger(session: hc.Session, block: hc.Block) -> int:
    form = session.arena.shape.word_format(block.slot)
    return form.busy(16_000, block.generation, block.size)


def swell(session: hc.Session, block: hc.Block) -> int:
    form = session.arena.shape.word_format(block.slot)
    return form.busy(session.number, block.generation, block.extent + 1)


@pytest.mark.parametrize("harm", [wipe_word, name_a_stranger, swell])
def test_a_scribbled_state_word(session: hc.Session, heap: hc.Heap, block: hc.Block, harm: Harm) -> None:
    """The block, and the session that it was lent to, whatever the word says."""
    words, before = session.arena.words, session.arena.words[block.slot]
    words[block.slot] = harm(session, block)
    assert found(heap) == [("state-word", block.address, session.number)]
    words[block.slot] = before
    assert found(heap) == []
    block.free()


def test_a_forged_word_of_a_free_block(session: hc.Session, heap: hc.Heap) -> None:
    """A stale store, or a forgery: whom it names is told, and nobody gets the block."""
    kept, block = heap.alloc(100), heap.alloc(100)
    slot, address, generation = block.slot, block.address, block.generation
    block.free()
    session.arena.words[slot] = SLAB_WORD.busy(session.number, generation, 100)
    assert found(heap) == [("state-word", address, session.number)]
    assert [v.what for v in heap.validate(kept)] == []


def test_an_overrun_into_the_head_of_the_next_slab(session: hc.Session, heap: hc.Heap) -> None:
    """Somebody wrote past the end of a run: the slab behind it has lost its head, its blocks' words with it."""
    blocks = [heap.alloc(16) for _ in range(3)]
    words = session.arena.words
    head = blocks[0].slot - 1
    before = [words[head + number] for number in range(4)]
    for number in range(4):
        words[head + number] = 0x2525252525252525
    start = head * 8
    assert found(heap)[0] == ("slab-head", start, 0)
    assert {what for what, _, _ in found(heap)} == {"slab-head", "state-word"}
    assert {address for what, address, _ in found(heap) if what == "state-word"} == {b.address for b in blocks}
    for number in range(4):
        words[head + number] = before[number]
    assert found(heap) == []


def test_an_overrun_in_a_heap_with_tail_checking(session: hc.Session) -> None:
    """One byte past what was asked for, in the padding where it harms nobody yet: the block, and who has it."""
    heap = session.call(HeapCreate("checked", 0, 0, F_SERIALIZE | F_TAIL_CHECK))
    checked = session.open_heap("checked")
    assert checked.id == heap[0]
    blocks = [checked.alloc(size + len(TAIL)) for size in SIZES.values()]
    for block in blocks:
        block.view[-len(TAIL) :] = TAIL
    assert found(checked) == []
    for block in blocks:
        past = block.size - len(TAIL)
        block.view[past + 3] ^= 1
        assert found(checked) == [("overrun", block.address, session.number)]
        assert "3 bytes behind" in checked.validate()[0].detail
        block.view[past + 3] ^= 1
    assert found(checked) == []


def test_a_scribbled_page_word(session: hc.Session, heap: hc.Heap, block: hc.Block) -> None:
    """The page. The daemon goes by its own records: the block is resized and freed as ever."""
    page = block.address // PAGE_SIZE
    session.arena.words[session.arena.shape.page_map // 8 + page] = 2**64 - 1
    assert found(heap) == [("page-map", page * PAGE_SIZE, 0)]
    session.call(HeapResize(heap.id, block.address, block.generation, block.size * 3 // 4))
    session.call(HeapFree(heap.id, block.address, block.generation))
    heap.alloc_many(block.size, 3)
    assert len(found(heap)) <= 1  # a slab's page is described once
    heap.destroy()


def test_a_scribbled_page_directory(session: hc.Session, heap: hc.Heap) -> None:
    """The first page of the 512 that the entry is of."""
    block = heap.alloc(4 * MIB)
    chunk = (block.address // PAGE_SIZE >> 9) + 1
    entry = session.arena.shape.directory // 8 + chunk
    before = session.arena.words[entry]
    session.arena.words[entry] = 5
    assert found(heap) == [("page-map", chunk * 512 * PAGE_SIZE, 0)]
    heap.alloc(4 * MIB).free()
    session.arena.words[entry] = before
    assert found(heap) == []
    block.free()


@pytest.mark.parametrize("field", [C_LIVE, C_HEAP_ID, C_FLAGS])
def test_a_scribbled_control_block(session: hc.Session, heap: hc.Heap, field: int) -> None:
    """The control block's address; others' heaps are not blamed."""
    other = session.create_heap()
    slot = session.arena.shape.control_slot(heap.id & 0xFFFF)
    before = session.arena.words[slot + field]
    session.arena.words[slot + field] = before ^ 0xFF00
    answer = [tuple(fields)[:3] for fields in session.call(HeapValidate(heap.id))]
    assert answer == [("control-block", slot * 8, 0)]
    assert other.validate() == []
    session.arena.words[slot + field] = before


def test_a_scribbled_mutex(session: hc.Session, heap: hc.Heap) -> None:
    """The mutex's address. The daemon never takes one, so its links cannot lead it; the next heap has a sound one."""
    slot = session.arena.shape.control_slot(heap.id & 0xFFFF) + C_MUTEX
    for number in range(8):
        session.arena.words[slot + number] = 0x4141414100000000
    answer = [tuple(fields)[:3] for fields in session.call(HeapValidate(heap.id))]
    assert answer == [("mutex", slot * 8, 0)]
    session.call(HeapDestroy(heap.id))
    (again,) = [new for _ in range(20) if (new := session.create_heap()).id & 0xFFFF == heap.id & 0xFFFF]
    with again.lock(1) as held:
        assert not held.recovered
    assert again.validate() == []


def test_a_scribbled_session_word(session: hc.Session, heap: hc.Heap) -> None:
    """The session that it says is none."""
    slot = session.arena.shape.session_slot(session.number)
    before = session.arena.words[slot]
    session.arena.words[slot] = 0
    assert found(heap) == [("session-word", slot * 8, session.number)]
    session.arena.words[slot] = before
    assert found(heap) == []


@pytest.mark.parametrize("field", [H_PAGE_COUNT, H_INSTANCE, H_COMMITTED])
def test_a_scribbled_header(session: hc.Session, heap: hc.Heap, field: int) -> None:
    """The word of the header; every heap is told, since it is everybody's."""
    before = session.arena.words[field]
    session.arena.words[field] = before ^ 1 << 40
    assert found(heap) == [("header", field * 8, 0)]
    session.arena.words[field] = before
    assert found(heap) == []


def test_a_run_s_word_that_says_a_slab_s(session: hc.Session, heap: hc.Heap) -> None:
    """Formats differ: a session that never was comes out of it, or a size that does not fit."""
    block = heap.alloc(8192)
    session.arena.words[block.slot] = SLAB_WORD.busy(session.number, 3, 100)
    assert found(heap) == [("state-word", block.address, session.number)]
    session.arena.words[block.slot] = RUN_WORD.busy(session.number, block.generation, 8192)
    assert found(heap) == []
