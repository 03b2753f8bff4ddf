"""How long a heap lives: anonymous, named, persistent and default ones, and what becomes of their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from heapd.errors import (
    HeapdError,
    HeapDestroyedError,
    HeapExistsError,
    InvalidArgumentError,
    NoSuchHeapError,
    NotPermittedError,
)
from heapd.layout import C_HEAP_ID, C_LIVE, F_FREE_ORPHANS, F_PERSISTENT, F_SERIALIZE, HEAP_INDEX_BITS
from heapd.manager import HeapManager
from heapd.units import KIB, MIB, PAGE_SIZE
from heapd.wire import messages as m
from tests.invariants import check_manager
from tests.manager.clients import Client
from tests.manager.conftest import NewClient


def tables(manager: HeapManager) -> int:
    """Bytes committed by header, control blocks and page map: they stay."""
    return manager.arena.committed_in(0, manager.arena.shape.first_page) * PAGE_SIZE


def is_alive(manager: HeapManager, heap_id: int) -> bool:
    """By the live word that every client reads, and by the daemon's records."""
    arena = manager.arena
    slot = arena.shape.control_slot(heap_id & 0xFFFF)
    live = arena.words[slot + C_LIVE] & 1 == 1 and arena.words[slot + C_HEAP_ID] == heap_id
    assert live == (heap_id in manager.heaps)
    return live


# -- anonymous ---------------------------------------------------------------------------------------------------------
def test_an_anonymous_heap_dies_with_the_session_that_made_it(client: Client, manager: HeapManager) -> None:
    """And every page of it goes back, whatever is allocated."""
    heap = client.create()
    for size in (10, 5000, 3 * MIB):
        client.alloc(heap, size)
    assert is_alive(manager, heap.heap_id)
    client.end()
    assert not is_alive(manager, heap.heap_id)
    assert manager.arena.budget.committed == tables(manager)


def test_an_anonymous_heap_that_another_session_has_open_dies_all_the_same(
    client: Client, other: Client, manager: HeapManager
) -> None:
    """Who was handed it by its id is told that it was destroyed."""
    heap = client.create()
    other.open_id(heap.heap_id)
    client.end()
    assert not is_alive(manager, heap.heap_id)
    with pytest.raises(HeapDestroyedError):
        other.alloc(heap, 10)


def test_who_was_handed_an_anonymous_heap_may_close_it(client: Client, other: Client, manager: HeapManager) -> None:
    """It stays: it is not theirs."""
    heap = client.create()
    other.open_id(heap.heap_id)
    other.close(heap)
    assert is_alive(manager, heap.heap_id)
    with pytest.raises(NoSuchHeapError):
        other.alloc(heap, 10)


def test_its_maker_may_destroy_but_not_close_an_anonymous_heap(client: Client, manager: HeapManager) -> None:
    """Nobody could ever find it again."""
    heap = client.create()
    with pytest.raises(NotPermittedError):
        client.close(heap)
    client.destroy(heap)
    assert not is_alive(manager, heap.heap_id)


# -- named -------------------------------------------------------------------------------------------------------------
def test_a_named_heap_lives_while_any_session_has_it_open(client: Client, other: Client, manager: HeapManager) -> None:
    """The end of its maker does not end it; that of the last does."""
    heap = client.create("frames")
    other.open("frames")
    block = client.alloc(heap, 100)
    client.end()
    assert is_alive(manager, heap.heap_id)
    other.free(heap, block)
    other.end()
    assert not is_alive(manager, heap.heap_id)
    assert manager.arena.budget.committed == tables(manager)


def test_closing_a_named_heap_as_the_last_one_ends_it(client: Client, other: Client, manager: HeapManager) -> None:
    """As when the last handle of a named object is closed in Windows."""
    heap = client.create("frames")
    other.open("frames")
    client.close(heap)
    assert is_alive(manager, heap.heap_id)
    other.close(heap)
    assert not is_alive(manager, heap.heap_id)
    with pytest.raises(NoSuchHeapError):
        other.open("frames")


def test_a_name_is_free_again_when_its_heap_is_gone(client: Client, manager: HeapManager) -> None:
    """The new heap has another id: ids are never used again."""
    first = client.create("frames")
    client.destroy(first)
    second = client.create("frames")
    assert first.heap_id != second.heap_id
    with pytest.raises(HeapDestroyedError):
        client.alloc(first, 10)
    client.alloc(second, 10)


def test_two_heaps_of_one_name_are_refused(client: Client, other: Client) -> None:
    """The error says what to do; the first is untouched."""
    client.create("frames")
    for who in (client, other):
        with pytest.raises(HeapExistsError, match="open it"):
            who.create("frames")
    assert len(client.heaps()) == 1


