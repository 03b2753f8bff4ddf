"""The ledger's segment: frames are there or not, whatever moment a kill came at; what cannot be used is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from heapd.arena import Segment, remove_segment
from heapd.errors import SegmentError
from heapd.manager.ledger import Volume
from heapd.manager.ledger import volume as layout
from heapd.units import MIB, PAGE_SIZE
from tests.harness import unique_name


@pytest.fixture
def name() -> Iterator[str]:
    name = f"heapd-{unique_name()}-ledger"
    yield name
    remove_segment(name)


@pytest.fixture
def volume(name: str) -> Iterator[Volume]:
    """A new one, of a small arena."""
    volume = Volume.create(name, instance=bytes(range(16)), page_count=4096, commit_limit=7 * MIB, inode=5)
    volume.seal()
    yield volume
    volume.segment.close()


def reopened(volume: Volume) -> list[bytes]:
    """What the next process reads."""
    again = Volume.open(volume.segment.name)
    try:
        return list(again.active.frames())
    finally:
        again.segment.close()


def test_frames_are_read_in_order(volume: Volume) -> None:
    """Of any length from 1 byte, over page bounds."""
    frames = [bytes([number % 256]) * size for number, size in enumerate([1, 7, 8, 9, 5000, 100_000, 3])]
    for frame in frames:
        volume.active.append(frame)
    assert reopened(volume) == frames


def test_the_header_is_kept(volume: Volume) -> None:
    """Whose ledger it is, and what the arena may have."""
    again = Volume.open(volume.segment.name)
    assert (again.instance, again.page_count, again.commit_limit) == (bytes(range(16)), 4096, 7 * MIB)
    assert again.incarnation == 1
    assert again.count_incarnation() == 2 == volume.incarnation
    again.segment.close()


def test_it_is_its_users_alone(volume: Volume) -> None:
    """Mode 0600: it holds tokens."""
    assert os.fstat(volume.segment.fd).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("written", [0, 1, 8, 15, 23, 24])
def test_a_frame_that_was_begun_is_not_there(volume: Volume, written: int) -> None:
    """Its length is stored last. And what is written after it, once it is trimmed, is not mixed up with its bytes."""
    log = volume.active
    log.append(b"first")
    at = PAGE_SIZE + log.end + 8
    volume.segment.buffer[at : at + written] = b"\xff" * written
    assert reopened(volume) == [b"first"]
    log.trim()
    log.append(b"2")
    log.append(b"third")
    assert reopened(volume) == [b"first", b"2", b"third"]


@pytest.mark.parametrize("place", [-1, 0, 4, 8, 12])
def test_a_damaged_frame_is_found(volume: Volume, place: int) -> None:
    """One bit in the length, the checksum or the payload; no kill does that, so nothing is guessed."""
    log = volume.active
    log.append(b"first")
    at = PAGE_SIZE + log.end + max(place, 0)
    log.append(b"second")
    volume.segment.buffer[at] ^= 1 if place >= 0 else 0x80
    with pytest.raises(SegmentError, match="damaged"):
        reopened(volume)


def test_the_other_log_counts_once_it_is_switched_to(volume: Volume) -> None:
    """And the first, wiped, costs no memory and can be written anew."""
    volume.active.append(b"old" * 100_000)
    volume.spare.append(b"new")
    assert reopened(volume) == [b"old" * 100_000]
    volume.switch()
    assert reopened(volume) == [b"new"]
    before = volume.segment.allocated_bytes
    for _ in volume.spare.wipe():
        pass
    assert volume.segment.allocated_bytes <= before - 300_000
    volume.spare.append(b"again")
    volume.switch()
    assert reopened(volume) == [b"again"]


def test_there_is_always_room_for_a_large_record(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is committed ahead: when there is none left, a request that was let in is still written down."""
    log = volume.active
    log.append(b"x")

    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    log.append(b"y" * MIB)
    assert log.is_short
    before = log.end
    with pytest.raises(SegmentError, match="no memory"):
        log.append(b"z" * (4 * MIB))
    assert log.end == before
    monkeypatch.undo()
    log.make_room()
    assert not log.is_short
    assert reopened(volume) == [b"x", b"y" * MIB]


# -- what is refused -------------------------------------------------------------------------------------------------
def test_a_ledger_that_was_never_finished_is_refused(name: str) -> None:
    """It was made, and not sealed."""
    volume = Volume.create(name, instance=bytes(16), page_count=4096, commit_limit=MIB, inode=5)
    with pytest.raises(SegmentError, match="incomplete"):
        Volume.open(name)
    volume.segment.close()


def test_a_segment_without_a_page_is_refused(name: str) -> None:
    """A kill came between its making and its first page; reading it would commit one."""
    Segment.create(name, 16 * PAGE_SIZE).close()
    with pytest.raises(SegmentError, match="incomplete"):
        Volume.open(name)


@pytest.mark.parametrize(
    ("word", "value", "complaint"),
    [
        (layout.L_VERSION, 7 << 32, "another version"),
        (layout.L_BOOT, 1, "earlier boot"),
        (layout.L_ACTIVE, 2, "damaged"),
        (layout.L_AREA, 1 << 40, "damaged"),
        (layout.L_MAGIC, 0, "incomplete"),
        (layout.L_MAGIC, 1, "damaged"),
    ],
)
def test_a_header_that_is_not_right_is_refused(volume: Volume, word: int, value: int, complaint: str) -> None:
    """With a reason, and without touching it."""
    volume.segment.words[word] = value
    with pytest.raises(SegmentError, match=complaint):
        Volume.open(volume.segment.name)


def test_a_ledger_that_is_not_there_is_refused(name: str) -> None:
    """As any segment."""
    with pytest.raises(SegmentError):
        Volume.open(name)
