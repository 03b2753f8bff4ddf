"""The front end: what it leases, what it keeps, what it gives back, and how seldom it asks."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

import heapd_client as hc
from heapd.layout import F_EXECUTABLE, RUN_WORD, SLAB_WORD, WordFormat
from heapd.records import EntryKind
from heapd.units import KIB, MIB, PAGE_SIZE
from heapd_client import errors
from heapd_client.frontend import FrontEnd
from tests.client.tools import blocks_of, cached_by, check_empty, count_requests, fork, sizes
from tests.harness import Daemon, wait_until

LARGE_CACHE = 64 * MIB
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def small_cache(session: hc.Session) -> int:
    """Bytes that the bins of size classes may hold together, with what their bins may take before they ask."""
    return max(1 * MIB, session.statistics().committed // 32) * 5 // 4 + 256 * KIB


# -- leases ------------------------------------------------------------------------------------------------------------
def test_one_block_leases_one(free_heap: hc.Heap) -> None:
    """A heap that allocates one block of a class takes no more of it."""
    for size in (16, 64, 1000, 4096, 65_536, 1 * MIB):
        free_heap.alloc(size)
        assert blocks_of(free_heap, EntryKind.CACHED) == []


def test_thousands_do_not_ask_by_eight(session: hc.Session, free_heap: hc.Heap) -> None:
    """Batches grow with what a class uses: 10,000 blocks of a class take less than a hundred requests."""
    counts = count_requests(session)
    blocks = [free_heap.alloc(64) for _ in range(10_000)]
    assert counts.total() < 100
    for block in blocks:
        block.free()
    check_empty(free_heap)


@pytest.mark.parametrize("serialize", [True, False])
def test_in_steady_state_one_allocation_in_thirty_asks(session: hc.Session, serialize: bool) -> None:
    """Mixed sizes and random lifetimes, 2,000 blocks live."""
    heap = session.create_heap(serialize=serialize)
    wanted = sizes(7, high=4096)
    live = [heap.alloc(size) for size in islice(wanted, 2_000)]
    counts = count_requests(session)
    for step, size in enumerate(islice(wanted, 18_000)):
        if step == 9_000:
            counts.clear()
        place = step * 7919 % len(live)
        live[place].free()
        live[place] = heap.alloc(size)
    assert counts.total() * 30 <= 9_000, counts
    for block in live:
        block.free()
    check_empty(heap)


@pytest.fixture
def slow_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each alloc that does not take the hot path."""
    calls: list[object] = []
    alloc_slow = hc.Heap.alloc_slow

    def counting(self: hc.Heap, *arguments: object) -> hc.Block:
        calls.append(arguments)
        return alloc_slow(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hc.Heap, "alloc_slow", counting)
    return calls


def alloc_and_free_in_turn(heap: hc.Heap) -> None:
    """A hundred times, with one variable."""
    for _ in range(100):
        block = heap.alloc(64)
        block.free()


@pytest.mark.parametrize("serialize", [True, False])
def test_one_block_in_turn_settles_on_the_hot_path(
    session: hc.Session, slow_calls: list[object], serialize: bool
) -> None:
    """`block = alloc(64); block.free()` over and over: the block just freed is in the way, a spare one is not."""
    heap = session.create_heap(serialize=serialize)
    alloc_and_free_in_turn(heap)
    assert len(slow_calls) < 10
    assert len(blocks_of(heap, EntryKind.CACHED)) == 2


@pytest.mark.parametrize("serialize", [True, False])
def test_threads_that_hold_a_block_each_leave_the_others_the_hot_path(
    session: hc.Session, slow_calls: list[object], serialize: bool
) -> None:
    """A thread that is interrupted between alloc and free has a block out of the bin: each thread has its spare one."""
    heap = session.create_heap(serialize=serialize)
    alloc_and_free_in_turn(heap)
    holding, go = threading.Barrier(4), threading.Event()

    def hold() -> None:
        with heap.alloc(64):
            holding.wait(30)
            go.wait(30)

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    holding.wait(30)
    before = len(slow_calls)
    alloc_and_free_in_turn(heap)
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(slow_calls) - before < 15


def test_whole_pages_begin_on_a_page_whatever_is_cached(free_heap: hc.Heap) -> None:
    """A request of a multiple of 4 KiB is page-aligned, also when only blocks of a larger class are cached."""
    for size in range(4, 65, 4):
        near = [free_heap.alloc(size * KIB + extra) for extra in (1, 600, 1100, 2100) for _ in range(2)]
        for block in near:
            block.free()
        assert free_heap.alloc(size * KIB).address % PAGE_SIZE == 0


