"""What clients scribble over the arena's tables is a finding of validate, and never an exception, a wrong answer about
others, or a page committed unasked.

Payloads, state words, slab heads, page map, page directory, header and control blocks are all writable by every client.
A heap's mutex is let alone here: the daemon only ever asks who holds it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from heapd.arena import Arena
from heapd.errors import HeapdError
from heapd.layout import (
    C_FLAGS,
    C_HEAP_ID,
    C_LIVE,
    C_MUTEX,
    C_WAITED_NS,
    CONTROL_SIZE,
    MAPPED,
    RUN_WORD,
    SLAB_WORD,
    WordFormat,
)
from heapd.manager import HeapManager
from heapd.records import Grant, HeapInfo
from heapd.units import MIB, PAGE_SHIFT, PAGE_SIZE
from heapd.wire import messages as m
from tests.arenas import finish, private_arena
from tests.manager.clients import Client

SCRIBBLES = [0, 1, 2**63, 2**64 - 1, MAPPED, 2**17 - 1, 2**36 - 1]


@pytest.fixture
def manager() -> Iterator[HeapManager]:
    """A manager whose tables need not be sound at the end."""
    with private_arena() as arena:
        yield HeapManager(arena)


@pytest.fixture
def heap(client: Client, other: Client) -> HeapInfo:
    """A heap with blocks of each kind."""
    heap = client.create("scribbled")
    other.open("scribbled")
    client.alloc_many(heap, [16, 64, 64, 700, 5000, 8192, 8192, 70_000, 2 * MIB, 2 * MIB] * 3)
    return heap


def findings(client: Client, heap: HeapInfo) -> set[str]:
    return {violation.what for violation in client.validate(heap)}


# -- control blocks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("word", [0, 2, 2**64 - 1, 2**64 - 2, 2**63])
def test_a_scribbled_live_word(client: Client, heap: HeapInfo, word: int) -> None:
    """Found whatever it says; everything that moves the epoch goes on, and sets it right."""
    arena = client.manager.arena
    slot = arena.shape.control_slot(heap.heap_id & 0xFFFF) + C_LIVE
    arena.words[slot] = word
    assert findings(client, heap) == {"control-block"}
    client.open("scribbled")
    client.ask(m.ArenaReclaim())
    client.ask(m.HeapCompact(heap.heap_id))
    arena.words[slot] = word
    client.destroy(heap)
    arena.words[slot] = word
    again = client.create("scribbled")
    assert arena.words[slot] & 1 == 1
    assert client.validate(again) == []


@pytest.mark.parametrize("field", [C_HEAP_ID, C_FLAGS])
def test_a_scribbled_id_or_flags(client: Client, heap: HeapInfo, field: int) -> None:
    """Found; the daemon goes by its own records."""
    arena = client.manager.arena
    arena.words[arena.shape.control_slot(heap.heap_id & 0xFFFF) + field] = 2**64 - 1
    assert findings(client, heap) == {"control-block"}
    assert client.open("scribbled").flags == heap.flags
    client.destroy(heap)


def test_scribbled_lock_counters_are_told_as_they_are(client: Client, heap: HeapInfo) -> None:
    """Numbers for people to read; nothing depends on them."""
    arena = client.manager.arena
    arena.words[arena.shape.control_slot(heap.heap_id & 0xFFFF) + C_WAITED_NS] = 2**64 - 1
    assert client.statistics(heap).waited_ns == 2**64 - 1
    assert client.validate(heap) == []


# -- state words -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("word", SCRIBBLES)
def test_every_operation_on_a_block_whose_word_was_scribbled(client: Client, heap: HeapInfo, word: int) -> None:
    """An answer or an error of heapd's own; the blocks beside it are served as ever."""
    words = client.manager.arena.words
    for size in (64, 8192, 2 * MIB):
        block, neighbour = client.alloc(heap, size), client.alloc(heap, size)
        words[block.slot] = word
        for request in block_requests(heap, block):
            attempt(client, request)
        attempt(client, m.HeapValidate(heap.heap_id, block.address))
        client.free(heap, neighbour)
    attempt(client, m.HeapStatisticsGet(heap.heap_id))
    client.alloc_many(heap, [64, 8192, 2 * MIB])
    client.end()


@pytest.mark.parametrize("word", SCRIBBLES)
def test_a_free_block_s_scribbled_word_costs_nobody_a_wrong_block(client: Client, heap: HeapInfo, word: int) -> None:
    """The next block there has a generation that fits its word, and the old handle is refused."""
    words = client.manager.arena.words
    for size in (64, 8192, 2 * MIB):
        client.alloc(heap, size)
        block = client.alloc(heap, size)
        client.free(heap, block)
        words[block.slot] = word
        again = client.alloc(heap, size)
        form = client.manager.arena.shape.word_format(again.slot)
        assert form.generation(words[again.slot]) == again.generation
        assert 0 < again.generation <= form.generation_mask
        client.free(heap, again)


def test_a_forged_word_does_not_free_another_s_block_when_the_forger_ends(client: Client, other: Client) -> None:
    """What a dead session cached or owned is told by words: a lie about a free block gives nobody anything."""
    heap = client.create_freeing_orphans("forged")
    other.open("forged")
    client.alloc(heap, 64)
    free = client.alloc(heap, 64)
    client.free(heap, free)
    client.manager.arena.words[free.slot] = SLAB_WORD.busy(other.number, 5, 64)
    other.end()
    assert client.statistics(heap).busy_blocks == 1
    assert findings(client, heap) == {"state-word"}