def test_opening_twice_counts_once(client: Client, manager: HeapManager) -> None:
    """A session has a heap open or not: one close is enough."""
    heap = client.create("frames")
    assert client.open("frames").heap_id == client.open_id(heap.heap_id).heap_id == heap.heap_id
    client.close(heap)
    assert not is_alive(manager, heap.heap_id)


@pytest.mark.parametrize("name", ["x", "Ä" * 127, "a/b c\n", "☃", " "])
def test_any_name_works(client: Client, other: Client, name: str) -> None:
    """Names are text, nothing more."""
    assert other.open(client.create(name).name or "").name == name


# -- persistent --------------------------------------------------------------------------------------------------------
def test_a_persistent_heap_outlives_every_session(client: Client, new_client: NewClient, manager: HeapManager) -> None:
    """With its blocks and names, until somebody destroys it."""
    heap = client.create_persistent("config")
    block = client.alloc(heap, 100)
    client.publish(heap, "current", block)
    client.end()
    assert is_alive(manager, heap.heap_id)
    assert manager.has_persistent_heaps
    later = new_client()
    found = later.lookup(later.open("config"), "current")
    assert (found.address, found.generation, found.size) == (block.address, block.generation, 100)
    later.destroy(heap)
    assert not manager.has_persistent_heaps


def test_closing_a_persistent_heap_never_ends_it(client: Client, manager: HeapManager) -> None:
    """Even as the last."""
    heap = client.create_persistent("config")
    client.close(heap)
    assert is_alive(manager, heap.heap_id)
    client.destroy(client.open("config"))


def test_a_persistent_heap_needs_a_name(client: Client) -> None:
    """Nobody could find it again; nothing is made."""
    with pytest.raises(InvalidArgumentError, match="name"):
        client.create(None, flags=F_PERSISTENT)
    assert client.heaps() == []


# -- default -----------------------------------------------------------------------------------------------------------
def test_the_default_heap_is_made_at_its_first_use(client: Client, manager: HeapManager) -> None:
    """1 MiB reserved, 4 KiB committed; the same one ever after."""
    assert client.heaps() == []
    heap = client.default()
    assert heap.is_default
    assert (client.statistics(heap).reserved, client.statistics(heap).committed) == (MIB, 4 * KIB)
    assert client.default(reserve=5 * MIB).heap_id == heap.heap_id
    client.alloc(heap, 3 * MIB)


def test_its_first_use_may_say_how_large(client: Client) -> None:
    """Reserve and commit count only then."""
    heap = client.default(reserve=3 * MIB, commit=MIB)
    assert (client.statistics(heap).reserved, client.statistics(heap).committed) == (3 * MIB, MIB)


def test_a_default_heap_that_contradicts_itself_is_refused_and_can_be_made_later(client: Client) -> None:
    """More to commit than to reserve."""
    with pytest.raises(InvalidArgumentError):
        client.default(reserve=64 * KIB, commit=128 * KIB)
    client.default()


def test_each_session_has_its_own_and_it_goes_with_it(client: Client, other: Client, manager: HeapManager) -> None:
    """Nobody may close or destroy it, not even who was handed it."""
    heap = client.default()
    assert other.default().heap_id != heap.heap_id
    other.open_id(heap.heap_id)
    for who in (client, other):
        with pytest.raises(NotPermittedError):
            who.destroy(heap)
    with pytest.raises(NotPermittedError):
        client.close(heap)
    other.close(heap)
    client.end()
    assert not is_alive(manager, heap.heap_id)


# -- destroy -----------------------------------------------------------------------------------------------------------
def test_destroying_gives_every_page_back_at_once(client: Client, manager: HeapManager) -> None:
    """Whatever is allocated; every session that had it open is told at its next call."""
    heap = client.create("frames")
    for size in (10, 5000, 70_000, 3 * MIB, 40 * MIB):
        client.alloc(heap, size)
    before = tables(manager)
    client.destroy(heap)
    assert manager.arena.segment.allocated_bytes == tables(manager) >= before
    with pytest.raises(HeapDestroyedError):
        client.alloc(heap, 10)


def test_any_session_that_has_it_open_may_destroy_a_named_heap(client: Client, other: Client) -> None:
    """As any process with the handle may in Windows; who has it not open may not."""
    heap = client.create("frames")
    with pytest.raises(NoSuchHeapError):
        other.destroy(heap)
    other.open("frames")
    other.destroy(heap)
    with pytest.raises(HeapDestroyedError):
        client.walk(heap)


LOOKING = [lambda heap: m.HeapWalk(heap), lambda heap: m.HeapValidate(heap), lambda heap: m.HeapStatisticsGet(heap)]


