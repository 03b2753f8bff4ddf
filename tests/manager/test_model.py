"""Random requests of several clients against a model of plain dicts: blocks and their bytes, heaps, names, sessions.

After every few requests each invariant is checked, and at the end every byte. A failure prints the seed and the
requests that led to it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from heapd.errors import BlockTooLargeError, HeapdError, HeapFullError
from heapd.layout import F_FREE_ORPHANS, F_PERSISTENT, F_SERIALIZE
from heapd.manager import HeapManager
from heapd.records import EntryKind, Grant, HeapInfo
from heapd.units import KIB, MIB
from heapd.wire import messages as m
from tests.invariants import check_manager, fill, pattern, read
from tests.manager.clients import Client


@dataclass
class Block:
    """What the model knows of a block: its grant, requested size, the seed of its bytes, who allocated it."""

    grant: Grant
    size: int
    seed: int
    owner: int


@dataclass
class ModelHeap:
    """What the model knows of a heap; `blocks` by address, `names` by name, `openers` by session number."""

    info: HeapInfo
    creator: int
    openers: set[int] = field(default_factory=set)
    blocks: dict[int, Block] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    @property
    def frees_orphans(self) -> bool:
        return bool(self.info.flags & F_FREE_ORPHANS)


class Model:
    """Clients that do as they please, and what must be there after it."""

    def __init__(self, manager: HeapManager, seed: int) -> None:
        self.manager = manager
        self.seed = seed
        self.random = random.Random(seed)
        self.clients = [Client(manager) for _ in range(3)]
        self.heaps: dict[int, ModelHeap] = {}
        self.patterns = 0
        self.log: list[str] = []

    # -- choices -------------------------------------------------------------------------------------------------------
    def client(self) -> Client:
        return self.random.choice(self.clients)

    def open_heap(self) -> tuple[Client, ModelHeap] | None:
        """A client and a heap that it has open."""
        pairs = [(who, heap) for who in self.clients for heap in self.heaps.values() if who.number in heap.openers]
        return self.random.choice(pairs) if pairs else None

    def block(self) -> tuple[Client, ModelHeap, Block] | None:
        found = self.open_heap()
        if found is None or not found[1].blocks:
            return None
        return *found, self.random.choice(list(found[1].blocks.values()))

    def size(self) -> int:
        return int((2 * MIB) ** self.random.random())

    # -- requests ------------------------------------------------------------------------------------------------------
    def create(self) -> None:
        if len(self.heaps) > 6:
            return
        who = self.client()
        name = self.random.choice([None, "a", "b", "c"])
        flags = F_SERIALIZE | self.random.choice([0, F_FREE_ORPHANS])
        if name is not None and self.random.random() < 0.2:
            flags |= F_PERSISTENT
        maximum = self.random.choice([0, 0, 100_000, 800 * KIB, 8 * MIB])
        taken = name is not None and any(heap.info.name == name for heap in self.heaps.values())
        self.log.append(f"{who.number}: create({name}, {flags}, {maximum}) taken: {taken}")
        try:
            info = who.create(name, flags=flags, maximum=maximum)
        except HeapdError:
            assert taken
            return
        assert not taken
        self.heaps[info.heap_id] = ModelHeap(info, who.number, {who.number})

    def open(self) -> None:
        named = [heap for heap in self.heaps.values() if heap.info.name is not None]
        if named:
            who, heap = self.client(), self.random.choice(named)
            self.log.append(f"{who.number}: open({heap.info.name})")
            assert who.open(heap.info.name or "").heap_id == heap.info.heap_id
            heap.openers.add(who.number)

    def close(self) -> None:
        found = self.open_heap()
        if found is not None and found[1].info.name is not None:
            who, heap = found
            self.log.append(f"{who.number}: close({heap.info.heap_id})")
            who.close(heap.info)
            heap.openers.discard(who.number)
            self.forget_if_unused(heap)

    def forget_if_unused(self, heap: ModelHeap) -> None:
        if not heap.openers and not heap.info.flags & F_PERSISTENT:
            del self.heaps[heap.info.heap_id]

    def destroy(self) -> None:
        found = self.open_heap()
        if found is not None:
            who, heap = found
            self.log.append(f"{who.number}: destroy({heap.info.heap_id})")
            who.destroy(heap.info)
            del self.heaps[heap.info.heap_id]

    def alloc(self) -> None:
        found = self.open_heap()
        if found is None:
            return
        who, heap = found
        sizes = [self.size() for _ in range(self.random.choice([1, 1, 5, 40]))]
        self.log.append(f"{who.number}: alloc_many({heap.info.heap_id}, {len(sizes)})")
        try:
            grants = who.alloc_many(heap.info, sizes) if len(sizes) > 1 else [who.alloc(heap.info, sizes[0])]
        except HeapFullError:
            return
        except BlockTooLargeError:
            assert max(sizes) > heap.info.maximum > 0
            return
        for grant, size in zip(grants, sizes, strict=True):
            self.keep(heap, Block(grant, size, 0, who.number))

    def keep(self, heap: ModelHeap, block: Block) -> None:
        self.patterns += 1
        block.seed = self.patterns
        fill(self.manager.arena, block.grant.address, block.size, block.seed)
        heap.blocks[block.grant.address] = block

    def free(self) -> None:
        found = self.open_heap()
        if found is None or not found[1].blocks:
            return
        who, heap = found
        count = self.random.choice([1, 1, 10, 60])
        blocks = self.random.sample(list(heap.blocks.values()), min(count, len(heap.blocks)))
        self.log.append(f"{who.number}: free_many({heap.info.heap_id}, {len(blocks)})")
        for block in blocks:
            self.check_block(block)
            del heap.blocks[block.grant.address]
        who.free_many(heap.info, [block.grant for block in blocks])
        heap.names = {name: address for name, address in heap.names.items() if address in heap.blocks}

    def resize(self) -> None:
        found = self.block()
        if found is None:
            return
        who, heap, block = found
        size = self.random.choice([block.size // 2, block.size + block.size // 8 + 1, self.size()])
        self.log.append(f"{who.number}: resize({block.grant.address:#x}, {block.size} -> {size})")
        try:
            who.resize(heap.info, block.grant, size)
        except MemoryError:
            return
        kept = min(size, block.size)
        assert read(self.manager.arena, block.grant.address, kept) == pattern(kept, block.seed)
        block.size = size
        if heap.frees_orphans:
            block.owner = who.number
        self.keep(heap, block)

    def publish(self) -> None:
        found = self.block()
        if found is not None:
            who, heap, block = found
            name = self.random.choice("xyz")
            self.log.append(f"{who.number}: publish({name}, {block.grant.address:#x})")
            who.publish(heap.info, name, block.grant)
            heap.names[name] = block.grant.address

    def compact(self) -> None:
        found = self.open_heap()
        if found is not None:
            self.log.append(f"{found[0].number}: compact({found[1].info.heap_id})")
            found[0].ask(m.HeapCompact(found[1].info.heap_id))

    def end_session(self) -> None:
        who = self.client()
        self.log.append(f"{who.number}: ends")
        who.end()
        self.clients[self.clients.index(who)] = Client(self.manager)
        for heap in list(self.heaps.values()):
            heap.openers.discard(who.number)
            if heap.info.name is None and heap.creator == who.number:
                del self.heaps[heap.info.heap_id]
                continue
            if heap.frees_orphans:
                heap.blocks = {at: block for at, block in heap.blocks.items() if block.owner != who.number}
                heap.names = {name: at for name, at in heap.names.items() if at in heap.blocks}
            if heap.info.name is not None:
                self.forget_if_unused(heap)

    # -- checks --------------------------------------------------------------------------------------------------------
    def check_block(self, block: Block) -> None:
        found = read(self.manager.arena, block.grant.address, block.size)
        assert found == pattern(block.size, block.seed), f"the bytes of the block at {block.grant.address:#x}"

    def check(self) -> None:
        check_manager(self.manager)
        assert set(self.manager.heaps) == set(self.heaps)
        watcher = Client(self.manager)
        for heap in self.heaps.values():
            watcher.open_id(heap.info.heap_id)
            busy = [entry for entry in watcher.walk(heap.info) if entry.kind is EntryKind.BUSY]
            assert {entry.address: (entry.size, entry.session) for entry in busy} == {
                at: (block.size, block.owner) for at, block in heap.blocks.items()
            }
            live = {who.number for who in self.clients}
            assert all(entry.orphaned == (entry.session not in live) for entry in busy)
            assert {found.name: found.address for found in watcher.names(heap.info)} == heap.names
            if heap.info.name is None or heap.openers or heap.info.flags & F_PERSISTENT:
                assert self.manager.heaps[heap.info.heap_id].openers == heap.openers | {watcher.number}
        watcher.end()

    def run(self, steps: int) -> None:
        """`steps` requests, each of a client chosen at random."""
        kinds: list[tuple[Callable[[], None], int]] = [
            (self.create, 3), (self.open, 3), (self.close, 1), (self.destroy, 1), (self.alloc, 12), (self.free, 9),
            (self.resize, 6), (self.publish, 3), (self.compact, 1), (self.end_session, 1),
        ]  # fmt: skip
        operations, weights = zip(*kinds, strict=True)
        try:
            for number in range(steps):
                self.random.choices(operations, weights)[0]()
                if number % 5 == 0:
                    self.check()
            self.check()
            for heap in self.heaps.values():
                for block in heap.blocks.values():
                    self.check_block(block)
        except Exception as error:
            lines = "\n  ".join(self.log[-60:])
            pytest.fail(f"seed {self.seed}, after {len(self.log)} requests: {error!r}\n  {lines}")


@pytest.mark.parametrize("seed", range(8))
def test_several_clients_find_everything_as_they_left_it(manager: HeapManager, seed: int) -> None:
    """Heaps of every kind come and go, sessions end, blocks are handed on: the model and the manager agree."""
    Model(manager, seed).run(200)