@pytest.mark.parametrize("form", [SLAB_WORD, RUN_WORD], ids=["slab", "run"])
def test_a_block_said_to_be_of_a_session_that_never_was_does_not_keep_a_number(
    client: Client, other: Client, form: WordFormat
) -> None:
    """The number in the word is no session's: sessions come and go as ever."""
    heap = client.create("x")
    other.open("x")
    block = client.alloc(heap, 64 if form is SLAB_WORD else 8192)
    client.manager.arena.words[block.slot] = form.busy(9999, block.generation, 10)
    other.end()
    assert findings(client, heap) == {"state-word"}
    client.free(heap, block)


# -- everything at once ------------------------------------------------------------------------------------------------
def block_requests(heap: HeapInfo, block: Grant) -> list[m.Request]:
    """Every operation on one block, by its handle."""
    at = block.address, block.generation
    return [
        m.HeapResize(heap.heap_id, *at, 10, True),
        m.HeapResize(heap.heap_id, *at, 3 * MIB, False),
        m.NamePublish(heap.heap_id, "name", *at),
        m.NameLookup(heap.heap_id, "name"),
        m.NameList(heap.heap_id),
        m.HeapGiveBack(heap.heap_id, [*at]),
        m.HeapFree(heap.heap_id, *at),
        m.HeapFreeMany(heap.heap_id, [*at]),
    ]


def heap_requests(heap: HeapInfo) -> list[m.Request]:
    """Every operation on a heap as a whole, and of the daemon."""
    return [
        m.HeapValidate(heap.heap_id),
        m.HeapWalk(heap.heap_id, 0, 4096),
        m.HeapStatisticsGet(heap.heap_id),
        m.HeapCompact(heap.heap_id),
        m.HeapList(),
        m.HeapOpen("scribbled"),
        m.HeapOpenId(heap.heap_id),
        m.ArenaStatisticsGet(),
        m.ArenaReclaim(),
        m.SessionList(),
        m.HeapAllocMany(heap.heap_id, [16, 64, 700, 5000, 8192, 70_000, 2 * MIB]),
        m.HeapLease(heap.heap_id, 64, 20),
        m.HeapGiveBack(heap.heap_id, [], 1),
        m.HeapCreate(None, 0, 0, 1),
        m.HeapDefault(),
    ]


def attempt(client: Client, request: m.Request) -> None:
    """Only an answer or a HeapdError may come out."""
    try:
        client.ask(request)
    except HeapdError:
        pass
    except Exception as error:
        pytest.fail(f"{request!r} raised {error!r}")


def scribble_slots(arena: Arena, heaps: list[HeapInfo]) -> list[int]:
    """Slots of every committed word that the daemon keeps in the arena, but for mutexes and its own header's magic."""
    shape = arena.shape
    slots = list(range(64))
    for heap in heaps:
        control = shape.control_slot(heap.heap_id & 0xFFFF)
        slots += [control + field for field in range(CONTROL_SIZE // 8) if not C_MUTEX <= field < C_MUTEX + 8]
    slots += range(shape.directory // 8, shape.directory // 8 + shape.chunk_count)
    for page in range(shape.page_map >> PAGE_SHIFT, shape.first_page):
        if arena.committed_in(page, 1):
            slots += range(page * PAGE_SIZE // 8, (page + 1) * PAGE_SIZE // 8, 7)
    return slots


@pytest.mark.parametrize("seed", range(8))
def test_words_scribbled_at_random_break_no_operation(client: Client, other: Client, heap: HeapInfo, seed: int) -> None:
    """Rounds of scribbles over tables, slab heads and words of blocks, each followed by every operation there is."""
    random_ = random.Random(seed)
    manager = client.manager
    arena = manager.arena
    for _ in range(25):
        blocks = live_blocks(manager, heap)
        slots = scribble_slots(arena, client.heaps())
        slots += [slot for block in blocks for slot in (block.slot, block.slot, block.slot - 1)]
        for _ in range(random_.choice([1, 5, 200])):
            arena.words[random_.choice(slots)] = random_.choice([*SCRIBBLES, random_.getrandbits(64)])
        before = arena.segment.allocated_bytes - arena.budget.committed
        for request in random_.sample(heap_requests(heap), 8):
            attempt(random_.choice([client, other]), request)
        for block in random_.sample(blocks, min(len(blocks), 6)):
            for request in random_.sample(block_requests(heap, block), 3):
                attempt(client, request)
        assert arena.segment.allocated_bytes - arena.budget.committed == before, "a page was committed unasked"
        if random_.random() < 0.2:
            other.end()
            other = Client(manager)
            attempt(other, m.HeapOpenId(heap.heap_id))
    for session in list(manager.sessions):
        finish(manager.end_session(session))
    assert manager.heaps == {}
    assert arena.reserved == 0
    tables = arena.committed_in(0, arena.shape.first_page) * PAGE_SIZE
    assert arena.budget.committed == tables == arena.segment.allocated_bytes


def live_blocks(manager: HeapManager, heap: HeapInfo) -> list[Grant]:
    """Blocks that are out, by the daemon's own records, with the generation that their words tell now."""
    shared, words, shape = manager.heaps[heap.heap_id], manager.arena.words, manager.arena.shape
    return [
        Grant(slot, address, shape.word_format(slot).generation(words[slot]), 0, False)
        for slot, address in shared.heap.lent_slots()
    ]
