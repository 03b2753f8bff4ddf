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
from heapd.layout import BUSY, MAX_BLOCK_SIZE, RUN_WORD, SLAB_WORD, WordFormat
from heapd.sizeclass import CLASSES, MAX_CLASS_SIZE, class_index
from heapd.units import KIB, MIB, PAGE_SHIFT, pages_for
from heapd.wire import messages as ask

from .block import Block
from .hotpath import Lock, make_alloc, make_block_type, make_locked_alloc, make_locked_block_type

if TYPE_CHECKING:
    from .heap import Heap

__all__ = ["FrontEnd"]

# All arbitrary, chosen by scripts/bench alloc, frames and trace: more caches cost memory, less cost round trips.
_FREE_LEASE: Final = 8 * KIB  # a batch doubles up to this many bytes, whatever was leased before
_FREE_CACHE: Final = 16 * KIB  # a bin may hold this much, or two blocks
_SHARE: Final = 8
_BIN_CACHE: Final = 8 * MIB  # the most a bin of a size class holds
_LARGE_CACHE: Final = 64 * MIB  # the most that a bin of runs of more than 64 KiB holds
_TOTAL_CACHE: Final = 64 * MIB  # the most that all bins of the front end may hold together
_MAX_BATCH: Final = 512
_MAX_LEASE: Final = 16 * MIB  # the daemon commits no more in one turn
_MAX_SIZES: Final = 1 << 16  # sizes that the hot path knows, about 100 bytes each; beyond, the slow path finds the bin
_LARGE: Final = 1 << 16  # keys of bins for runs over 64 KiB: this and the pages


class Bin:
    """Cached blocks of one extent.

    Fields: key, extent (bytes), form (of its state words), size (to ask the daemon for), stack (cached blocks, freed
    last on top), limit (blocks that free may keep), batch (of the last lease), leased and given_back (blocks, so far).
    """

    __slots__ = ("batch", "block_type", "extent", "form", "given_back", "key", "leased", "limit", "set_limit", "stack")

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
        self.given_back = 0

    @property
    def cap(self) -> int:
        """Blocks that the bin may hold at the very most."""
        return max((_LARGE_CACHE if self.key >= _LARGE else _BIN_CACHE) // self.extent, 1)

    def next_batch(self) -> int:
        """How many blocks to lease now."""
        doubled = min(self.batch * 2, _FREE_LEASE // self.extent)
        wanted = max(doubled, self.leased // _SHARE, 1)
        return min(wanted, self.cap, _MAX_BATCH, max(_MAX_LEASE // self.extent, 1))

    def next_limit(self) -> int:
        """How many blocks free may keep from now on."""
        return min(max(_FREE_CACHE // self.extent, 2, self.given_back // _SHARE, self.batch), self.cap)


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
        self._set_limit(new)
        return new

    def _set_limit(self, bin_: Bin) -> None:
        """Let a bin hold what it has earned, as far as all bins together may."""
        wanted = bin_.next_limit()
        others = sum(other.limit * other.extent for other in self._bins.values() if other is not bin_)
        bin_.limit = max(min(wanted, (_TOTAL_CACHE - others) // bin_.extent), 1)
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

    def _pop(self, bin_: Bin) -> Block | None:
        """A cached block of the bin, or of the next larger one: that costs at most 1/8 and saves a round trip."""
        for candidate in (bin_, self._bins.get(bin_.key + 1)):
            if candidate is not None:
                try:
                    block: Block = candidate.stack.pop()
                except IndexError:
                    continue
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
        count = bin_.next_batch()
        try:
            grants = self._ask(size, count)
        except HeapFullError:
            self._heap.session.reclaim()
            grants = self._ask(size, 1)
        bin_.batch = count
        bin_.leased += len(grants)
        self._set_limit(bin_)
        mapping, executable = self._heap.mapping, self._heap.is_executable
        blocks = []
        for slot, address, generation, extent, _ in grants:
            if executable or mapping.has_executable_pages:
                mapping.protect(address, extent, executable=executable)
            blocks.append(self._make(bin_, slot, address, generation))
        first = blocks.pop(0)
        bin_.stack.extend(reversed(blocks))  # lowest addresses on top
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
        """Give half of a bin back, oldest first, unless it may hold more by now."""
        bin_.given_back += max(len(bin_.stack) // 2, 1)
        self._set_limit(bin_)
        if len(bin_.stack) >= bin_.limit:
            self._give_back(bin_, max(len(bin_.stack) // 2, 1))

    def _give_back(self, bin_: Bin, count: int) -> None:
        blocks, bin_.stack[:count] = bin_.stack[:count], []
        try:
            for at in range(0, count, ask.MAX_BATCH):
                addresses = [block.address for block in blocks[at : at + ask.MAX_BATCH]]
                self._heap.session.call(ask.HeapGiveBack(self._heap.id, addresses))
        except DaemonError:
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
                new.batch, new.leased, new.given_back = bin_.batch, bin_.leased, bin_.given_back
                generation = bin_.form.generation
                while bin_.stack:
                    block = bin_.stack.pop(0)
                    new.stack.append(self._make(new, block.slot, block.address, generation(block._base)))
                self._set_limit(new)
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
