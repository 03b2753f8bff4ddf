"""The front end of one heap in one session: blocks leased in batches, allocated and freed without asking anybody.

A *bin* holds the cached blocks of one extent: a size class, or a number of pages. Blocks freed here go to this
process's bins, whoever allocated them. What a bin may hold, and how many blocks it leases at once, follows from what
went through it; a heap that allocates one block leases one.

The hot path is hotpath.py; here is what it leaves to us. Every method runs in one thread at a time (`_lock`), and
with the mutex of a serialized heap held by Heap. A finaliser that frees while its thread is in here only queues.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from sys import getrefcount
from typing import TYPE_CHECKING, Any, Final

from heapd.errors import BlockTooLargeError, DaemonError, DoubleFreeError, HeapFullError, StaleHandleError
from heapd.layout import BUSY, H_COMMITTED, MAX_BLOCK_SIZE, RUN_WORD, SLAB_WORD, WordFormat
from heapd.sizeclass import CLASSES, MAX_CLASS_SIZE, class_index
from heapd.units import KIB, MIB, PAGE_SHIFT, pages_for
from heapd.wire import messages as ask

from .block import Block
from .hotpath import Lock, make_alloc, make_block_type, make_locked_alloc, make_locked_block_type

if TYPE_CHECKING:
    from .heap import Heap

__all__ = ["FrontEnd"]

# All arbitrary, chosen by scripts/bench alloc, frames and trace: more caches cost memory, less cost round trips.
_FREE_LEASE: Final = 8 * KIB  # a batch doubles up to this many bytes, whatever was leased before;
_SHARE: Final = 8  # beyond, it is this part of the blocks that the bin leased so far
_CACHE_FLOOR: Final = 1 * MIB  # the bins of size classes together may hold this much ...
_CACHE_SHIFT: Final = 5  # ... or 1/32 of what the arena has committed
_LARGE_CACHE: Final = 64 * MIB  # the bins of runs of more than 64 KiB together may hold this much
_TICKET: Final = 16  # a bin may take this part of the room that is left, before it must ask again
_NEIGHBOURS: Final = 2  # so many larger bins are looked in before a lease: each costs 1/8 of a block, a lease 100 us
_SPARE_BLOCKS: Final = 3  # a larger bin must hold this many to give one: else it would have to lease soon itself
_MAX_BATCH: Final = 512
_MAX_LEASE: Final = 16 * MIB  # the daemon commits no more in one turn
_MAX_SIZES: Final = 1 << 16  # sizes that the hot path knows, about 100 bytes each; beyond, the slow path finds the bin
_LARGE: Final = 1 << 16  # keys of bins for runs over 64 KiB: this and the pages


class Bin:
    """Cached blocks of one extent.

    Fields: key, extent (bytes), form (of its state words), size (to ask the daemon for), stack (cached blocks, freed
    last on top), limit (blocks at which free asks), batch (of the last lease), leased (so far).
    """

    __slots__ = ("batch", "block_type", "extent", "form", "key", "leased", "limit", "set_limit", "stack")

    def __init__(self, key: int, extent: int, form: WordFormat) -> None:
        self.key = key
        self.extent = extent
        self.form = form
        self.stack: list[Any] = []
        self.block_type: type[Block] = Block
        self.set_limit: Callable[[int], None] = lambda blocks: None
        self.limit = 0
        self.batch = 0
        self.leased = 0

    @property
    def is_large(self) -> bool:
        return self.key >= _LARGE

    @property
    def cached(self) -> int:
        """Bytes in the bin."""
        return len(self.stack) * self.extent

    def next_batch(self) -> int:
        """How many blocks to lease now, if there is room for them."""
        doubled = min(self.batch * 2, _FREE_LEASE // self.extent)
        wanted = max(doubled, self.leased // _SHARE, 1)
        return min(wanted, _MAX_BATCH, max(_MAX_LEASE // self.extent, 1))


class FrontEnd:
    """Bins of one heap. Good for one session and one value of the heap's live word; then another one is made.

    Fields: alloc (the hot function), session (its number).
    """

    def __init__(self, heap: Heap, session: int, live: int, lock: Lock | None) -> None:
        self._heap = heap
        self.session = session
        self._live = live
        self._words = heap.mapping.words
        self._hot_lock = lock
        self._bins: dict[int, Bin] = {}
        self._stack_of: dict[int, list[Any]] = {}
        self._lock = threading.RLock()
        self._owner = 0  # thread that is in here
        self._queued: deque[Block] = deque()  # freed by finalisers meanwhile
        self._counts: list[Callable[[], int]] = []
        arguments = (self._words, heap.live_slot, live, self._stack_of, heap.alloc_slow)
        if lock is None:
            self.alloc = make_alloc(*arguments)
        else:
            self.alloc, count = make_locked_alloc(*arguments, lock)
            self._counts.append(count)

    # -- bins --------------------------------------------------------------------------------------------------------
    def _bin_for(self, size: int) -> Bin:
        """The bin that blocks of `size` bytes come from. Raises: BlockTooLargeError."""
        if size > MAX_BLOCK_SIZE:
            raise BlockTooLargeError(f"{size} bytes requested; a block has at most {MAX_BLOCK_SIZE}")
        key = class_index(size) if size <= MAX_CLASS_SIZE else _LARGE + pages_for(size)
        found = self._bins.get(key) or self._add_bin(key)
        if size > 0 and len(self._stack_of) < _MAX_SIZES:
            self._stack_of[size] = found.stack
        return found

    def _bin_of(self, block: Block) -> Bin:
        """The bin that a freed block belongs to."""
        extent = block.extent
        key = class_index(extent) if extent <= MAX_CLASS_SIZE else _LARGE + pages_for(extent)
        return self._bins.get(key) or self._add_bin(key)

    def _add_bin(self, key: int) -> Bin:
        if key >= _LARGE:
            new = Bin(key, (key - _LARGE) << PAGE_SHIFT, RUN_WORD)
        else:
            kind = CLASSES[key]
            new = Bin(key, kind.extent, RUN_WORD if kind.is_run else SLAB_WORD)
        arguments = (self._words, self._heap.live_slot, self._live, new.stack, self._heap.free)
        if self._hot_lock is None:
            new.block_type, new.set_limit = make_block_type(*arguments)
        else:
            new.block_type, new.set_limit, count = make_locked_block_type(*arguments, self._hot_lock)
            self._counts.append(count)
        self._bins[key] = new
        self._set_limit(new, self._room(new))
        return new

    def _room(self, bin_: Bin) -> int:
        """Bytes that the bins of this one's kind may still take together; negative if they hold too much."""
        total = _LARGE_CACHE if bin_.is_large else max(_CACHE_FLOOR, self._words[H_COMMITTED] >> _CACHE_SHIFT)
        return total - sum(other.cached for other in self._bins.values() if other.is_large == bin_.is_large)

    def _set_limit(self, bin_: Bin, room: int) -> None:
        """Let free push so many blocks more, of the `room` left, before it asks again."""
        bin_.limit = max(len(bin_.stack) + max(room // _TICKET // bin_.extent, 1), 2)
        bin_.set_limit(bin_.limit)

    # -- alloc -------------------------------------------------------------------------------------------------------
    def allocate(self, size: int, zero: bool, popped: Block | None) -> Block:
        """A block for `size` bytes, from its bin or leased. `popped`: a cached block that somebody still refers to.

        Raises: as Heap.alloc.
        """
        with self._lock:
            outer, self._owner = self._owner, threading.get_ident()
            try:
                bin_ = self._bin_for(size)
                block = self._fresh(bin_, popped) if popped is not None else self._pop(bin_)
                if block is None:
                    block = self._lease(bin_, size)
                try:
                    if zero:
                        self._heap.mapping.zero(block.address, size)
                    word = block._base + (size or bin_.form.size_mask)
                except BaseException:
                    bin_.stack.append(block)
                    raise
            finally:
                self._owner = outer
            if self._queued:
                self._free_queued()
            block._word = word
            self._words[block.slot] = word
            return block

    def allocate_cached(self, size: int) -> Block | None:
        """A block for `size` bytes from its bin; None if that is empty."""
        with self._lock:
            bin_ = self._bin_for(size)
            if not bin_.stack:
                return None
            block = self._pop(bin_)
            if block is not None:
                block._word = word = block._base + (size or bin_.form.size_mask)
                self._words[block.slot] = word
            return block

    def _pop(self, bin_: Bin) -> Block | None:
        """A cached block of the bin, or of a little larger one: that saves a round trip."""
        for key in range(bin_.key, bin_.key + 1 + _NEIGHBOURS):
            candidate = self._bins.get(key)
            if candidate is not None and len(candidate.stack) >= (_SPARE_BLOCKS if key > bin_.key else 1):
                try:
                    block: Block = candidate.stack.pop()
                except IndexError:
                    continue  # another thread was faster
                return block if getrefcount(block) == 2 else self._fresh(candidate, block)
        return None

    def _fresh(self, bin_: Bin, block: Block) -> Block:
        """A new object for the memory of a cached block whose object somebody still refers to."""
        return self._make(bin_, block.slot, block.address, bin_.form.next_generation(bin_.form.generation(block._base)))

    def _make(self, bin_: Bin, slot: int, address: int, generation: int) -> Block:
        block = bin_.block_type(self._heap, slot, address, bin_.extent, 0)
        block._base = bin_.form.cached(self.session, generation)
        return block

    def _lease(self, bin_: Bin, size: int) -> Block:
        """Lease a batch; one block of it, the others are in the bin. Raises: as Heap.alloc."""
        room = self._room(bin_)
        count = min(bin_.next_batch(), max(room // 2 // bin_.extent, 0) + 1)
        try:
            grants = self._ask(size, count)
        except HeapFullError:
            self._heap.session.reclaim()
            grants = self._ask(size, 1)
        bin_.batch = count
        bin_.leased += len(grants)
        mapping, executable = self._heap.mapping, self._heap.is_executable
        blocks = []
        for slot, address, generation, extent, _ in grants:
            if executable or mapping.has_executable_pages:
                mapping.protect(address, extent, executable=executable)
            blocks.append(self._make(bin_, slot, address, generation))
        first = blocks.pop(0)
        bin_.stack.extend(reversed(blocks))  # lowest addresses on top
        self._set_limit(bin_, room - bin_.extent * len(blocks))
        return first

    def _ask(self, size: int, count: int) -> list[Any]:
        call, heap_id = self._heap.session.call, self._heap.id
        if size > _MAX_LEASE:
            return [call(ask.HeapAlloc(heap_id, size))]
        grants: list[Any] = call(ask.HeapLease(heap_id, size, count))
        return grants

    # -- free --------------------------------------------------------------------------------------------------------
    def take_back(self, block: Block) -> None:
        """Put an allocated block, of whatever origin, in its bin; its views are released.

        Raises: DoubleFreeError, StaleHandleError; nothing has changed.
        """
        if self._owner == threading.get_ident():
            self._queued.append(block)
            return
        with self._lock:
            self._owner = threading.get_ident()
            try:
                self._take_back(block)
            finally:
                self._owner = 0
        if self._queued:
            self._free_queued()

    def _take_back(self, block: Block) -> None:
        bin_ = self._bin_of(block)
        word = check_busy(self._words[block.slot], block, bin_.form)
        generation = bin_.form.generation(word)
        is_own = type(block) is bin_.block_type
        if not is_own or block._word != word:
            # A handle was made, or the object came by one, or by a fork: others may name this block.
            generation = bin_.form.next_generation(generation)
        cached = block if is_own else self._make(bin_, block.slot, block.address, generation)
        cached._base = bin_.form.cached(self.session, generation)
        if len(bin_.stack) >= bin_.limit:
            self._make_room(bin_)
        block._word = cached._word = 0
        self._words[block.slot] = cached._base
        bin_.stack.append(cached)

    def _free_queued(self) -> None:
        while self._queued:
            try:
                block = self._queued.popleft()
            except IndexError:
                return
            if not block.is_free:
                self.take_back(block)

    def _make_room(self, bin_: Bin) -> None:
        """Let a full bin hold more, or, where there is no room, give back the oldest of what the fullest bins hold."""
        room = self._room(bin_)
        if room <= bin_.extent:
            doomed: list[tuple[Bin, list[Any]]] = []
            bins = [other for other in self._bins.values() if other.is_large == bin_.is_large and other.stack]
            goal = room + max(sum(other.cached for other in bins) // 4, bin_.extent)
            for other in sorted(bins, key=lambda other: other.cached, reverse=True):
                count = (len(other.stack) + 1) // 2
                doomed.append((other, other.stack[:count]))
                del other.stack[:count]
                room += count * other.extent
                if room >= goal:
                    break
            self._give_back(doomed)
        self._set_limit(bin_, room)

    def _give_back(self, doomed: list[tuple[Bin, list[Any]]]) -> None:
        addresses = [block.address for _, blocks in doomed for block in blocks]
        try:
            for at in range(0, len(addresses), ask.MAX_BATCH):
                part = addresses[at : at + ask.MAX_BATCH]
                self._heap.session.call(ask.HeapGiveBack(self._heap.id, part))
        except DaemonError:
            for bin_, blocks in doomed:
                bin_.stack[:0] = blocks  # it will answer again, and not know of what it never heard

    # -- all of it ---------------------------------------------------------------------------------------------------
    def give_back_all(self) -> None:
        """Give back every cached block, also what an interrupted call dropped. Raises: DaemonError."""
        with self._lock:
            for bin_ in self._bins.values():
                bin_.stack.clear()
            self._heap.session.call(ask.HeapGiveBack(self._heap.id, [], True))

    def abandon(self) -> None:
        """Use nothing of this any more, and ask nobody: the session is another one now, or the heap is gone."""
        for bin_ in self._bins.values():
            bin_.limit = 0
            bin_.set_limit(0)
            bin_.stack.clear()
        self._stack_of.clear()
        self._lock = threading.RLock()  # a forked child may have inherited it held

    def inherit(self, old: FrontEnd) -> None:
        """Take over what another front end of this session caches. The blocks that it gave out are not this one's
        own: when they are freed, their memory gets another generation."""
        with old._lock:
            for bin_ in old:
                new = self._bins.get(bin_.key) or self._add_bin(bin_.key)
                new.batch, new.leased = bin_.batch, bin_.leased
                generation = bin_.form.generation
                while bin_.stack:
                    block = bin_.stack.pop(0)
                    new.stack.append(self._make(new, block.slot, block.address, generation(block._base)))
                self._set_limit(new, self._room(new))
            old.abandon()

    def take_count(self) -> int:
        """Acquisitions of the mutex by the hot path since the last call."""
        return sum(take() for take in self._counts)

    def cached_bytes(self) -> int:
        return sum(len(bin_.stack) * bin_.extent for bin_ in self._bins.values())

    def __iter__(self) -> Iterator[Bin]:
        return iter(list(self._bins.values()))


def check_busy(word: int, block: Block, form: WordFormat) -> int:
    """`word`, if it is that of the allocated block. Raises: DoubleFreeError, StaleHandleError."""
    if form.state(word) != BUSY:
        raise DoubleFreeError(f"the block at {block.address:#x} is free already", address=block.address)
    if form.generation(word) != form.generation(block.word):
        raise StaleHandleError(
            f"the block at {block.address:#x} was freed, and its memory given out again", address=block.address
        )
    return word