@pytest.mark.parametrize(
    "request_of",
    [
        *LOOKING,
        lambda heap: m.HeapAlloc(heap, 10),
        lambda heap: m.HeapAllocMany(heap, [10]),
        lambda heap: m.HeapLease(heap, 10, 1),
        lambda heap: m.HeapGiveBack(heap, [], 1),
        lambda heap: m.HeapResize(heap, 4096, 1, 10),
        lambda heap: m.HeapFree(heap, 4096, 1),
        lambda heap: m.HeapFreeMany(heap, [4096, 1]),
        lambda heap: m.HeapCompact(heap),
        lambda heap: m.NamePublish(heap, "x", 4096, 1),
        lambda heap: m.NameLookup(heap, "x", 5),
        lambda heap: m.NameUnpublish(heap, "x"),
        lambda heap: m.NameList(heap),
        lambda heap: m.HeapClose(heap),
        lambda heap: m.HeapDestroy(heap),
    ],
)
def test_every_operation_tells_a_destroyed_heap_from_one_that_never_was(
    client: Client, other: Client, request_of: Callable[[int], m.Request]
) -> None:
    """And from one that the session has not open, which it may do no more than look at."""
    gone, strange = client.create(), other.create()
    client.destroy(gone)
    with pytest.raises(HeapDestroyedError):
        client.ask(request_of(gone.heap_id))
    with pytest.raises(NoSuchHeapError):
        client.ask(request_of(999 << HEAP_INDEX_BITS))
    if request_of in LOOKING:
        client.ask(request_of(strange.heap_id))
        return
    with pytest.raises(NoSuchHeapError, match="not open"):
        client.ask(request_of(strange.heap_id))


def test_opening_by_id_tells_gone_from_never_was(client: Client) -> None:
    """By heap id, and by the control index that a page word names."""
    heap = client.create()
    assert client.open_id(heap.heap_id & 0xFFFF).heap_id == heap.heap_id
    client.destroy(heap)
    with pytest.raises(HeapDestroyedError):
        client.open_id(heap.heap_id)
    for never in (77, 12345 << HEAP_INDEX_BITS):
        with pytest.raises(NoSuchHeapError):
            client.open_id(never)


# -- what is told ------------------------------------------------------------------------------------------------------
def test_a_heap_s_info_tells_how_it_was_made(client: Client, other: Client) -> None:
    """Flags, limits, name, maker, where it begins, who has it open; the maker is 0 once it has ended."""
    flags = F_SERIALIZE | F_FREE_ORPHANS
    info = client.create("x", initial=5000, maximum=MIB, flags=flags, max_block=1000)
    assert (info.name, info.flags, info.maximum, info.max_block) == ("x", flags, MIB, 1000)
    assert (info.creator, info.is_default, info.sessions) == (client.number, False, 1)
    assert info.base % (64 * KIB) == 0
    opened = other.open("x")
    assert (opened.epoch, opened.sessions) == (info.epoch, 2)
    client.end()
    assert other.open("x").creator == 0


@pytest.mark.parametrize("flags", [1 << 7, 1 << 8, 1 << 15, 2**16 - 1])
def test_unknown_flags_are_refused(client: Client, flags: int) -> None:
    """A newer client must not believe that it got what it asked for."""
    with pytest.raises(InvalidArgumentError):
        client.create(flags=flags)
    assert client.heaps() == []


def test_a_heap_that_cannot_be_made_leaves_nothing(client: Client, manager: HeapManager) -> None:
    """Whatever is wrong with it: no name, no control block, no page."""
    for options in (
        {"initial": 2 * MIB, "maximum": MIB},
        {"initial": 2**60},
        {"initial": 220 * MIB},
        {"maximum": 255 * MIB},
    ):
        with pytest.raises(HeapdError):
            client.create("x", **options)
    assert client.heaps() == []
    manager.arena.settle_all()
    assert manager.arena.budget.committed == tables(manager)
    check_manager(manager)
    client.create("x")


def test_the_list_of_heaps_is_by_id_and_can_be_paged(client: Client, other: Client) -> None:
    """Those of one process have its default heap first."""
    made = [client.create(f"h{number}") for number in range(7)]
    default = client.default()
    other.create()
    assert [heap.heap_id for heap in other.heaps()][:7] == [heap.heap_id for heap in made]
    pid = client.session.pid
    mine = [heap.heap_id for heap in other.heaps(pid)]
    assert mine == [default.heap_id, *(heap.heap_id for heap in made)]
    assert other.heaps(pid=4) == []
    for of_pid in (0, pid):
        paged: list[int] = []
        while page := client.heaps(of_pid, after=max(paged, default=0), limit=3):
            paged += [heap.heap_id for heap in page]
        assert sorted(paged) == sorted(heap.heap_id for heap in client.heaps(of_pid))
