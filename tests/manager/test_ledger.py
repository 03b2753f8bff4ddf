"""What the ledger does for a manager: what is remembered over a restart, and what happens where memory is short."""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Iterator

import pytest

from heapd.errors import HeapExistsError, HeapFullError, SegmentError
from heapd.journal import BLOCK_SHIFT
from heapd.layout import H_INCARNATION
from heapd.manager import HeapManager
from heapd.manager.ledger import Ledger, Volume
from heapd.manager.ledger.records import pack_bits, unpack_bits
from heapd.records import Grant, HeapInfo
from heapd.sizeclass import CLASSES
from heapd.units import MIB, format_size
from heapd.wire import messages as m
from tests.arenas import finish
from tests.invariants import check_manager, fill, pattern, read
from tests.manager.clients import Client, names
from tests.manager.ledgers import Mortal, mortal, portrait


@pytest.fixture
def it() -> Iterator[Mortal]:
    with mortal() as it:
        yield it


@pytest.fixture
def client(it: Mortal) -> Client:
    return Client(it.manager)


def again(it: Mortal, client: Client) -> Client:
    """The client after a restart: the same session."""
    client.manager = it.restart()
    session = it.manager.sessions.find(client.number)
    assert session is not None
    assert session.token == client.session.token
    client.session = session
    return client


def give_back(client: Client, heap: HeapInfo, grants: list[Grant]) -> None:
    assert client.ask(m.HeapGiveBack(heap.heap_id, names(grants))) == len(grants)


def ledger_of(manager: HeapManager) -> Ledger:
    ledger = manager.arena.journal
    assert isinstance(ledger, Ledger)
    return ledger


# -- what is written ---------------------------------------------------------------------------------------------------
def test_every_block_has_a_number_of_its_own() -> None:
    """A change that names a slab's block has room for the index of the largest slab's last."""
    assert max(kind.block_count for kind in CLASSES) <= 1 << BLOCK_SHIFT


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 500, 8192])
def test_what_is_lent_is_packed_in_bits(count: int) -> None:
    """An eighth of a byte a block, whatever blocks they are."""
    generator = random.Random(count)
    flags = bytes(generator.randrange(2) for _ in range(count))
    packed = pack_bits(flags)
    assert len(packed) == count // 8 + 1
    assert unpack_bits(packed) == flags


def test_a_request_that_changes_nothing_writes_nothing(it: Mortal, client: Client) -> None:
    """Looking costs no record, and neither does what is refused."""
    heap = client.create("x")
    client.alloc(heap, 100)
    before = ledger_of(it.manager).sequence
    client.walk(heap)
    client.statistics(heap)
    client.validate(heap)
    with pytest.raises(HeapExistsError):
        client.create("x")
    assert ledger_of(it.manager).sequence == before
    client.alloc(heap, 100)
    assert ledger_of(it.manager).sequence == before + 1


# -- what is remembered ------------------------------------------------------------------------------------------------
def test_blocks_have_their_bytes(it: Mortal, client: Client) -> None:
    """In slabs, runs and regions of their own; allocated and freed by the next process as by the one before."""
    heap = client.create("x")
    grants = [client.alloc(heap, size) for size in (10, 5000, 200_000, 3 * MIB)]
    for seed, grant in enumerate(grants):
        fill(it.manager.arena, grant.address, grant.extent, seed)
    again(it, client)
    for seed, grant in enumerate(grants):
        assert read(it.manager.arena, grant.address, grant.extent) == pattern(grant.extent, seed)
    client.free_many(heap, grants)
    assert client.statistics(heap).busy_blocks == 0
    check_manager(it.manager)


@pytest.mark.parametrize("is_compacted", [False, True])
def test_the_last_answers_are_remembered(it: Mortal, client: Client, is_compacted: bool) -> None:
    """Each with what it was for: whatever was done was answered, too. As many as the service keeps."""
    for request_id in range(1, 101):
        HeapManager.handle(it.manager, client.session, m.HeapCreate(f"h{request_id}", 0, 0, 0))
        answer = b"answer %d" % request_id
        client.session.replies[request_id] = answer
        if len(client.session.replies) > m.KEPT_REPLIES:
            del client.session.replies[request_id - m.KEPT_REPLIES]
        it.manager.commit(client.session, request_id, answer)
    if is_compacted:
        finish(it.manager.compaction())
    again(it, client)
    assert len(it.manager.heaps) == 100
    assert client.session.replies == {number: b"answer %d" % number for number in range(37, 101)}


def test_a_session_that_was_ending_is_ended_by_the_next_process(it: Mortal, client: Client) -> None:
    """Its process is dead and nobody asks again; what it left is dealt with where the death cut in."""
    heap = client.create_persistent("x")
    other = Client(it.manager)
    other.open("x")
    for _ in range(12):
        other.lease(heap, 16, 512)
    job = it.manager.end_session(other.session)
    next(job)
    assert client.statistics(heap).cached_blocks > 0
    again(it, client)
    assert portrait(it.manager)["sessions"][1][0][-1], "its end goes on"
    for job in it.manager.resume():
        finish(job)
    assert client.statistics(heap).cached_blocks == 0
    assert it.manager.sessions.find(other.number) is None
    check_manager(it.manager)


