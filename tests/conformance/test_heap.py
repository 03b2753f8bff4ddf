"""What a heap is, whichever way it is reached: one suite over the heap itself and over clients of a daemon."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from heapd.errors import (
    BlockTooLargeError,
    CannotResizeInPlaceError,
    ClosedError,
    DoubleFreeError,
    HeapFullError,
    NotABlockError,
    StaleHandleError,
)
from heapd.records import EntryKind
from heapd.sizeclass import CLASSES, MAX_CLASS_SIZE
from tests.conformance.conftest import MakeSubject
from tests.conformance.subjects import Piece, Subject
from tests.invariants import check_sums, check_tiling

FREED = (ClosedError, DoubleFreeError, StaleHandleError, NotABlockError)


def check(subject: Subject, live: dict[int, tuple[Piece, bytes]]) -> None:
    """The heap is valid, and holds just these blocks with these bytes."""
    assert subject.violations() == []
    entries = subject.entries()
    check_tiling(entries)
    busy = {(entry.address, entry.size) for entry in entries if entry.kind is EntryKind.BUSY}
    assert busy == {(piece.address, piece.size) for piece, _ in live.values()}
    statistics = subject.statistics()
    check_sums(statistics)
    assert statistics.busy_blocks == len(live)
    assert statistics.busy == sum(piece.size for piece, _ in live.values())
    for piece, text in live.values():
        assert subject.read(piece) == text


def test_every_class_serves_its_bounds(subject: Subject) -> None:
    """The smallest and the largest request of each class, and the empty one: room enough, aligned, apart."""
    sizes = {0, 1} | {size for each in CLASSES for size in (each.extent, min(each.extent + 1, MAX_CLASS_SIZE))}
    pieces = [subject.alloc(size) for size in sorted(sizes)]
    spans = sorted((piece.address, piece.address + piece.extent) for piece in pieces)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for piece in pieces:
        assert piece.extent >= piece.size
        alignment = 4096 if piece.size and piece.size % 4096 == 0 else 64 if piece.size >= 64 else 16
        assert piece.address % alignment == 0
    assert subject.violations() == []
    for piece in pieces:
        subject.free(piece)
    assert subject.statistics().busy_blocks == 0


def test_bytes_stay_with_their_block(subject: Subject) -> None:
    """Filling each block to its last byte disturbs no other one."""
    live = {}
    for number, size in enumerate([1, 16, 17, 100, 1_000, 4_096, 5_000, 65_536, 65_537, 300_000] * 3):
        piece = subject.alloc(size)
        text = bytes([number + 1]) * size
        subject.write(piece, text)
        live[piece.address] = piece, text
    check(subject, live)


def test_a_freed_block_cannot_be_freed_again(subject: Subject) -> None:
    """Small or large, with neighbours or without."""
    for size in (20, 5_000, 200_000):
        keep, piece = subject.alloc(size), subject.alloc(size)
        subject.free(piece)
        with pytest.raises(FREED):
            subject.free(piece)
        subject.free(keep)
        with pytest.raises(FREED):
            subject.free(keep)
    assert subject.violations() == []


def test_a_place_used_again_has_another_generation(subject: Subject) -> None:
    """So a stale handle never names the new block."""
    for size in (20, 200_000):
        keep = subject.alloc(size)
        seen = set()
        for _ in range(50):
            piece = subject.alloc(size)
            assert (piece.address, piece.generation) not in seen
            seen.add((piece.address, piece.generation))
            subject.free(piece)
        subject.free(keep)


def test_resize_in_place_keeps_address_and_bytes(subject: Subject) -> None:
    """Within the extent always; a run may shrink, and grow again into what it gave up."""
    for old, new in ((100, 110), (100, 1), (300_000, 100_000), (300_000, 302_000)):
        piece = subject.alloc(old)
        subject.write(piece, b"\x07" * old)
        address = piece.address
        subject.resize(piece, new)
        assert (piece.address, piece.size) == (address, new)
        assert subject.read(piece)[: min(old, new)] == b"\x07" * min(old, new)
        subject.resize(piece, min(old, new))
    assert subject.violations() == []


def test_resize_without_room_changes_nothing(subject: Subject) -> None:
    """CannotResizeInPlaceError, and the block is as it was."""
    piece = subject.alloc(100)
    subject.write(piece, b"\x07" * 100)
    with pytest.raises(CannotResizeInPlaceError):
        subject.resize(piece, 100_000)
    check(subject, {piece.address: (piece, b"\x07" * 100)})


def test_a_full_heap_refuses_and_goes_on(make_subject: MakeSubject) -> None:
    """HeapFullError with figures; what was freed can be had again."""
    subject = make_subject(maximum=1 << 20)
    pieces = [subject.alloc(10_000) for _ in range(80)]
    with pytest.raises(HeapFullError) as caught:
        pieces += (subject.alloc(10_000) for _ in range(80))
    assert caught.value.limit == 1 << 20
    assert subject.violations() == []
    subject.free(pieces.pop())
    pieces.append(subject.alloc(10_000))
    for piece in pieces:
        subject.free(piece)
    assert subject.statistics().busy_blocks == 0


def test_a_block_larger_than_may_be_is_refused(make_subject: MakeSubject) -> None:
    """By the heap's own limit, its maximum, or what a state word holds."""
    subject = make_subject(maximum=1 << 20, max_block=50_000)
    subject.alloc(50_000)
    for size in (50_001, 2 << 20, 2**36, 2**64 - 1):
        with pytest.raises(BlockTooLargeError):
            subject.alloc(size)


def test_compact_gives_all_back_but_a_little(subject: Subject) -> None:
    """After free-all and compact next to nothing stays committed; what compact tells was committed before."""
    pieces = [subject.alloc(size) for size in [50, 5_000, 300_000] * 20]
    for piece in pieces:
        subject.free(piece)
    before = subject.statistics().committed
    assert 0 < subject.compact() <= before
    assert subject.statistics().committed <= 64 * 1024
    assert subject.violations() == []


@pytest.mark.parametrize("seed", range(3))
def test_a_heap_does_what_a_dict_of_bytes_does(subject: Subject, seed: int) -> None:
    """Random operations beside a dict of bytes; the seed and the step tell how to get there again."""
    dice = random.Random(seed)
    live: dict[int, tuple[Piece, bytes]] = {}
    for step in range(250):
        roll = dice.random()
        if roll < 0.5 or not live:
            size = int(2 ** dice.uniform(0, 18)) - 1
            piece = subject.alloc(size)
            text = bytes([step % 255 + 1]) * size
            subject.write(piece, text)
            assert piece.address not in live, (seed, step)
            live[piece.address] = piece, text
        elif roll < 0.8:
            piece, text = live.pop(dice.choice(sorted(live)))
            assert subject.read(piece) == text, (seed, step)
            subject.free(piece)
        elif roll < 0.97:
            address = dice.choice(sorted(live))
            piece, text = live[address]
            size = dice.randrange(2 * piece.size + 2)
            try:
                subject.resize(piece, size)
            except CannotResizeInPlaceError:
                continue
            text = (text + subject.read(piece)[len(text) :])[:size]
            assert subject.read(piece) == text, (seed, step)
            live[address] = piece, text
        else:
            subject.compact()
        if step % 10 == 0:
            check(subject, live)
    for piece, _ in live.values():
        subject.free(piece)
    check(subject, {})
