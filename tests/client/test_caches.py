"""What front ends cache: how many blocks they lease, when they give some back, and that this costs the heap little."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

import heapd_client as hc
from heapd.layout import H_COMMITTED
from heapd.units import KIB, MIB
from heapd.wire.messages import HeapGiveBack, HeapLease, Request
from heapd_client.frontend import FrontEnd

Requests = list[Request]


@pytest.fixture
def heap(session: hc.Session) -> Iterator[hc.Heap]:
    """An unserialized heap."""
    heap = session.create_heap(serialize=False)
    yield heap
    assert heap.validate() == []
    heap.destroy()


@pytest.fixture
def requests(session: hc.Session, monkeypatch: pytest.MonkeyPatch) -> Requests:
    """What the session asks the daemon from now on."""
    asked: Requests = []
    connection = session._connection
    assert connection is not None
    call, post = session.call, connection.post

    def listen(request: Request, *rest: float) -> object:
        asked.append(request)
        return call(request, *rest)

    def listen_to_posts(request: Request) -> bool:
        is_posted = post(request)  # else it is called
        asked.extend([request] * is_posted)
        return is_posted

    monkeypatch.setattr(session, "call", listen)
    monkeypatch.setattr(connection, "post", listen_to_posts)
    return asked


def committed(session: hc.Session) -> int:
    """Bytes that the arena has committed."""
    found: int = session.arena.words[H_COMMITTED]
    return found


def test_a_block_in_turn_asks_nobody_soon(heap: hc.Heap, requests: Requests) -> None:
    """`heap.alloc(64).free()` again and again: a handful of requests, then none."""
    for _ in range(20):
        block = heap.alloc(64)
        block.free()
    asked = len(requests)
    for _ in range(500):
        block = heap.alloc(64)
        block.free()
    assert len(requests) == asked <= 4


def test_one_block_is_leased_for_one(heap: hc.Heap, requests: Requests) -> None:
    """A heap that allocates a single block takes no batch."""
    heap.alloc(64)
    assert [request.count for request in requests if isinstance(request, HeapLease)] == [1]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 48, 49, 64, 65, 1000, 4096, 4097, 65_535, 65_536, 65_537, 100_000])
def test_a_size_is_served_by_the_right_bin_whatever_was_asked_before(heap: hc.Heap, size: int) -> None:
    """Sizes share a key on the hot path by 16 bytes; none of them ever gets a block that is too small."""
    for near in (size, size + 1, max(size - 1, 1), size + 15, size + 16, size):
        blocks = [heap.alloc(near) for _ in range(6)]
        for block in blocks:
            assert block.extent >= near
            assert len(block.view) == near
            block.view[-1] = 1
        while blocks:
            blocks.pop().free()


@pytest.mark.parametrize("size", [0, -1, -15, -16, -64, 64.0, None, "64", True])
def test_what_is_no_usual_size_goes_the_slow_way(heap: hc.Heap, size: object) -> None:
    """With blocks cached for its neighbours: 0 is a real block, a negative size or another kind of thing an error."""
    for near in (1, 16, 64):
        for block in [heap.alloc(near) for _ in range(4)]:
            block.free()
    if size in (0, True):
        assert heap.alloc(size).size == int(size)  # type: ignore[arg-type, call-overload]
    else:
        with pytest.raises(hc.InvalidArgumentError):
            heap.alloc(size)  # type: ignore[arg-type]
    assert heap.statistics().busy_blocks == (size in (0, True))


def test_an_empty_bin_takes_from_the_next_larger_one(heap: hc.Heap, requests: Requests) -> None:
    """At most two classes up, where blocks are; and what it took goes back to where it came from."""
    larger = [heap.alloc(1100) for _ in range(8)]
    first = heap.alloc(1000)
    while larger:
        larger.pop().free()
    asked = len(requests)
    borrowed = [heap.alloc(1000) for _ in range(6)]
    assert [block.extent for block in borrowed] == [1152] * 6
    assert len(requests) == asked
    for block in [first, *borrowed]:
        block.free()
    borrowed.clear()
    assert [heap.alloc(1100).extent for _ in range(6)] == [1152] * 6
    assert len(requests) == asked


def test_a_page_aligned_size_never_takes_a_block_of_a_slab(heap: hc.Heap) -> None:
    """Multiples of 4 KiB begin on a page, however many larger blocks that do not are cached."""
    for _ in range(3):
        for block in [heap.alloc(4097) for _ in range(8)]:
            block.free()
        aligned = [heap.alloc(4096) for _ in range(4)]
        assert [block.address % 4096 for block in aligned] == [0] * 4
        while aligned:
            aligned.pop().free()


def test_a_lease_brings_a_block_for_each_empty_bin(heap: hc.Heap, requests: Requests) -> None:
    """The bins that have run out of blocks are told of while one of them asks."""
    sizes = (64, 640, 6000)
    kept = [heap.alloc(size) for size in sizes for _ in range(8)]
    requests.clear()
    for bin_ in heap._front or ():
        bin_.stack.clear()  # as if all had been allocated
    kept.append(heap.alloc(20_000))
    others = [extent for request in requests if isinstance(request, HeapLease) for extent in request.others]
    assert sorted(others) == [64, 640, 6144]
    asked = len(requests)
    kept += [heap.alloc(size) for size in sizes]
    assert len(requests) == asked


@pytest.mark.parametrize(
    ("first", "second"), [(64 * KIB, 100_000), (3 * MIB, 2 * MIB), (1000, 50_000)], ids=["run", "large", "small"]
)
def test_what_is_cached_does_not_add_to_the_most_in_use(
    session: hc.Session, heap: hc.Heap, first: int, second: int
) -> None:
    """10 MiB of one size, freed, then 10 MiB of another: the arena commits what one of them needs, and 1/22, and what
    slabs keep of theirs."""
    total = 10 * MIB
    floor = committed(session)
    for block in [heap.alloc(first) for _ in range(total // first)]:
        block.free()
    blocks = [heap.alloc(second) for _ in range(total // second)]
    assert committed(session) - floor < total * 1.15
    assert len(blocks) == total // second


def test_frames_of_equal_size_are_cached_whatever_their_size(heap: hc.Heap, requests: Requests) -> None:
    """A stream of 6 MiB frames, two at a time, asks nobody once it goes."""
    for _ in range(3):
        frames = [heap.alloc(6 * MIB) for _ in range(2)]
        for frame in frames:
            frame.free()
    requests.clear()
    for _ in range(50):
        frames = [heap.alloc(6 * MIB) for _ in range(2)]
        for frame in frames:
            frame.free()
    assert requests == []


@pytest.mark.parametrize("size", [100_000, 6 * MIB])
def test_a_large_block_allocated_and_freed_in_turn_takes_no_slow_path(
    heap: hc.Heap, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """It goes round: the same memory each time, whatever it was used for."""
    block = heap.alloc(size)
    address = block.address
    block.free()
    slow: list[str] = []
    for name in ("allocate", "take_back"):
        monkeypatch.setattr(FrontEnd, name, lambda *_, name=name: slow.append(name))
    for number in range(20):
        block = heap.alloc(size)
        block.view[-1] = number
        assert block.address == address
        block.free()
    assert slow == []


def test_large_caches_together_keep_their_bound(heap: hc.Heap) -> None:
    """64 MiB, however many sizes were promised a part of it."""
    sizes = [MIB + 100_000 * number for number in range(40)]
    for order in (sizes, sizes[::-1], sizes):
        for block in [heap.alloc(size) for size in order]:
            block.free()
        assert 32 * MIB < heap.statistics().cached <= 64 * MIB


def test_a_block_larger_than_all_caches_goes_back_at_once(heap: hc.Heap) -> None:
    """No bin is promised room that it has not."""
    for _ in range(3):
        heap.alloc(65 * MIB).free()
        assert heap.statistics().cached == 0


def test_what_is_given_back_lies_at_the_highest_addresses(heap: hc.Heap, requests: Requests) -> None:
    """So that blocks in use gather, and slabs get empty."""
    blocks = [heap.alloc(4000) for _ in range(2000)]
    order = random.Random(3)
    order.shuffle(blocks)
    addresses = sorted(block.address for block in blocks)
    while blocks:
        blocks.pop().free()
    given = [address for request in requests if isinstance(request, HeapGiveBack) for address in request.blocks[::2]]
    assert given
    assert sum(given) / len(given) > sum(addresses) / len(addresses)


def test_small_allocations_of_mixed_sizes_ask_for_one_in_thirty(heap: hc.Heap, requests: Requests) -> None:
    """Sizes from 16 B to 64 KiB, 2,000 live, random lifetimes, steady state: at most one request in 30 allocations."""
    order = random.Random(5)

    def size() -> int:
        return int(16 * 4096 ** order.random())

    live = [heap.alloc(size()) for _ in range(2000)]

    def turn_over(steps: int) -> None:
        for _ in range(steps):
            victim = order.randrange(len(live))
            live[victim].free()
            live[victim] = heap.alloc(size())

    turn_over(6000)
    requests.clear()
    turn_over(6000)
    assert len(requests) < 6000 / 30


@pytest.mark.parametrize("change", ["resize", "alloc_many", "trim"])
def test_what_is_in_use_is_known_past_the_front_end(heap: hc.Heap, change: str) -> None:
    """A block resized by the daemon, blocks allocated by the batch, and a front end made anew: all of it counts."""
    grow: dict[str, Callable[[], object]] = {
        "resize": lambda: heap.alloc(MIB).realloc(5 * MIB),
        "alloc_many": lambda: heap.alloc_many(MIB, 5),
        "trim": lambda: ([heap.alloc(MIB) for _ in range(5)], heap.trim(), heap.alloc(64)),
    }
    kept = [heap.alloc(64), grow[change]()]
    front = heap._front
    assert front is not None
    assert 5 * MIB <= front.used_bytes() < 5.2 * MIB
    assert kept


def test_a_heap_that_is_emptied_gives_back_while_it_is(heap: hc.Heap) -> None:
    """Also where nothing is allocated any more, what is cached is far less than what was in use."""
    blocks = [heap.alloc(size) for _ in range(100) for size in range(16 * KIB, 64 * KIB, 4 * KIB)]
    used = heap.statistics().busy
    while blocks:
        for block in blocks[-50:]:
            block.free()
        del blocks[-50:]
        assert heap.statistics().cached < used // 5