def test_a_size_that_is_none_costs_no_block(session: hc.Session, free_heap: hc.Heap) -> None:
    """It is refused; what is cached stays so."""
    for block in [free_heap.alloc(64) for _ in range(50)]:
        block.free()
    del block
    before = cached_by(free_heap, session)
    for _ in range(40):
        with pytest.raises(errors.InvalidArgumentError):
            free_heap.alloc(64.0)  # type: ignore[arg-type]
    assert cached_by(free_heap, session) == before


def test_empty_blocks_are_cached_as_others(free_heap: hc.Heap) -> None:
    """alloc(0): each has an address of its own, and comes from and goes to the cache."""
    blocks = [free_heap.alloc(0) for _ in range(300)]
    assert len({block.address for block in blocks}) == 300
    assert all(block.view.nbytes == 0 and block.size == 0 for block in blocks)
    for block in blocks:
        block.free()
    with pytest.raises(errors.ClosedError):
        blocks[0].free()
    assert free_heap.alloc(0).size == 0
    assert free_heap.statistics().busy_blocks == 1


# -- bounds ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [64, 1000, 4096, 40_000, 65_536])
def test_the_cache_of_a_class_is_bounded(session: hc.Session, free_heap: hc.Heap, size: int) -> None:
    """Whatever is freed at once: what is kept is a small part."""
    for block in free_heap.alloc_many(size, max(2 * MIB // size, 64)):
        block.free()
    assert free_heap.statistics().cached <= small_cache(session)


def test_the_caches_of_all_classes_are_bounded_together(session: hc.Session, free_heap: hc.Heap) -> None:
    """Bytes of all bins, not of each."""
    for block in free_heap.alloc_many(list(islice(sizes(3), 1_500))):
        block.free()
    assert free_heap.statistics().cached <= small_cache(session)


def test_the_cache_of_large_blocks_is_bounded(start_daemon: Callable[..., Daemon]) -> None:
    """Freed one after the other or all at once, of one size or of many: at most 64 MiB are kept."""
    daemon = start_daemon("--reserve", "4GiB")
    with hc.connect(daemon.endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=False)
        for block in [heap.alloc((4 + number) * MIB) for number in range(12)]:
            block.free()
            assert heap.statistics().cached <= LARGE_CACHE
        for block in [heap.alloc(5 * MIB) for _ in range(20)]:
            block.free()
        assert heap.statistics().cached <= LARGE_CACHE
        heap.alloc(LARGE_CACHE + 1).free()
        assert all(entry.extent <= LARGE_CACHE for entry in blocks_of(heap, EntryKind.CACHED))
        check_empty(heap)


def test_many_sizes_of_large_blocks_cost_little(session: hc.Session, free_heap: hc.Heap) -> None:
    """Bins come and go: 700 sizes over 64 KiB leave no more of them than 600, and blocks of forgotten ones are freed
    as any other."""
    kept = []
    for number in range(700):
        block = free_heap.alloc(65 * KIB + number * PAGE_SIZE)
        if number % 100 == 0:
            kept.append(block)
        else:
            block.free()
    assert free_heap._front is not None
    assert len(list(free_heap._front)) <= 600
    for block in kept:
        block.free()
    check_empty(free_heap)


# -- large blocks ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [64 * KIB, 6 * MIB, 20 * MIB])
def test_equal_frames_need_no_round_trip(session: hc.Session, free_heap: hc.Heap, size: int) -> None:
    """In steady state, also with two frames in flight; and filling one costs no page fault."""
    counts = count_requests(session)
    previous = free_heap.alloc(size)
    for turn in range(100):
        if turn == 20:
            counts.clear()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = free_heap.alloc(size)
        block.view[::PAGE_SIZE] = bytes(size // PAGE_SIZE)
        previous.free()
        previous = block
    assert counts.total() == 0, counts
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < size // PAGE_SIZE + 100, "of 80 frames"
    previous.free()
    free_heap.trim()
    assert free_heap.statistics().cached == 0


def test_frames_that_wander_ask_seldom(session: hc.Session, other: hc.Session) -> None:
    """64 KiB frames that one session allocates and another frees: both ask for and give back many at once."""
    heap = session.create_heap("frames", serialize=False)
    theirs = other.open_heap("frames")
    requests = count_requests(session), count_requests(other)
    for turn in range(1_200):
        if turn == 600:
            for counts in requests:
                counts.clear()
        other.open(heap.alloc(64 * KIB).handle).free()
    assert sum(counts.total() for counts in requests) * 4 <= 600, requests
    theirs.trim()
    check_empty(heap)


# -- giving back -------------------------------------------------------------------------------------------------------
def fill_cache(heap: hc.Heap) -> None:
    for block in [heap.alloc(size) for size in (64, 1000, 70_000, 1 * MIB) for _ in range(20)]:
        block.free()


def test_trim_gives_everything_back(session: hc.Session, shared: hc.Heap) -> None:
    """Blocks in use stay; the heap works on."""
    block = shared.alloc(100)
    fill_cache(shared)
    assert cached_by(shared, session) > 0
    shared.trim()
    assert cached_by(shared, session) == 0
    assert shared.statistics().busy_blocks == 1
    block.free()
    check_empty(shared)


@pytest.mark.parametrize("how", ["heap", "session"])
def test_close_gives_everything_back(other: hc.Session, shared: hc.Heap, theirs: hc.Heap, how: str) -> None:
    """Of a heap that others have open, too."""
    fill_cache(theirs)
    number = other.number
    assert any(entry.session == number for entry in blocks_of(shared, EntryKind.CACHED))
    (theirs if how == "heap" else other).close()
    assert blocks_of(shared, EntryKind.CACHED) == []
    check_empty(shared)


def test_compact_asks_the_others_back_at_their_next_call(other: hc.Session, shared: hc.Heap, theirs: hc.Heap) -> None:
    """The epoch: their front ends start anew, and allocate again."""
    fill_cache(theirs)
    kept = theirs.alloc(1000)
    shared.compact()
    theirs.alloc(64).free()
    assert cached_by(shared, other) <= 1
    kept.free()
    theirs.trim()
    check_empty(shared)


def test_a_destroyed_heap_is_gone_for_all(shared: hc.Heap, theirs: hc.Heap) -> None:
    """Neither cached nor allocated blocks can be had from it, by hot path or slow."""
    fill_cache(theirs)
    block = theirs.alloc(64)
    shared.destroy()
    for use in (lambda: theirs.alloc(64), lambda: theirs.alloc(0), block.free, theirs.trim, lambda: block.view):
        with pytest.raises(errors.HeapDestroyedError):
            use()


def test_blocks_are_given_back_in_batches(session: hc.Session, free_heap: hc.Heap) -> None:
    """8,000 blocks that were allocated in batches go back in few requests."""
    blocks = free_heap.alloc_many(64, 8_000)
    counts = count_requests(session)
    for block in blocks:
        block.free()
    free_heap.trim()
    assert counts.total() <= 40, counts


# -- memory is short ---------------------------------------------------------------------------------------------------
@pytest.fixture
def tight(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon that may commit 64 MiB."""
    return start_daemon("--commit-limit", "64MiB")


def test_another_heaps_cache_makes_room(tight: Daemon) -> None:
    """Of the same session: at once."""
    with hc.connect(tight.endpoint, autostart=False) as session:
        first, second = session.create_heap(), session.create_heap(serialize=False)
        for block in [first.alloc(10 * MIB) for _ in range(4)]:
            block.free()
        assert first.statistics().cached == 40 * MIB
        assert second.alloc(40 * MIB).size == 40 * MIB
        assert first.statistics().cached == 0


def test_another_sessions_cache_makes_room(tight: Daemon) -> None:
    """It is asked back at its next call; until then the refusal is a HeapFullError."""
    with hc.connect(tight.endpoint, autostart=False) as rich, hc.connect(tight.endpoint, autostart=False) as poor:
        cache, heap = rich.create_heap(serialize=False), poor.create_heap(serialize=False)
        for block in [cache.alloc(10 * MIB) for _ in range(4)]:
            block.free()
        with pytest.raises(errors.HeapFullError):
            heap.alloc(40 * MIB)
        cache.alloc(16).free()
        assert heap.alloc(40 * MIB).size == 40 * MIB


def _cache_and_work(endpoint: str, heap_name: str | None, ready: int) -> None:
    """Cache 40 MiB, of a heap of its own or of that one, and be at work with a heap from then on."""
    session = hc.connect(endpoint, autostart=False)
    heap = session.create_heap(serialize=False) if heap_name is None else session.open_heap(heap_name)
    anchor = heap.alloc(64)  # its slab must not come to lie in the middle of a fixed heap, and divide what is free
    for block in [heap.alloc(10 * MIB) for _ in range(4)]:
        block.free()
    os.write(ready, b"!")
    while anchor:
        heap.alloc(64).free()


_NEEDS: dict[str, Callable[[hc.Session, hc.Heap], Any]] = {
    "alloc": lambda session, heap: heap.alloc(40 * MIB),
    "many small": lambda session, heap: [heap.alloc(60_000) for _ in range(600)],
    "alloc_many": lambda session, heap: heap.alloc_many([20 * MIB, 20 * MIB]),
    "realloc": lambda session, heap: heap.alloc(1 * MIB).realloc(40 * MIB),
    "create_heap": lambda session, heap: session.create_heap(initial=40 * MIB),
}


@pytest.mark.parametrize(
    ("need", "bound"), [*((need, "commit") for need in _NEEDS), ("alloc", "heap"), ("many small", "heap")]
)
def test_the_cache_of_a_session_at_work_makes_room_before_anything_fails(tight: Daemon, need: str, bound: str) -> None:
    """It gives back at its next call, which whoever is short of memory waits for some moments: with what the daemon
    may commit as the bound, or with the maximum of the heap that both use, under its mutex."""
    with hc.connect(tight.endpoint, autostart=False) as session:
        is_shared = bound == "heap"
        heap = session.create_heap("fixed", maximum=48 * MIB) if is_shared else session.create_heap()
        reader, writer = os.pipe()
        pid = fork(lambda: _cache_and_work(tight.endpoint, "fixed" if is_shared else None, writer))
        try:
            assert os.read(reader, 1) == b"!"
            assert _NEEDS[need](session, heap)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            os.close(writer)


def _cache_stop_and_work(endpoint: str) -> None:
    """Cache 40 MiB, stop, and when continued be at work with the heap."""
    heap = hc.connect(endpoint, autostart=False).create_heap(serialize=False)
    for block in [heap.alloc(10 * MIB) for _ in range(4)]:
        block.free()
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        heap.alloc(64).free()


def test_who_is_at_work_on_a_busy_machine_is_waited_for(tight: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose process gets no CPU for 50 ms still gives back in time."""
    naps: list[float] = []
    pid = fork(lambda: _cache_stop_and_work(tight.endpoint))

    def nap(pause_s: float) -> None:
        naps.append(pause_s)
        if sum(naps) > 0.05:
            os.kill(pid, signal.SIGCONT)
            wait_until(lambda: session.statistics().heaps < 24 * MIB)

    try:
        os.waitpid(pid, os.WUNTRACED)
        monkeypatch.setattr("heapd_client.session.sleep", nap)
        with hc.connect(tight.endpoint, autostart=False) as session:
            assert session.create_heap().alloc(40 * MIB).size == 40 * MIB
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_who_is_alone_does_not_wait_for_others(tight: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else can have cached anything: the refusal comes at once."""
    naps: list[float] = []
    monkeypatch.setattr("heapd_client.session.sleep", naps.append)
    with hc.connect(tight.endpoint, autostart=False) as session:
        heap = session.create_heap(maximum=1 * MIB)
        kept = heap.alloc(600 * KIB)
        with pytest.raises(errors.HeapFullError):
            heap.alloc(600 * KIB)
        with pytest.raises(errors.HeapFullError):
            session.create_heap().alloc(100 * MIB)
        assert naps == []
        kept.free()


def test_a_lease_that_finds_no_memory_for_all_takes_what_there_is(tight: Daemon) -> None:
    """Up to the limit block by block, then HeapFullError; freed blocks can be had again."""
    with hc.connect(tight.endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=False)
        blocks: list[hc.Block] = []

        def allocate_all() -> None:
            while True:
                blocks.append(heap.alloc(60_000))

        with pytest.raises(errors.HeapFullError):
            allocate_all()
        assert len(blocks) * 60_000 > 55 * MIB
        for _ in range(3):
            blocks.pop().free()
            blocks.append(heap.alloc(60_000))
        for block in blocks:
            block.free()
        check_empty(heap)


# -- who may cache what ------------------------------------------------------------------------------------------------
def test_a_heap_that_frees_orphans_lets_each_cache_its_own(session: hc.Session, other: hc.Session) -> None:
    """The daemon may be freeing the block of a session that died: others' blocks are freed by the daemon."""
    heap = session.create_heap("orphans", serialize=False, orphans="free")
    theirs = other.open_heap("orphans")
    blocks = [theirs.alloc(64) for _ in range(50)]
    for block in blocks[:25]:
        session.open(block.handle).free()
    assert cached_by(heap, session) == 0
    with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
        blocks[0].free()
    other.close()
    wait_until(lambda: heap.statistics().busy_blocks == 0)
    assert heap.statistics().cached_blocks == 0
    check_empty(heap)


@pytest.mark.parametrize("size", [64, 70_000])
def test_a_block_moved_by_another_session_is_freed_at_once(session: hc.Session, other: hc.Session, size: int) -> None:
    """Also in a heap that frees orphans, where the word was not the other session's to write: whoever else has a handle
    is told, and can neither free the block nor move it once more."""
    heap = session.create_heap("orphans", orphans="free")
    other.open_heap("orphans")
    blocks = heap.alloc_many(size, 3)
    for block in blocks:
        block.view[:4] = b"mine"
    moved = [other.open(block.handle).realloc(3 * size) for block in blocks]
    with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
        blocks[0].free()
    with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
        blocks[1].realloc(9 * size)
    with pytest.raises(errors.StaleHandleError):
        other.open(blocks[2].handle)
    assert [bytes(block.view[:4]) for block in moved] == [b"mine"] * 3
    assert heap.statistics().busy_blocks == 3
    other.close()
    wait_until(lambda: heap.statistics().busy_blocks == 0)
    check_empty(heap)


def test_cached_blocks_of_an_executable_heap_stay_executable(session: hc.Session, other: hc.Session) -> None:
    """Freed and allocated again, by whoever: code in them runs."""
    import ctypes

    try:
        heap = session.create_heap("code", executable=True, serialize=False)
    except errors.ExecuteError:
        pytest.skip("/dev/shm is mounted noexec")
    theirs = other.open_heap("code")
    assert heap.info.flags & F_EXECUTABLE
    code = bytes.fromhex("b82a000000c3")  # mov eax, 42; ret
    for turn in range(20):
        block = (heap if turn % 2 else theirs).alloc(64)
        opened = (other if turn % 2 else session).open(block.handle)
        block.view[: len(code)] = code
        assert ctypes.CFUNCTYPE(ctypes.c_int)(opened.heap.mapping.pointer + opened.address)() == 42
        opened.free()
    theirs.trim()
    check_empty(heap)


@pytest.mark.parametrize(("size", "form"), [(64, SLAB_WORD), (70_000, RUN_WORD)])
def test_generations_wrap_past_zero(session: hc.Session, free_heap: hc.Heap, size: int, form: WordFormat) -> None:
    """After the last generation comes 1: a handle of zeros never names a block, nor does the one from before."""
    block = free_heap.alloc(size)
    words = free_heap.mapping.words
    last = form.busy(session.number, form.generation_mask, size)
    words[block.slot], block._word = last, last
    handle = block.handle
    assert handle.generation == form.generation_mask
    assert session.open(handle).size == size
    block.free()
    del block  # else the next one's object is a new one, of another generation
    again = free_heap.alloc(size)
    assert again.address == handle.address
    assert again.generation == 1
    for stale in (handle, handle._replace(generation=0)):
        with pytest.raises(errors.StaleHandleError):
            session.open(stale)
    again.free()
    check_empty(free_heap)


def test_reading_a_block_that_is_gone_commits_nothing(session: hc.Session, other: hc.Session) -> None:
    """A free through an object whose slab went long ago touches no page of it."""
    heap = session.create_heap("gone", serialize=False)
    blocks = [heap.alloc(3000) for _ in range(100)]
    stale = [other.open(block.handle) for block in blocks]
    for block in blocks:
        block.free()
    heap.compact()
    committed = session.statistics().committed
    for block in stale:
        with pytest.raises((errors.DoubleFreeError, errors.StaleHandleError)):
            block.free()
    assert os.stat(f"/dev/shm/{session.segment}").st_blocks * 512 == committed == session.statistics().committed


@pytest.mark.parametrize("live", range(10))
def test_a_block_allocated_and_freed_in_turn_takes_the_hot_path(
    free_heap: hc.Heap, monkeypatch: pytest.MonkeyPatch, live: int
) -> None:
    """However many others are allocated for good, after a few turns: also where they took what was spare."""
    slow: list[int] = []
    allocate = FrontEnd.allocate
    monkeypatch.setattr(
        FrontEnd, "allocate", lambda front, size, *rest: (slow.append(size), allocate(front, size, *rest))[1]
    )

    def take_turns(count: int) -> None:
        for _ in range(count):
            block = free_heap.alloc(64)
            block.free()

    take_turns(50)
    kept = [free_heap.alloc(64) for _ in range(live)]
    take_turns(50)
    slow.clear()
    take_turns(100)
    assert slow == []
    free_heap.free_many(kept)
