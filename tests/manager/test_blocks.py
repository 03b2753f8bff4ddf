"""Operations on blocks as clients ask for them: batches that are all or nothing, and one misuse a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from heapd.errors import (
    BlockTooLargeError,
    CannotResizeInPlaceError,
    DoubleFreeError,
    HeapdError,
    HeapFullError,
    InvalidArgumentError,
    NotABlockError,
    StaleHandleError,
    WrongHeapError,
)
from heapd.heap import SLICE_BYTES
from heapd.manager import HeapManager
from heapd.records import ArenaStatistics, HeapInfo
from heapd.units import KIB, MIB
from heapd.wire import messages as m
from tests.invariants import check_manager, fill, pattern, picture, read
from tests.manager.clients import Client, names


@pytest.fixture
def heap(client: Client) -> HeapInfo:
    return client.create("blocks")


def check_refused(client: Client, error: type[HeapdError], call: Callable[[], object]) -> HeapdError:
    """The call raises that error, and nothing has changed anywhere."""
    before = picture(client.manager)
    with pytest.raises(error) as refused:
        call()
    assert picture(client.manager) == before
    check_manager(client.manager)
    return refused.value


# -- batches -----------------------------------------------------------------------------------------------------------
def test_many_are_allocated_in_the_order_of_their_sizes(client: Client, heap: HeapInfo, manager: HeapManager) -> None:
    """Each is a block like any other."""
    sizes = [64, 0, 5000, 64, 8192, 70_000, 2 * MIB, 17]
    grants = client.alloc_many(heap, sizes)
    assert all(grant.extent >= size for grant, size in zip(grants, sizes, strict=True))
    for number, (grant, size) in enumerate(zip(grants, sizes, strict=True)):
        fill(manager.arena, grant.address, size, number)
    for number, (grant, size) in enumerate(zip(grants, sizes, strict=True)):
        assert read(manager.arena, grant.address, size) == pattern(size, number)
    client.free_many(heap, grants)
    assert client.statistics(heap).busy_blocks == 0


@pytest.mark.parametrize("sizes", [[64] * 10 + [6 * MIB], [MIB] * 6, [64 * KIB] * 70, [3 * MIB, 10, 3 * MIB]])
def test_many_that_do_not_all_fit_are_not_allocated_at_all(client: Client, sizes: list[int]) -> None:
    """A fixed heap of 4 MiB."""
    heap = client.create(maximum=4 * MIB)
    client.alloc(heap, 100)
    if max(sizes) > 4 * MIB:
        check_refused(client, BlockTooLargeError, lambda: client.alloc_many(heap, sizes))
    else:
        check_refused(client, HeapFullError, lambda: client.alloc_many(heap, sizes))


def test_many_large_ones_that_do_not_all_fit_leave_nothing_committed(client: Client, heap: HeapInfo) -> None:
    """250 MiB of 200: what the slices had committed goes back, without waiting for another request."""
    before = client.manager.arena.budget.committed
    check_refused(client, HeapFullError, lambda: client.alloc_many(heap, [50 * MIB] * 5))
    assert client.manager.arena.budget.committed - before <= MIB


def test_one_large_block_that_does_not_fit_leaves_nothing_committed(client: Client, heap: HeapInfo) -> None:
    """The same for a single one."""
    client.alloc(heap, 100 * MIB)
    before = client.manager.arena.budget.committed
    check_refused(client, HeapFullError, lambda: client.alloc(heap, 110 * MIB))
    assert client.manager.arena.budget.committed - before <= MIB


def test_none_are_allocated_for_an_empty_list(client: Client, heap: HeapInfo) -> None:
    """Nor freed."""
    assert client.alloc_many(heap, []) == []
    client.free_many(heap, [])


def test_one_bad_block_keeps_all_from_being_freed(client: Client, heap: HeapInfo) -> None:
    """All are checked before the first is freed."""
    grants = client.alloc_many(heap, [64] * 5)
    bad = grants[3]._replace(generation=grants[3].generation + 1)
    check_refused(client, StaleHandleError, lambda: client.free_many(heap, [*grants[:3], bad, grants[4]]))
    bad = grants[3]._replace(address=grants[3].address + 8)
    check_refused(client, NotABlockError, lambda: client.free_many(heap, [*grants[:3], bad]))
    client.free_many(heap, grants)


def test_a_block_named_twice_in_one_batch_is_refused(client: Client, heap: HeapInfo) -> None:
    """A double free inside one call; nothing was freed."""
    one, two = client.alloc_many(heap, [64, 64])
    check_refused(client, InvalidArgumentError, lambda: client.free_many(heap, [one, two, one]))


def test_an_address_without_its_generation_is_refused(client: Client, heap: HeapInfo) -> None:
    """The list is flat: pairs."""
    block = client.alloc(heap, 64)
    check_refused(client, InvalidArgumentError, lambda: client.ask(m.HeapFreeMany(heap.heap_id, [block.address])))


# -- one misuse a test -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [64, 8192, 2 * MIB])
def test_a_block_of_another_heap_names_that_heap(client: Client, heap: HeapInfo, size: int) -> None:
    """By its name, or its id: for free, free_many, resize and publish alike."""
    named, anonymous = client.create("the other"), client.create()
    for other, shown in ((named, "'the other'"), (anonymous, str(anonymous.heap_id))):
        block = client.alloc(other, size)
        for call in (
            lambda block=block: client.free(heap, block),
            lambda block=block: client.free_many(heap, [block]),
            lambda block=block: client.resize(heap, block, 10),
            lambda block=block: client.publish(heap, "x", block),
        ):
            assert shown in str(check_refused(client, WrongHeapError, call))


@pytest.mark.parametrize("address", [0, 8, 4096, 2**30, 2**62, 2**63 - 1])
def test_an_address_outside_every_heap_says_so(client: Client, heap: HeapInfo, address: int) -> None:
    """Tables, free address space, and beyond the arena."""
    error = check_refused(client, NotABlockError, lambda: client.ask(m.HeapFree(heap.heap_id, address, 1)))
    assert "no heap" in str(error)


def test_an_interior_address_is_no_block(client: Client, heap: HeapInfo) -> None:
    """For every operation on a block."""
    block = client.alloc(heap, 64)
    inside = block._replace(address=block.address + 16)
    for call in (
        lambda: client.free(heap, inside),
        lambda: client.resize(heap, inside, 10),
        lambda: client.publish(heap, "x", inside),
    ):
        check_refused(client, NotABlockError, call)


def test_a_double_free_is_told_from_a_stale_handle(client: Client, heap: HeapInfo) -> None:
    """Free and not used again; free and used again."""
    anchor, block = client.alloc_many(heap, [64, 64])
    assert anchor
    client.free(heap, block)
    check_refused(client, DoubleFreeError, lambda: client.free(heap, block))
    client.alloc(heap, 64)
    check_refused(client, StaleHandleError, lambda: client.free(heap, block))


@pytest.mark.parametrize("size", [2**40, 2**63, 2**64 - 1])
def test_absurd_sizes_are_too_large(client: Client, heap: HeapInfo, size: int) -> None:
    """For alloc, alloc_many, resize; a lease of so much is refused by its product."""
    block = client.alloc(heap, 64)
    for call in (
        lambda: client.alloc(heap, size),
        lambda: client.alloc_many(heap, [10, size]),
        lambda: client.resize(heap, block, size),
    ):
        check_refused(client, BlockTooLargeError, call)
    check_refused(client, InvalidArgumentError, lambda: client.lease(heap, size, 1))


def test_a_lease_of_more_than_a_slice_is_refused(client: Client, heap: HeapInfo) -> None:
    """It is answered at once, so it must not take long."""
    check_refused(client, InvalidArgumentError, lambda: client.lease(heap, SLICE_BYTES // 4, 5))
    assert len(client.lease(heap, SLICE_BYTES // 4, 4)) == 4


def test_a_resize_out_of_place_is_left_to_the_client(client: Client, heap: HeapInfo) -> None:
    """Refused, unchanged; the client moves the block."""
    block, _ = client.alloc_many(heap, [64, 64])
    check_refused(client, CannotResizeInPlaceError, lambda: client.resize(heap, block, 65))
    check_refused(client, CannotResizeInPlaceError, lambda: client.resize(heap, block, 65, in_place_only=False))
    client.resize(heap, block, 10)


# -- blocks of others --------------------------------------------------------------------------------------------------
def test_a_block_may_be_freed_and_resized_by_any_session_that_has_the_heap_open(
    client: Client, other: Client, heap: HeapInfo
) -> None:
    """Ownership is told, not enforced: buffers are handed from process to process."""
    other.open("blocks")
    block = client.alloc(heap, 10_000)
    other.resize(heap, block, 9000)
    [entry] = [entry for entry in other.walk(heap) if entry.session]
    assert (entry.session, entry.size) == (client.number, 9000)
    other.free(heap, block)
    check_refused(client, HeapdError, lambda: client.free(heap, block))


def test_in_a_heap_that_frees_orphans_a_resized_block_is_the_callers(client: Client, other: Client) -> None:
    """As one that is moved is: it goes with the session that resized it, and not with who had it before."""
    heap = client.create_freeing_orphans("freeing")
    other.open("freeing")
    block = client.alloc(heap, 10_000)
    other.resize(heap, block, 9000)
    [entry] = [entry for entry in other.walk(heap) if entry.session]
    assert (entry.session, entry.size) == (other.number, 9000)


def test_leases_are_given_back_one_by_one_or_all_at_once(client: Client, other: Client, heap: HeapInfo) -> None:
    """Only the caller's own; the answer counts them."""
    other.open("blocks")
    mine = client.lease(heap, 64, 10) + client.lease(heap, 8192, 3) + client.lease(heap, 2 * MIB, 2)
    theirs = other.lease(heap, 64, 4)
    assert client.ask(m.HeapGiveBack(heap.heap_id, names([*mine[:4], *theirs]))) == 4
    assert client.ask(m.HeapGiveBack(heap.heap_id, [], 1)) == len(mine) - 4
    assert other.statistics(heap).cached_blocks == 4
    assert other.ask(m.HeapGiveBack(heap.heap_id, names(theirs))) == 4
    check_manager(client.manager)


