"""The part of a heap that gives blocks out and takes them back: alloc and free, one by one or many.

Each function first does without the daemon: what the front end caches, or may cache, is its. What is left is asked of
the daemon. A block of which nobody hears, because a signal handler raised, is freed later (strays.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from itertools import count as count_from
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, cast

from heapd.errors import (
    ClosedError,
    DoubleFreeError,
    HeapdError,
    HeapFullError,
    InvalidArgumentError,
    NotABlockError,
    WrongHeapError,
)
from heapd.layout import F_FREE_ORPHANS, RUN_WORD
from heapd.units import MIB
from heapd.wire import MAX_BATCH
from heapd.wire import messages as ask

from .arguments import as_count, as_size
from .block import Block, Visitor, freed_elsewhere
from .frontend import FrontEnd
from .heapcore import HeapCore, deferred, working
from .registry import is_exiting

if TYPE_CHECKING:
    from .heap import Heap

__all__ = ["AllocatingHeap"]

_MAX_COUNT: Final = 1_000_000  # arbitrary: blocks in one alloc_many


class AllocatingHeap(HeapCore):
    """The part of Heap that allocates and frees; see Heap."""

    def alloc(self, size: int, *, zero: bool = False) -> Block:
        """Allocate a block.

        Args:    size (bytes; 0 gives a real block with an empty view), zero (its bytes read as zero).
        Returns: the block; 16-byte aligned, 64-byte from 64 bytes up, by page for multiples of 4 KiB.
        Raises:  HeapFullError, BlockTooLargeError, InvalidArgumentError, HeapDestroyedError, ClosedError,
                 LockTimeoutError, DaemonError; nothing is allocated then.
        """
        return self.alloc_slow(size, zero, None)

    def alloc_slow(self, size: int, zero: bool, popped: Block | None) -> Block:
        """For the front end: alloc where its hot function does not suffice."""
        size = as_size(size)
        try:
            return self._alloc_held(size, zero, popped)
        except HeapFullError as shortage:
            return self.session.retry(shortage, lambda: self._alloc_held(size, zero, None))

    def _alloc_held(self, size: int, zero: bool, popped: Block | None) -> Block:
        self.check()
        block = None
        try:
            with self._hold():
                self._count()
                block = self._alloc(size, zero, popped)
            if deferred:
                self._free_deferred()
        except BaseException:  # of a signal handler, at the end of `with`: nobody will ever hear of the block
            if block is not None:
                self._regret(block)
            raise
        return block

    def _alloc(self, size: int, zero: bool, popped: Block | None = None) -> Block:
        if not self.session.has_front_ends:
            return self._alloc_there(size, zero)
        me, block = get_ident(), None
        is_outer = me not in working
        try:
            try:
                with self._gate:
                    front = self._front_end()
                    working.add(me)
                    block = front.allocate(size, zero, popped) if front is not None else self._alloc_there(size, zero)
            finally:
                if is_outer:
                    working.discard(me)
        except BaseException:
            if block is not None:
                self._regret(block)
            raise
        return block

    def _alloc_there(self, size: int, zero: bool) -> Block:
        """Have the daemon allocate a block."""
        request, grant = ask.HeapAlloc(self.id, size), None
        try:
            grant = self.session.call_for_memory(request, self.id)
            block = self._granted(grant, size, zero)
        except BaseException as error:
            if grant is not None:
                self.session.strays.append((self.id, grant[1], grant[2]))
            elif not isinstance(error, HeapdError):
                self.session.regret(request)
            raise
        return block

    def ask_for_block(self, size: int) -> Any:
        """For the front end: have the daemon allocate a block too large to be leased, and cache it. Its Grant."""
        request, grant = ask.HeapAlloc(self.id, size), None
        try:
            grant = self.session.call(request)
            self._words[grant[0]] -= size  # CACHED: what else a signal handler may raise costs us no block
        except BaseException as error:
            if grant is None and not isinstance(error, HeapdError):
                self.session.regret(request)
            raise
        return grant

    def _regret(self, block: Block) -> None:
        """Have a block that we allocated, and can give to nobody, freed."""
        self.session.strays.append((self.id, block.address, block.generation))

    def _granted(self, grant: Any, size: int, zero: bool) -> Block:
        """The object for a block that the daemon has allocated for this session; zeroed if it is to be."""
        slot, address, generation, extent, fresh = grant
        if zero or self.mapping.has_executable_pages or self.is_executable:
            self.mapping.protect(address, max(extent, 1), executable=self.is_executable)
            if zero and not fresh:
                self.mapping.zero(address, size)
        word = self.mapping.shape.word_format(slot).busy(self.session.number, generation, size)
        return Block(cast("Heap", self), slot, address, extent, word)

    def alloc_many(self, sizes: int | Iterable[int], count: int | None = None, *, zero: bool = False) -> list[Block]:
        """Allocate several blocks in few round trips; all of them or none.

        Args:    sizes (bytes, one each; or one size, with `count`), count (blocks of that size), zero (as for alloc).
        Returns: the blocks, in the order of `sizes`.
        Raises:  as alloc.
        """
        if not isinstance(sizes, Iterable):
            size = as_size(sizes)
            if count is None:
                raise InvalidArgumentError("alloc_many of one size needs a count of blocks")
            wanted = [size] * as_count(count, _MAX_COUNT)
        elif count is not None:
            raise InvalidArgumentError("alloc_many takes a count only with a single size")
        else:
            wanted = [as_size(size) for size in sizes]
        try:
            return self._alloc_many(wanted, zero)
        except HeapFullError as shortage:
            return self.session.retry(shortage, lambda: self._alloc_many(wanted, zero))

    def _alloc_many(self, wanted: list[int], zero: bool) -> list[Block]:
        self.check()
        blocks: list[Block] = []
        try:
            with self._hold():
                self._count()
                places = self._alloc_cached(wanted, zero, blocks)
                granted = count_from(len(blocks))
                self._alloc_missing(wanted, places, zero, blocks)
            in_order = [blocks[next(granted) if place is None else place] for place in places]
        except BaseException:
            for block in blocks:
                self._regret(block)
            self.session.give_back()
            raise
        return in_order

    def _alloc_cached(self, sizes: list[int], zero: bool, blocks: list[Block]) -> list[int | None]:
        """Take from the front end what it has, to the end of `blocks`. Returns: each size's place there."""
        places: list[int | None] = []
        with self._enter():
            front = self._front_end()
            for size in sizes:
                places.append(self._take_cached(front, size, zero, blocks))
        return places

    def _take_cached(self, front: FrontEnd | None, size: int, zero: bool, blocks: list[Block]) -> int | None:
        block = front.allocate_cached(size) if front is not None else None
        if block is None:
            return None
        blocks.append(block)  # first: an interrupt finds it there
        if zero:
            self.mapping.zero(block.address, size)
        return len(blocks) - 1

    def _alloc_missing(self, sizes: list[int], places: list[int | None], zero: bool, blocks: list[Block]) -> None:
        """Have the daemon allocate what the front end had not, to the end of `blocks`."""
        missing = [size for size, place in zip(sizes, places, strict=True) if place is None]
        for at in range(0, len(missing), MAX_BATCH):
            self._alloc_batch(missing[at : at + MAX_BATCH], zero, blocks)

    def _alloc_batch(self, sizes: list[int], zero: bool, blocks: list[Block]) -> None:
        request, grants = ask.HeapAllocMany(self.id, sizes), None
        first = len(blocks)
        try:
            grants = self.session.call_for_memory(request, self.id)
            self.note_growth(sum(grant[3] for grant in grants))
            for grant, size in zip(grants, sizes, strict=True):
                blocks.append(self._granted(grant, size, zero))
        except BaseException as error:
            del blocks[first:]
            for _, address, generation, _, _ in grants or ():
                self.session.strays.append((self.id, address, generation))
            if grants is None and not isinstance(error, HeapdError):
                self.session.regret(request)
            raise

    def free(self, block: Block) -> None:
        """Give a block of this heap back. Raises: as Block.free; WrongHeapError if it is of another heap.

        Once the interpreter ends and has closed its sessions, it does nothing: the finalisers of user code come late.
        """
        if self._is_closed and is_exiting():
            return
        self._free_now(block)
        if deferred:
            self._free_deferred()

    def _free_now(self, block: Block) -> None:
        self.check()
        self._check_own(block)
        block.release_views()
        if get_ident() in working:
            deferred.append((self, block))
            return
        with self._hold():
            self._count()
            self._free(block)

    def _free_deferred(self) -> None:
        """Free what finalisers could not."""
        while deferred and get_ident() not in working:
            try:
                heap, block = deferred.popleft()
            except IndexError:
                return  # another thread was faster
            with suppress(HeapdError):  # a finaliser cannot be told
                heap._free_now(block)

    def _free(self, block: Block) -> None:
        if not self.session.has_front_ends or not self._free_here(block):
            try:
                self.session.call(ask.HeapFree(self.id, block.address, block.generation))
            except NotABlockError:
                raise freed_elsewhere(block) from None
            block.forget()

    def _free_here(self, block: Block) -> bool:
        """Free a block to the front end; False if it is not ours to cache."""
        me = get_ident()
        is_outer = me not in working
        try:
            with self._gate:
                front = self._front_end()
                word = self.word_of(block)
                if front is None or not self._is_ours_to_cache(word, block):
                    return False
                if self.releases_large and block.extent >= MIB:
                    self.note_growth(-block.extent)
                    return False
                working.add(me)
                if not self._send_home(front, block, word):
                    front.take_back(block, word)
        finally:
            if is_outer:
                working.discard(me)
        return True

    def _send_home(self, front: FrontEnd, block: Block, word: int) -> bool:
        """Free a run to the session that allocated it, if that is another one that lives."""
        if block.slot >= self.slabs:
            return False
        if RUN_WORD.session(word) == front.session:
            self.away.forget(block.slot)
            return False
        return isinstance(block, Visitor) and self.homes.send(block, word, self.extent_of(block, word))

    def _is_ours_to_cache(self, word: int, block: Block) -> bool:
        """Whether the state word of an allocated block is this session's to write. In a heap that frees the blocks
        of sessions that died, the daemon may be about to do that to somebody else's."""
        if not self.info.flags & F_FREE_ORPHANS:
            return True
        return self.mapping.shape.word_format(block.slot).session(word) == self.session.number

    def free_many(self, blocks: Iterable[Block]) -> None:
        """Give several blocks back. All are checked before any is freed.

        Raises: as Block.free, of any of them; DoubleFreeError also if one is named twice.
        """
        if not isinstance(blocks, Iterable):
            raise InvalidArgumentError(f"free_many takes blocks, not {type(blocks).__name__}")
        doomed = list(blocks)
        self.check()
        seen: set[int] = set()
        for block in doomed:
            self._check_own(block)
            if block.address in seen:
                raise DoubleFreeError(f"the block at {block.address:#x} is in the list twice", address=block.address)
            seen.add(block.address)
        for block in doomed:
            block.release_views()
        with self._hold():
            self._count()
            if not self.session.has_front_ends:
                self._free_batches(doomed)
                return
            for block in doomed:
                self.word_of(block)
            for block in doomed:
                self._free(block)

    def _free_batches(self, doomed: list[Block]) -> None:
        for at in range(0, len(doomed), MAX_BATCH):
            batch = doomed[at : at + MAX_BATCH]
            names = [part for block in batch for part in (block.address, block.generation)]
            self.session.call(ask.HeapFreeMany(self.id, names))
            for block in batch:
                block.forget()

    def _check_own(self, block: Block) -> None:
        if not isinstance(block, Block):
            raise InvalidArgumentError(f"a Block is needed, not {type(block).__name__}")
        if block.heap is not self and (block.heap.id != self.id or block.heap.mapping is not self.mapping):
            raise WrongHeapError(f"the block at {block.address:#x} is of another heap", address=block.address)
        if block.is_free:
            raise ClosedError("the block has been freed")

    def guest(self, slot: int, address: int, extent: int, word: int) -> Block:
        """For the session: the object for another session's run that was opened by its handle.

        Args: word (its state word).
        """
        kind: type[Block] | None = None
        if not (self._is_serialized or self.info.flags & F_FREE_ORPHANS) and self.session.has_front_ends:
            kind = self.homes.guest_type(RUN_WORD.session(word), self._live_word)
        return (kind or Visitor)(cast("Heap", self), slot, address, extent, -word)