def test_incarnations_are_counted(it: Mortal, client: Client) -> None:
    """In the ledger, whatever the arena's header says; the header is told."""
    it.manager.arena.words[H_INCARNATION] = 77
    it.restart()
    assert it.manager.arena.words[H_INCARNATION] == 2
    it.restart()
    assert it.manager.arena.words[H_INCARNATION] == 3


def test_what_clients_scribbled_while_nobody_served_is_written_anew(it: Mortal, client: Client) -> None:
    """Page map, slab heads and control blocks follow from the records; only lent blocks' words are believed."""
    heap = client.create("x")
    grants = [client.alloc(heap, 64) for _ in range(10)]
    arena = it.manager.arena
    slot = grants[0].slot - 1
    arena.words[slot] = 12345  # the slab's head
    arena.words[arena.shape.control_slot(heap.heap_id & 0xFFFF)] = 99
    arena.words[arena.shape.directory // 8 + (grants[0].address >> 21)] = 1 << 61 | 5
    client.free(heap, grants[3])
    arena.words[grants[3].slot] = 7
    again(it, client)
    assert client.validate(heap) == []
    check_manager(it.manager)


# -- compaction --------------------------------------------------------------------------------------------------------
def test_a_large_ledger_is_compacted(it: Mortal, client: Client) -> None:
    """When it is due the manager says so, once; then the ledger is small, and holds the same."""
    heap = client.create("x")
    ledger = ledger_of(it.manager)
    ledger._threshold = 300_000
    assert it.manager.take_chores() == []
    kept = [client.alloc(heap, 100) for _ in range(10)]
    while not ledger.is_large:  # as 300 KB are here
        give_back(client, heap, client.lease(heap, 16, 512))
    (job,) = it.manager.take_chores()
    next(job, None)
    assert it.manager.take_chores() == [], "one is under way"
    finish(job)
    assert ledger.volume.active.end < 20_000
    assert ledger.volume.segment.allocated_bytes < 8 * MIB
    before = portrait(it.manager)
    again(it, client)
    assert portrait(it.manager) == before
    client.free_many(heap, kept)


# -- memory that runs out ----------------------------------------------------------------------------------------------
class FullForLedger:
    """Stands in for posix_fallocate: there is no memory for the ledger; for the arena there is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, manager: HeapManager) -> None:
        real = os.posix_fallocate
        ledger = ledger_of(manager).volume.segment.fd
        self.is_full = True

        def fallocate(fd: int, offset: int, size: int) -> None:
            if fd == ledger and self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(fd, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", fallocate)


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledgers that are made from now on commit little ahead, so that they are soon short."""
    monkeypatch.setattr("heapd.manager.ledger.volume._STEP", 1 << 16)
    monkeypatch.setattr("heapd.manager.ledger.volume._AHEAD", 200_000)
    monkeypatch.setattr("heapd.manager.ledger.ledger._LAST_ROOM", 50_000)


def test_where_records_find_no_memory_requests_are_refused(
    little_room: None, it: Mortal, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that take first; what gives back goes on for thousands of requests more. Nothing is done half, and with
    memory all goes on."""
    heap = client.create("x")
    full = FullForLedger(monkeypatch, it.manager)
    grants: list[Grant] = []

    def allocate_for_ever() -> None:
        while True:
            grants.extend(client.alloc_many(heap, [16] * 400))

    with pytest.raises(HeapFullError) as caught:
        allocate_for_ever()
    error = caught.value
    assert error.bound == "memory"
    assert error.requested == 1 << 16
    assert re.match(
        rf"the daemon's own records, which have {format_size(error.used)}, need {format_size(error.requested)} more "
        r".*, and /dev/shm has .* left; free blocks, or enlarge /dev/shm ",
        str(error),
    )
    before = portrait(it.manager)
    with pytest.raises(HeapFullError):
        client.create("y")
    assert portrait(it.manager) == before
    for grant in grants[:2000]:
        client.free(heap, grant)
    again(it, client)
    assert client.statistics(heap).busy_blocks == len(grants) - 2000
    full.is_full = False
    client.alloc_many(heap, [16] * 400)
    client.free_many(heap, grants[2000:4000])
    check_manager(it.manager)


def test_a_compaction_without_memory_is_put_off(it: Mortal, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log goes on as it was."""
    heap = client.create("x")
    FullForLedger(monkeypatch, it.manager)
    finish(it.manager.compaction())
    client.alloc(heap, 16)
    before = portrait(it.manager)
    again(it, client)
    assert portrait(it.manager) == before


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_an_arena_that_is_another_one_is_refused(it: Mortal, client: Client) -> None:
    """The ledger knows its arena's file, whatever is written in it."""
    client.create("x")
    with mortal() as other:
        other.manager.arena.segment.buffer[:4096] = it.manager.arena.segment.buffer[:4096]
        with pytest.raises(SegmentError, match="another one"):
            HeapManager.recover(other.arena_name, it.ledger_name)


def test_records_that_make_no_sense_are_refused(it: Mortal, client: Client) -> None:
    """Whole by their checksum, and of a slab that never was: no kill does that, so nothing is guessed."""
    volume = Volume.open(it.ledger_name)
    list(volume.active.frames())
    volume.active.append(bytes.fromhex("96 01 00 00 00 c4 00 91 ce 00 ff ff ff".replace(" ", "")))
    volume.segment.close()
    with pytest.raises(SegmentError, match="no sense"):
        HeapManager.recover(it.arena_name, it.ledger_name)