def test_a_block_that_was_leased_again_is_not_given_back_by_its_former_name(client: Client, heap: HeapInfo) -> None:
    """A request that nobody waited for any more may come so late. An incomplete pair is refused."""
    [former] = client.lease(heap, 64, 1)
    name = names([former])
    assert client.ask(m.HeapGiveBack(heap.heap_id, name)) == 1
    [again] = client.lease(heap, 64, 1)
    assert again.address == former.address
    assert client.ask(m.HeapGiveBack(heap.heap_id, name)) == 0
    check_refused(client, InvalidArgumentError, lambda: client.ask(m.HeapGiveBack(heap.heap_id, name[:1])))
    assert client.statistics(heap).cached_blocks == 1


def test_validating_one_block_tells_of_it_alone(client: Client, heap: HeapInfo) -> None:
    """Sound, interior, and none of the heap's."""
    block = client.alloc(heap, 64)
    assert client.validate(heap, block.address) == []
    assert [found.what for found in client.validate(heap, block.address + 16)] == ["not-a-block"]
    assert [found.what for found in client.validate(heap, 2**40)] == ["not-a-block"]


def test_the_arena_s_statistics_add_up_at_every_step(client: Client, heap: HeapInfo) -> None:
    """size = tables_reserved + reserved + unreserved; committed = tables + heaps; also while slices are decommitted."""

    def check() -> None:
        found = ArenaStatistics(*client.ask(m.ArenaStatisticsGet()))
        assert found.size == found.tables_reserved + found.reserved + found.unreserved
        assert found.committed == found.tables + found.heaps
        assert found.committed == client.manager.arena.segment.allocated_bytes

    check()
    block = client.alloc(heap, 90 * MIB)
    check()
    client.alloc(heap, 64)
    check()
    client.ask(m.HeapFree(heap.heap_id, block.address, block.generation), between=check)
    check()
