"""heapd.arena: FREE -> RESERVED -> COMMITTED and back, what it costs, and what the header tells of it."""

from __future__ import annotations

import os
import random

import pytest

from heapd.arena import Arena, remove_segment, segment_exists
from heapd.errors import HeapFullError, InvalidArgumentError, SegmentError
from heapd.layout import (
    CHUNK_PAGES,
    H_COMMIT_LIMIT,
    H_COMMITTED,
    H_CONTROLS_READY,
    H_HEAP_LIMIT,
    H_INSTANCE,
    H_MAGIC,
    H_PAGE_COUNT,
    H_PID,
    H_RESERVED,
    H_START_TIME,
    H_STATE,
    H_VERSION,
    KIND_RUN,
    KIND_SPARE,
    LAYOUT_VERSION,
    MAGIC,
    MAX_HEAPS,
    PAGE_COMMITTED,
    PAGE_FREE,
    PAGE_RESERVED,
    RUNNING,
    STARTING,
    STOPPED,
    split_page_word,
)
from heapd.units import GRANULE_PAGES, GRANULE_SIZE, KIB, MIB, PAGE_SIZE, TIB
from tests.arenas import Commits, fail_each_commit, private_arena
from tests.harness import unique_name
from tests.invariants import check_page_map


def states(arena: Arena, first: int, count: int) -> list[int]:
    return [arena.state_of(page) for page in range(first, first + count)]


