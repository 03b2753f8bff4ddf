"""From records to the objects that a manager works with, on the arena that an earlier process left.

The arena is as that process left it, in the middle of anything. So what it says is written anew from the records: page
map, control blocks, slab heads, state words of blocks that nobody has. Memory that is not recorded as committed goes
back. Only the words of blocks that are lent stay as they are: whether such a block is BUSY or CACHED its holder says.
Each step may be repeated, for a kill may come here, too.
"""

from __future__ import annotations

import os

from heapd.arena import SHM_DIRECTORY, Arena, check_file
from heapd.arena import restore_arena as take_over
from heapd.errors import SegmentError
from heapd.heap import Region, Slab, restore_heap
from heapd.layout import CHUNK_PAGES, CHUNK_SHIFT, F_PERSISTENT, RUN_WORD
from heapd.manager.directory import Directory
from heapd.manager.ledger.records import HeapRecord, Records
from heapd.manager.ledger.volume import Volume
from heapd.manager.sessions import Session
from heapd.manager.shared import SharedHeap
from heapd.records import Grant
from heapd.sizeclass import CLASSES

__all__ = ["count_persistent", "restore_arena", "restore_directory"]


def restore_arena(segment: str, volume: Volume, records: Records, incarnation: int) -> Arena:
    """The arena of the segment of that name, as the records have it. Raises: SegmentError."""
    regions = [
        (first, page_count)
        for record in records.heaps.values()
        for first, page_count, _ in record.regions.values()
        if record.heap_id
    ]
    return take_over(
        segment,
        instance=volume.instance,
        inode=volume.inode,
        states=records.pages,
        regions=regions,
        commit_limit=volume.commit_limit,
        peak=records.peak,
        incarnation=incarnation,
    )


def count_persistent(arena: str, ledger: str) -> int:
    """How many persistent heaps a daemon would bring back that went on with these segments. Changes nothing.

    Raises: SegmentError, saying why none can go on with them.
    """
    volume = Volume.open(ledger, is_to_write=False)
    try:
        records = Records.read(volume.active.frames(), volume.page_count)
        check_file(arena, os.lstat(SHM_DIRECTORY / arena), volume.inode, volume.page_count)
    except FileNotFoundError:
        raise SegmentError(f"there is no shared memory segment {arena}") from None
    finally:
        volume.segment.close()
    return sum(1 for heap in records.heaps.values() if heap.heap_id and heap.flags & F_PERSISTENT)


def restore_directory(directory: Directory, records: Records, *, is_applied: bool) -> None:
    """Fill a directory that is empty. Args: is_applied (the last record was carried out)."""
    arena = directory.arena
    _restore_run_words(arena, records)
    for record in sorted(records.heaps.values(), key=lambda record: record.heap_id):
        if record.heap_id:
            _restore_heap(directory, record)
    if not is_applied:
        for slot, word in records.words.items():
            arena.words[slot] = word
    flags = {shared.heap_id: shared.flags for shared in directory.heaps.values()}
    epochs = [records.epochs[index] for index in range(len(records.epochs))]
    directory.controls.restore(epochs, records.next_serial, flags)
    _restore_sessions(directory, records)
    for ticket, blocks in records.pending.items():
        _restore_unanswered(directory, ticket, blocks)


def _restore_run_words(arena: Arena, records: Records) -> None:
    """Where no run begins, no word may say that somebody has one."""
    runs = {first for record in records.heaps.values() for first in record.runs}
    nothing = memoryview(bytes(8 * CHUNK_PAGES)).cast("Q")
    for chunk in arena.pages.mapped_chunks():
        slot = arena.shape.run_slot(chunk << CHUNK_SHIFT)
        found = arena.words[slot : slot + CHUNK_PAGES]
        if found == nothing:
            continue
        for at, word in enumerate(found.tolist()):
            if (RUN_WORD.session(word) or RUN_WORD.state(word)) and (chunk << CHUNK_SHIFT) + at not in runs:
                arena.words[slot + at] = RUN_WORD.free(RUN_WORD.generation(word))


def _restore_heap(directory: Directory, record: HeapRecord) -> None:
    heap = restore_heap(
        directory.arena,
        record.index,
        maximum=record.maximum,
        max_block=record.max_block,
        initial=record.initial,
        regions=[Region(serial, *record.regions[serial]) for serial in sorted(record.regions)],
        slabs=[
            Slab.restore(CLASSES[slab.class_index], first, slab.page_count, slab.carved, slab.lent)
            for first, slab in record.slabs.items()
        ],
        runs=record.runs,
        unfinished=record.unfinished,
        allocations=record.allocations,
        releases=record.releases,
    )
    shared = SharedHeap(
        record.heap_id,
        record.name,
        record.flags,
        heap,
        record.creator,
        record.is_default,
        quota=record.quota,
        initial=record.initial_bytes,
    )
    shared.names = record.names
    shared.orphan_owners = set(record.owners)
    directory.heaps[shared.heap_id] = directory.by_index[shared.index] = shared
    if shared.name is not None:
        directory.by_name[shared.name] = shared


def _restore_sessions(directory: Directory, records: Records) -> None:
    heaps, sessions = directory.heaps, []
    for record in records.sessions.values():
        is_live, is_ending = record.state == "live", record.state == "ending"
        session = Session(record.number, record.token, record.pid, record.uid, record.start_time, record.opened_ns)
        session.requests, session.replies = record.requests, record.replies
        session.is_live, session.is_ending = is_live, is_ending
        opened = {heap_id for heap_id in record.opened if heap_id in heaps}
        closed = {heap_id for heap_id in record.closed if heap_id in heaps}
        if is_live or is_ending:
            session.heaps = {heap_id: heaps[heap_id] for heap_id in sorted(opened | (closed if is_ending else set()))}
            session.closed = {heaps[heap_id] for heap_id in closed}
        if is_live:
            for shared in session.heaps.values():
                shared.openers.add(record.number)
                if shared.is_default and shared.creator == record.number:
                    session.default_heap = shared
        sessions.append(session)
    directory.sessions.restore(sessions, records.last_number)


def _restore_unanswered(directory: Directory, ticket: int, blocks: set[tuple[int, int, int, int]]) -> None:
    for _, heap_id, address, generation in blocks:
        shared = directory.heaps.get(heap_id)
        if shared is not None:
            unanswered = directory.expect(shared, ticket)
            unanswered.grants.append(Grant(0, address, generation, 0, False))
