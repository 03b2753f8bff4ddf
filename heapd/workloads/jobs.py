"""What the members of the demo do: the same indexing with the bytes in a shared heap, through a queue, or alone."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import islice
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING

import heapd_client as hc
from heapd.layout import Handle
from heapd.workloads.corpus import Finding, batches, examine, pack_findings
from heapd.workloads.team import Line

if TYPE_CHECKING:
    from heapd_client import Block, Heap, Session

__all__ = ["HEAP_NAME", "index_alone", "index_blocks", "index_queue", "load_blocks", "load_queue", "result_name"]

HEAP_NAME = "files"
_ENTRY = struct.Struct("<IQ40s")  # of a list block: file index, bytes in the file, handle of its block
_BATCHES_AT_ONCE = 16  # arbitrary: up to 16 MiB and 1,024 files in one request
_WAIT_S = 60.0  # for the loader's next list; it publishes one every few ms

_Item = tuple[int, bytes]  # file index, content


# -- one process -----------------------------------------------------------------------------------------------------
def index_alone(line: Line, paths: list[str]) -> None:
    """Read each file and index it, here."""
    line.wait_go()
    findings = []
    for index, path in enumerate(paths):
        with open(path, "rb") as file:
            findings.append((index, examine(file.read())))
        line.progress(1)
    line.done(pack_findings(findings))


# -- through multiprocessing.Queue -----------------------------------------------------------------------------------
def load_queue(line: Line, queue: Queue[_Item | None], paths: list[str], workers: int) -> None:
    """Read each file and put its bytes on the queue, then an end mark for each worker."""
    line.wait_go()
    for index, path in enumerate(paths):
        with open(path, "rb") as file:
            queue.put((index, file.read()))
    for _ in range(workers):
        queue.put(None)
    line.done()


def index_queue(line: Line, queue: Queue[_Item | None]) -> None:
    """Index files from the queue until the end mark."""
    line.wait_go()
    findings = []
    while (item := queue.get()) is not None:
        findings.append((item[0], examine(item[1])))
        line.progress(1)
    line.done(pack_findings(findings))


# -- through a shared heap -------------------------------------------------------------------------------------------
def load_blocks(line: Line, endpoint: str, paths: list[str], sizes: list[int], workers: int) -> None:
    """Read each file into a block of its own, and publish lists of their handles, then an end mark for each worker."""
    with hc.connect(endpoint, autostart=False) as session:
        heap = session.open_heap(HEAP_NAME)
        line.wait_go()
        number = 0
        for batch, blocks, listing in _allocated(heap, sizes):
            listing.view[:] = b"".join(
                _load(index, block, paths[index]) for index, block in zip(batch, blocks, strict=True)
            )
            heap.publish(list_name(number), listing)
            number += 1
        for end in range(workers):
            heap.publish(list_name(number + end), heap.alloc(0))
        line.done()


def _allocated(heap: Heap, sizes: list[int]) -> Iterator[tuple[range, list[Block], Block]]:
    """(file indices, their blocks, a block for the list of these) of each batch; many batches a round trip."""
    remaining = batches(sizes)
    while group := list(islice(remaining, _BATCHES_AT_ONCE)):
        wanted = [sizes[index] for batch in group for index in batch] + [len(batch) * _ENTRY.size for batch in group]
        blocks = heap.alloc_many(wanted)
        lists = blocks[-len(group) :]
        at = 0
        for batch, listing in zip(group, lists, strict=True):
            yield batch, blocks[at : at + len(batch)], listing
            at += len(batch)


def _load(index: int, block: Block, path: str) -> bytes:
    """Read a file into its block. Returns: its entry in the list."""
    block, length = _load_file(block, path)
    return _ENTRY.pack(index, length, block.handle.encode())


def _load_file(block: Block, path: str) -> tuple[Block, int]:
    """Fill the block from the file, which may have grown or shrunk meanwhile. Returns: (block, bytes read)."""
    with open(path, "rb", buffering=0) as file:
        length = _read_into(block, 0, file.readinto)
        while length == block.size and (rest := file.read(1 << 20)):
            block = block.realloc(length + len(rest))
            block.view[length:] = rest
            length += len(rest)
    return block, length


def _read_into(block: Block, start: int, readinto: object) -> int:
    assert callable(readinto)
    view = block.view
    while start < len(view) and (count := readinto(view[start:])):
        start += count
    return start


def index_blocks(line: Line, endpoint: str, number: int) -> None:
    """Index blocks where they are, list by list, until an empty list; leave the findings in a block of the heap."""
    with hc.connect(endpoint, autostart=False) as session:
        heap = session.open_heap(HEAP_NAME)
        cursor = heap.lookup("cursor")
        line.wait_go()
        packed = pack_findings(_index_lists(line, session, heap, cursor))
        block = heap.alloc(len(packed))
        block.view[:] = packed
        heap.publish(result_name(number), block)
        line.done()


def _index_lists(line: Line, session: Session, heap: Heap, cursor: Block) -> Iterator[tuple[int, Finding]]:
    while True:
        entries = heap.lookup(list_name(_take_ticket(heap, cursor)), timeout=_WAIT_S)
        if entries.size == 0:
            return
        for index, length, encoded in _ENTRY.iter_unpack(entries.view):
            block = session.open(Handle.decode(encoded))
            yield index, examine(block.view[:length])
            line.progress(1)


def _take_ticket(heap: Heap, cursor: Block) -> int:
    """The number of the next list nobody has taken: a counter in a block, under the heap's lock."""
    with heap.lock(timeout=_WAIT_S):
        words = cursor.view.cast("Q")
        ticket: int = words[0]
        words[0] = ticket + 1
    return ticket


def list_name(number: int) -> str:
    """The name under which the loader publishes a list of files."""
    return f"list/{number}"


def result_name(number: int) -> str:
    """The name under which worker `number` leaves its findings."""
    return f"result/{number}"