# -- birth and death ---------------------------------------------------------------------------------------------------
def test_the_header_tells_what_a_reader_needs(arena: Arena) -> None:
    """Magic, layout, identity, geometry and limits, from which every table is found."""
    words = arena.words
    assert (words[H_MAGIC], words[H_VERSION], words[H_STATE]) == (MAGIC, LAYOUT_VERSION, STARTING)
    assert bytes(arena.segment.buffer[H_INSTANCE * 8 : H_INSTANCE * 8 + 16]) == arena.instance
    assert (words[H_PAGE_COUNT], words[H_HEAP_LIMIT]) == (256 * MIB // PAGE_SIZE, MAX_HEAPS)
    assert (words[H_COMMIT_LIMIT], words[H_RESERVED]) == (200 * MIB, 0)
    assert words[H_COMMITTED] == arena.segment.allocated_bytes


def test_a_new_arena_commits_a_few_pages_of_tables_and_no_more(arena: Arena) -> None:
    """Header and page directory; everything else waits until it is used."""
    assert arena.segment.allocated_bytes == 2 * PAGE_SIZE
    check_page_map(arena)


def test_a_terabyte_of_reserve_costs_little() -> None:
    """The directory is all that grows: 8 bytes for 2 MiB of address space."""
    with private_arena(reserve=TIB) as arena:
        assert arena.segment.allocated_bytes == TIB // (2 * MIB) * 8 + PAGE_SIZE


def test_starting_and_stopping_are_told_in_the_header(arena: Arena) -> None:
    """RUNNING with the server's pid and start time; STOPPED reaches those who still have it mapped."""
    arena.start(4321, 98765)
    words = arena.words
    assert (words[H_STATE], words[H_PID], words[H_START_TIME]) == (RUNNING, 4321, 98765)
    other = os.open(f"/dev/shm/{arena.segment.name}", os.O_RDONLY)
    arena.stop()
    assert os.pread(other, 8, H_STATE * 8) == STOPPED.to_bytes(8, "little")
    os.close(other)
    assert not segment_exists(arena.segment.name)


def test_every_arena_has_an_instance_of_its_own() -> None:
    """A handle of one is never good in another, even of the same name."""
    with private_arena() as one, private_arena() as other:
        assert one.instance != other.instance


def test_two_arenas_of_one_name_are_refused(arena: Arena) -> None:
    """The segment is there: another daemon has it."""
    with pytest.raises(SegmentError):
        Arena.create(arena.segment.name, reserve=16 * MIB)
    assert segment_exists(arena.segment.name)


@pytest.mark.parametrize("reserve", [0, 1, 16 * MIB - 1])
def test_a_reserve_that_holds_no_more_than_tables_is_refused(reserve: int) -> None:
    """The error says how much is needed, and nothing is left."""
    name = f"heapd-{unique_name()}"
    with pytest.raises(InvalidArgumentError, match="16 MiB"):
        Arena.create(name, reserve=reserve)
    assert not segment_exists(name)


def test_the_smallest_reserve_works() -> None:
    """16 MiB and a little leave room for heaps beside the tables."""
    with private_arena(reserve=16 * MIB + 1) as arena:
        assert arena.shape.size == 16 * MIB + GRANULE_SIZE
        arena.reserve(GRANULE_PAGES, 0)


def test_an_arena_whose_tables_do_not_fit_leaves_nothing_behind() -> None:
    """No name in /dev/shm, no mapping, no file descriptor."""
    name = f"heapd-{unique_name()}"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HeapFullError):
        Arena.create(name, reserve=16 * MIB, commit_limit=PAGE_SIZE)
    assert not remove_segment(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_arena_whose_every_commit_fails_leaves_nothing_behind(commits: Commits) -> None:
    """The same for a /dev/shm that is full at any moment of the making."""
    name = f"heapd-{unique_name()}"
    before = len(os.listdir("/proc/self/fd"))
    for nth in (1, 2):
        commits.fail(nth, persistent=True)
        with pytest.raises(HeapFullError):
            Arena.create(name, reserve=16 * MIB, commit_limit=MIB)
        assert not segment_exists(name)
    assert len(os.listdir("/proc/self/fd")) == before


# -- reserve, release --------------------------------------------------------------------------------------------------
def test_reserving_begins_on_64_kib_and_costs_no_payload_page(arena: Arena) -> None:
    """RESERVED, described as the heap's spare pages; only the page map may grow."""
    first = arena.reserve(3 * GRANULE_PAGES, 7)
    assert first * PAGE_SIZE % GRANULE_SIZE == 0
    assert states(arena, first, 48) == [PAGE_RESERVED] * 48
    assert split_page_word(arena.pages.word(first + 47)) == (PAGE_RESERVED, KIND_SPARE, 7, first)
    assert arena.segment.allocated_bytes <= 4 * PAGE_SIZE
    assert arena.reserved == arena.words[H_RESERVED] == 3 * GRANULE_SIZE


def test_released_address_space_is_used_again(arena: Arena) -> None:
    """Best fit: the same place for the same size."""
    first = arena.reserve(GRANULE_PAGES, 1)
    arena.reserve(GRANULE_PAGES, 1)
    arena.release(first, GRANULE_PAGES)
    assert states(arena, first, GRANULE_PAGES) == [PAGE_FREE] * GRANULE_PAGES
    assert arena.reserve(GRANULE_PAGES, 2) == first


def test_without_address_space_the_error_names_the_option(arena: Arena) -> None:
    """HeapFullError of the bound "reserve"; what is left can still be had."""
    with pytest.raises(HeapFullError, match="--reserve") as refused:
        arena.reserve(256 * MIB // PAGE_SIZE, 1)
    error = refused.value
    assert (error.bound, error.requested, error.used) == ("reserve", 256 * MIB, 0)
    assert error.limit == (arena.shape.page_count - arena.shape.first_page) * PAGE_SIZE
    assert arena.reserve(error.limit // PAGE_SIZE, 1) == arena.shape.first_page


def test_reserving_the_pages_behind_a_region_works_only_while_they_are_free(arena: Arena) -> None:
    """What a large block needs to grow where it is."""
    first = arena.reserve(GRANULE_PAGES, 1)
    behind = first + GRANULE_PAGES
    assert arena.reserve_at(behind, GRANULE_PAGES, 1) is True
    assert arena.reserve_at(behind, GRANULE_PAGES, 1) is False
    last = arena.shape.page_count
    assert arena.reserve_at(last, GRANULE_PAGES, 1) is False
    assert arena.reserved == 2 * GRANULE_SIZE


def test_a_page_map_that_cannot_grow_refuses_the_region(commits: Commits) -> None:
    """Nothing has changed when the map's own pages cannot be committed: fail the 1st, 2nd, ... until none."""
    failed = fail_each_commit(
        commits,
        private_arena,
        lambda arena: arena.reserve(CHUNK_PAGES + GRANULE_PAGES, 1),
        lambda arena: arena.reserved,
        check_page_map,
    )
    assert failed == 8


def test_a_page_map_that_cannot_grow_refuses_to_reserve_behind(arena: Arena, commits: Commits) -> None:
    """The pages behind the region stay free, and can be had when there is memory again."""
    first = arena.reserve(GRANULE_PAGES, 1)
    commits.fail(1, persistent=True)
    with pytest.raises(HeapFullError):
        arena.reserve_at(first + GRANULE_PAGES, CHUNK_PAGES, 1)
    assert arena.reserved == GRANULE_SIZE
    commits.work()
    assert arena.reserve_at(first + GRANULE_PAGES, CHUNK_PAGES, 1)
    check_page_map(arena)


# -- commit, decommit --------------------------------------------------------------------------------------------------
def test_commit_is_seen_by_the_kernel_before_any_byte_is_written(arena: Arena) -> None:
    """st_blocks grows by just the pages asked for; they read as zero; committing them again costs nothing."""
    first = arena.reserve(GRANULE_PAGES, 1)
    before = arena.segment.allocated_bytes
    assert arena.commit(first + 2, 5) == 5
    assert arena.segment.allocated_bytes == before + 5 * PAGE_SIZE
    assert states(arena, first, 9) == [PAGE_RESERVED] * 2 + [PAGE_COMMITTED] * 5 + [PAGE_RESERVED] * 2
    assert not any(arena.segment.buffer[(first + 2) * PAGE_SIZE : (first + 7) * PAGE_SIZE])
    assert arena.commit(first + 2, 5) == 0
    assert arena.commit(first, 9) == 4
    assert arena.segment.allocated_bytes == before + 9 * PAGE_SIZE


def test_committing_around_committed_pages_keeps_their_bytes(arena: Arena) -> None:
    """Only the missing pages are committed."""
    first = arena.reserve(GRANULE_PAGES, 1)
    arena.commit(first + 3, 2)
    arena.segment.buffer[(first + 3) * PAGE_SIZE] = 99
    assert arena.commit(first, GRANULE_PAGES) == GRANULE_PAGES - 2
    assert arena.segment.buffer[(first + 3) * PAGE_SIZE] == 99


def test_decommit_gives_the_memory_back_and_the_bytes_read_as_zero(arena: Arena) -> None:
    """COMMITTED to RESERVED, page map and counters included; what was reserved only stays so."""
    first = arena.reserve(GRANULE_PAGES, 3)
    before = arena.segment.allocated_bytes
    arena.commit(first + 1, 4)
    arena.segment.buffer[(first + 1) * PAGE_SIZE : (first + 5) * PAGE_SIZE] = b"x" * (4 * PAGE_SIZE)
    assert arena.decommit(first, GRANULE_PAGES, 3) == 4
    assert arena.segment.allocated_bytes == before == arena.budget.committed == arena.words[H_COMMITTED]
    assert states(arena, first, GRANULE_PAGES) == [PAGE_RESERVED] * GRANULE_PAGES
    arena.commit(first + 1, 4)
    assert not any(arena.segment.buffer[(first + 1) * PAGE_SIZE : (first + 5) * PAGE_SIZE])


def test_descriptions_carry_the_state_of_each_page(arena: Arena) -> None:
    """A run that is committed in part is told page by page."""
    first = arena.reserve(GRANULE_PAGES, 5)
    arena.commit(first + 4, 4)
    arena.describe(first, GRANULE_PAGES, KIND_RUN, 5, first)
    words = [split_page_word(arena.pages.word(page)) for page in range(first, first + GRANULE_PAGES)]
    assert [word.state for word in words] == [1] * 4 + [2] * 4 + [1] * 8
    assert {word[1:] for word in words} == {(KIND_RUN, 5, first)}
    assert arena.stretches(first, GRANULE_PAGES) == [
        (first, 4, False),
        (first + 4, 4, True),
        (first + 8, 8, False),
    ]


def test_the_commit_limit_refuses_whole_and_to_the_page(arena: Arena) -> None:
    """One page too many commits nothing at all; one less succeeds."""
    room = (arena.budget.limit - arena.budget.committed) // PAGE_SIZE - 4  # the page map takes 2 to 4 for the region
    first = arena.reserve(52 * CHUNK_PAGES * 2, 1)
    room = (arena.budget.limit - arena.budget.committed) // PAGE_SIZE
    before = arena.segment.allocated_bytes
    with pytest.raises(HeapFullError) as refused:
        arena.commit(first, room + 1)
    assert (refused.value.bound, refused.value.requested) == ("commit", (room + 1) * PAGE_SIZE)
    assert arena.segment.allocated_bytes == before
    assert arena.commit(first, room) == room
    assert arena.segment.allocated_bytes == arena.budget.limit


@pytest.mark.parametrize("persistent", [False, True])
def test_a_commit_of_several_stretches_is_all_or_nothing(arena: Arena, commits: Commits, persistent: bool) -> None:
    """Whichever stretch the system refuses, those before it are given back: fail the 1st, 2nd, 3rd, ... until none."""
    first = arena.reserve(GRANULE_PAGES, 1)
    arena.commit(first + 2, 1)
    arena.commit(first + 5, 2)
    arena.commit(first + 9, 3)
    arena.segment.buffer[(first + 5) * PAGE_SIZE] = 42
    before = states(arena, first, GRANULE_PAGES), arena.segment.allocated_bytes, arena.budget.committed
    for nth in range(1, 5):
        commits.fail(nth, persistent=persistent)
        with pytest.raises(HeapFullError) as refused:
            arena.commit(first, GRANULE_PAGES)
        assert refused.value.bound == "memory"
        assert (states(arena, first, GRANULE_PAGES), arena.segment.allocated_bytes, arena.budget.committed) == before
    commits.fail(5, persistent=persistent)
    assert arena.commit(first, GRANULE_PAGES) == 10
    assert not commits.failed
    assert arena.segment.buffer[(first + 5) * PAGE_SIZE] == 42


# -- released, not yet decommitted -------------------------------------------------------------------------------------
def test_a_large_region_is_decommitted_in_slices(arena: Arena) -> None:
    """The loop must not stall: 40 MiB take three slices; they count as committed until then."""
    first = arena.reserve(40 * MIB // PAGE_SIZE, 1)
    arena.commit(first, 40 * MIB // PAGE_SIZE)
    before = arena.segment.allocated_bytes
    arena.release(first, 40 * MIB // PAGE_SIZE)
    assert not arena.is_settled
    assert arena.reserved == 0
    slices = 0
    while not arena.is_settled:
        arena.settle()
        slices += 1
        assert arena.segment.allocated_bytes == arena.budget.committed == arena.words[H_COMMITTED]
    assert slices == 3
    assert arena.segment.allocated_bytes == before - 40 * MIB
    arena.settle()


def test_a_commit_that_needs_what_was_released_gets_it(arena: Arena) -> None:
    """Memory that waits to be decommitted is no reason to refuse a block."""
    count = 150 * MIB // PAGE_SIZE
    first = arena.reserve(count, 1)
    arena.commit(first, count)
    small = arena.reserve(80 * MIB // PAGE_SIZE, 1)
    arena.release(first, count)
    assert arena.commit(small, 80 * MIB // PAGE_SIZE)
    assert arena.is_settled


def test_a_region_that_needs_what_was_released_gets_it(arena: Arena) -> None:
    """So with address space."""
    count = 200 * MIB // PAGE_SIZE
    first = arena.reserve(count, 1)
    arena.release(first, count)
    assert arena.reserve(count, 2) == first


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_keeps_states_map_and_kernel_in_step(arena: Arena, seed: int) -> None:
    """Reserve, commit, decommit, release at random: the page map and st_blocks say what the arena says."""
    random_ = random.Random(seed)
    regions: list[tuple[int, int]] = []
    for _ in range(150):
        action = random_.random()
        if action < 0.3 or not regions:
            count = GRANULE_PAGES * random_.choice([1, 2, 5, 31, 64, 130])
            regions.append((arena.reserve(count, 1), count))
        elif action < 0.45:
            arena.release(*regions.pop(random_.randrange(len(regions))))
        else:
            first, count = random_.choice(regions)
            at = random_.randrange(count)
            length = random_.randrange(1, count - at + 1)
            arena.pages.map_edges(first + at, length)
            if action < 0.8:
                arena.commit(first + at, length)
                arena.describe(first + at, length, KIND_RUN, 1, first + at)
            else:
                arena.decommit(first + at, length, 1)
        assert arena.segment.allocated_bytes == arena.budget.committed == arena.words[H_COMMITTED]
        assert arena.reserved == sum(count for _, count in regions) * PAGE_SIZE
    arena.settle_all()
    check_page_map(arena)


# -- statistics and control blocks -------------------------------------------------------------------------------------
def test_statistics_add_up(arena: Arena) -> None:
    """size = tables_reserved + reserved + unreserved; committed = tables + heaps."""
    first = arena.reserve(4 * GRANULE_PAGES, 1)
    arena.commit(first, 10)
    statistics = arena.statistics(1, 2)
    assert statistics.size == 256 * MIB == statistics.tables_reserved + statistics.reserved + statistics.unreserved
    assert statistics.committed == statistics.tables + statistics.heaps == arena.segment.allocated_bytes
    assert (statistics.reserved, statistics.heap_count, statistics.session_count) == (4 * GRANULE_SIZE, 1, 2)
    arena.decommit(first, 10, 1)
    assert arena.statistics(1, 2).peak_committed == statistics.committed


def test_control_blocks_are_committed_a_page_at_a_time_and_once(arena: Arena) -> None:
    """Sixteen heaps share a page; the header says how far clients may read."""
    before = arena.segment.allocated_bytes
    slots = [arena.prepare_control(index) for index in range(17)]
    assert slots == [arena.shape.control_slot(index) for index in range(17)]
    assert arena.segment.allocated_bytes == before + 2 * PAGE_SIZE
    assert arena.words[H_CONTROLS_READY] == 32
    assert arena.prepare_control(3) == slots[3]


def test_a_control_block_that_cannot_be_committed_is_refused(arena: Arena, commits: Commits) -> None:
    """And the header still says that nobody may read it."""
    commits.fail(1, persistent=True)
    with pytest.raises(HeapFullError):
        arena.prepare_control(0)
    assert arena.words[H_CONTROLS_READY] == 0
    commits.work()
    arena.prepare_control(0)


def test_what_a_client_scribbles_on_the_header_does_not_move_the_tables(arena: Arena) -> None:
    """The daemon never asks the header what is committed: a lie there must not lead it to an uncommitted page."""
    arena.words[H_CONTROLS_READY] = 2**64 - 1
    before = arena.segment.allocated_bytes
    slot = arena.prepare_control(40)
    assert arena.segment.allocated_bytes > before
    assert arena.state_of(slot * 8 // PAGE_SIZE) == PAGE_COMMITTED
    assert arena.words[H_CONTROLS_READY] == 48


def test_seeds_of_generations_differ(arena: Arena) -> None:
    """A thousand slabs in the same place begin at a thousand generations."""
    assert len({arena.next_seed() for _ in range(1000)}) == 1000


def test_reading_what_every_page_is_commits_nothing(arena: Arena) -> None:
    """A mapped read of a hole would commit it: readers ask the directory first."""
    first = arena.reserve(100 * GRANULE_PAGES, 1)
    arena.commit(first, 40 * KIB // PAGE_SIZE)
    arena.describe(first, 10, KIND_RUN, 1, first)
    check_page_map(arena)
    assert arena.segment.allocated_bytes == arena.budget.committed
