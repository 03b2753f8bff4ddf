"""A heap as its clients use it: the Win32 heap functions over one session.

Every heap function of a serialized heap runs with the heap's mutex held, across the round trip that it needs; with
`serialize=False` none takes it. What the daemon knows it is asked; what lies in the mapping (is the heap alive, what
does a state word say) is read there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count as count_from
from math import inf
from threading import get_ident
from time import monotonic
from typing import Any, Final

from heapd.errors import (
    CannotResizeInPlaceError,
    ClosedError,
    DoubleFreeError,
    HeapdError,
    HeapFullError,
    InvalidArgumentError,
    NoSuchNameError,
    NotABlockError,
    StaleHandleError,
    WaitTimeoutError,
    WrongHeapError,
)
from heapd.layout import F_FREE_ORPHANS, RUN_WORD, Handle
from heapd.records import Entry, EntryKind, HeapStatistics, Publication, Violation
from heapd.sizeclass import class_of
from heapd.units import MIB, PAGE_SHIFT, pages_for
from heapd.wire import MAX_BATCH
from heapd.wire import messages as ask

from .arguments import as_count, as_size, as_timeout
from .block import Block, Visitor
from .frontend import Freeing, FrontEnd
from .heapcore import HeapCore, deferred, working
from .registry import is_exiting

__all__ = ["Heap"]

_LOOKUP_SLICE_S: Final = 10.0  # longest wait that one request asks of the daemon
_LOOKUP_RETRIES: Final = 100  # arbitrary: a name replaced as often between question and look is not looked up
_KINDS: Final = {int(kind): kind for kind in EntryKind}
_WALK_PAGE: Final = 1024  # entries of a walk in one answer
_MAX_COUNT: Final = 1_000_000  # arbitrary: blocks in one alloc_many
_NAMES_PAGE: Final = 500


class Heap(HeapCore):
    """One heap; made by `Session.create_heap`, `open_heap` and `default_heap`.

    Attributes: session; mapping (the arena); id (never used again); is_executable; info (HeapInfo, of when it
    was opened).
    Locks: each method says nothing of its own; a serialized heap's functions take the heap's mutex, and wait for it
    at most the session's timeout (LockTimeoutError names the holder).
    """

    # -- blocks ------------------------------------------------------------------------------------------------------
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
                self.session.give_back_later(self.id, grant[1], grant[2])
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
        self.session.give_back_later(self.id, block.address, block.generation)

    def _granted(self, grant: Any, size: int, zero: bool) -> Block:
        """The object for a block that the daemon has allocated for this session; zeroed if it is to be."""
        slot, address, generation, extent, fresh = grant
        if zero or self.mapping.has_executable_pages or self.is_executable:
            self.mapping.protect(address, max(extent, 1), executable=self.is_executable)
            if zero and not fresh:
                self.mapping.zero(address, size)
        word = self.mapping.shape.word_format(slot).busy(self.session.number, generation, size)
        return Block(self, slot, address, extent, word)

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
                missing = [size for size, place in zip(wanted, places, strict=True) if place is None]
                for at in range(0, len(missing), MAX_BATCH):
                    self._alloc_batch(missing[at : at + MAX_BATCH], zero, blocks)
            granted = count_from(len(places) - len(missing))
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
                self.session.give_back_later(self.id, address, generation)
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
                raise _freed(block) from None
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

    def realloc(self, block: Block, size: int, *, zero: bool = False, in_place_only: bool = False) -> Block:
        """Resize a block of this heap; see Block.realloc."""
        size = as_size(size)
        try:
            return self._realloc(block, size, zero, in_place_only)
        except HeapFullError as shortage:
            return self.session.retry(shortage, lambda: self._realloc(block, size, zero, in_place_only))

    def _realloc(self, block: Block, size: int, zero: bool, in_place_only: bool) -> Block:
        self.check()
        self._check_own(block)
        block.release_views()
        with self._hold():
            self._count()
            old_size = self.mapping.shape.word_format(block.slot).size(self.word_of(block))
            if not self._resize_here(block, size, in_place_only):
                self._resize_there(block, old_size, size, in_place_only)
            if zero and size > old_size:
                self.mapping.zero(block.address + old_size, size - old_size)
        return block

    def _resize_here(self, block: Block, size: int, in_place_only: bool) -> bool:
        """Resize within what the block occupies by storing its word; False if that is not possible, or too wasteful."""
        if not self.session.has_front_ends:
            return False
        form = self.mapping.shape.word_format(block.slot)
        with self._gate:  # so that the session does not end in between
            self.check()
            word = self.word_of(block)
            extent = self.extent_of(block, word)
            if size > extent or not self._is_ours_to_cache(word, block):
                return False
            if form is RUN_WORD:
                if max(pages_for(size), 1) << PAGE_SHIFT != extent:
                    return False
            elif not in_place_only and class_of(size).extent * 2 < extent:
                return False
            word = form.busy(form.session(word), form.generation(word), size)
            own = -word if block.has_handle else word
            self._words[block.slot] = word
            block.become(block.slot, block.address, extent, own)
            _keep_from_reopening(block)
        return True

    def note_resized(self, block: Block, word: int) -> None:
        """For Block: another process resized the block. Args: word (its state word now)."""
        block.become(block.slot, block.address, self.extent_of(block, word), -word)
        _keep_from_reopening(block)

    def can_grow_here(self, block: Block, size: int) -> bool:
        """Whether a block may have `size` bytes where it is: a run, for all we know, or one of a slab in its extent."""
        return block.slot < self.slabs or size <= block.extent

    def _resize_there(self, block: Block, old_size: int, size: int, in_place_only: bool) -> None:
        """Have the daemon resize the block, or move it."""
        if not in_place_only and not self.can_grow_here(block, size):
            self._move(block, old_size, size)
            return
        try:
            request = ask.HeapResize(self.id, block.address, block.generation, size, in_place_only)
            grant = self.session.call_for_memory(request, self.id)
        except CannotResizeInPlaceError:
            if in_place_only:
                raise
            self._move(block, old_size, size)
        except NotABlockError:
            raise _freed(block) from None
        else:
            slot, address, _, extent, _ = grant
            self.away.forget(slot)
            self.note_growth(extent - block.extent)
            block.become(slot, address, extent, -self._words[slot])
            self.note_handle(block, block.word)
            self.mapping.protect(block.address, max(block.extent, 1), executable=self.is_executable)

    def _move(self, block: Block, old_size: int, size: int) -> None:
        """Make `block` a larger or smaller one elsewhere, with the same first bytes."""
        new, freeing = self._prepare_move(block, old_size, size)
        # Nothing is called here: no signal handler gets in between.
        self._words[block.slot] = freeing.freed
        shelf = freeing.shelf
        shelf += (freeing.entry,)
        block.slot, block.address, block.extent, block._word = new.slot, new.address, new.extent, -new._word
        block._base, block._tail = 0, None
        self.note_handle(block, block.word)

    def replace(self, block: Block, size: int, fill: Callable[[int], None], *, serialize: bool = True) -> Block:
        """Another block of `size` bytes with the same first bytes for this one, which is freed.

        All or nothing, whatever a signal handler raises: nothing is called between the last thing that can fail and the
        return, so that who calls this and keeps what it returns can rely on the exception, too: then `block` is as it
        was.
        Args:   fill (is called with the new block's address, before anybody can know of it), serialize (False: without
                the mutex, as in `unserialized`).
        Raises: as alloc; BlockInUseError, StaleHandleError, ClosedError.
        """
        try:
            return self._replace(block, size, fill, serialize)
        except HeapFullError as shortage:
            return self.session.retry(shortage, lambda: self._replace(block, size, fill, serialize))

    def _replace(self, block: Block, size: int, fill: Callable[[int], None], serialize: bool) -> Block:
        self.check()
        self._check_own(block)
        block.release_views()
        mutex, is_held = self._mutex, serialize and self._takes_mutex
        lease, mark = mutex.lease(), mutex.mark()
        try:
            if is_held:
                mutex.acquire(self.session.timeout)
                self._count()
            old_size = self.mapping.shape.word_format(block.slot).size(self.word_of(block))
            new, freeing = self._prepare_move(block, old_size, size, fill)
        except BaseException:
            if is_held:
                mutex.unwind(mark)
            raise
        # Nothing is called from here on, not even to give up the mutex.
        self._words[block.slot] = freeing.freed
        shelf = freeing.shelf
        shelf += (freeing.entry,)
        block._word = 0
        if is_held:
            del lease.held
        return new

    def _prepare_move(
        self, block: Block, old_size: int, size: int, fill: Callable[[int], None] | None = None
    ) -> tuple[Block, Freeing]:
        """All of a move that can fail: another block with the same first bytes, and what is left to do to free this
        one, at once. Raises: as alloc; nothing has changed then."""
        new = None
        try:
            new = self._alloc(size, False)
            self.mapping.copy(new.address, block.address, min(old_size, size))
            if fill is not None:
                fill(new.address)
            while True:
                freeing = self._prepare_free(block)
                # Another thread may have had the caches given back since, or the heap may have gone.
                if (
                    self._words[self.live_slot] == self._live_word
                    and self._words[block.slot] == freeing.word
                    and freeing.front is self._front
                ):
                    return new, freeing
        except BaseException:
            if new is not None:
                self._regret(new)
                if block.has_handle:
                    self.note_handle(block, block.word)  # again
            raise

    def _prepare_free(self, block: Block) -> Freeing:
        """All of a free but what needs no call."""
        with self._enter():
            word, front = self.word_of(block), self._front_end()
            self.away.forget(block.slot)
            if not self._is_ours_to_cache(word, block):
                return Freeing(front, word, word, self.session.strays, (self.id, block.address, block.generation))
            if front is None or (self.releases_large and block.extent >= MIB) or get_ident() in working:
                self.note_growth(-block.extent)
                form = self.mapping.shape.word_format(block.slot)
                generation = form.next_generation(form.generation(word))
                freed = form.cached(self.session.number, generation)
                return Freeing(front, word, freed, self.session.strays, (self.id, block.address, -generation))
            return front.prepare_free(block, word)

    def guest(self, slot: int, address: int, extent: int, word: int) -> Block:
        """For the session: the object for another session's run that was opened by its handle.

        Args: word (its state word).
        """
        kind: type[Block] | None = None
        if not (self._is_serialized or self.info.flags & F_FREE_ORPHANS) and self.session.has_front_ends:
            kind = self.homes.guest_type(RUN_WORD.session(word), self._live_word)
        return (kind or Visitor)(self, slot, address, extent, -word)

    # -- looking -----------------------------------------------------------------------------------------------------
    def walk(self) -> Iterator[Entry]:
        """The heap's entries: each region, oldest first and those of large runs last, then what tiles it, in address
        order. Asked for page by page: a heap that changes meanwhile may show a change in part."""
        cursor = 0
        while True:
            self.check()
            with self._hold():
                self._count()
                entries, cursor = self.session.call(ask.HeapWalk(self.id, cursor, _WALK_PAGE))
            for fields in entries:
                fields[0] = _KINDS[fields[0]]
                yield Entry._make(fields)
            if not cursor:
                return

    def validate(self, block: Block | None = None) -> list[Violation]:
        """The broken invariants of the heap, or of one block of it; an empty list if there is none."""
        self.check()
        if block is not None:
            self._check_own(block)
        with self._hold():
            self._count()
            if block is not None:
                try:
                    self.word_of(block)
                except LookupError as error:  # its memory may be another block's by now, and that one in order
                    return [Violation("stale-block", block.address, 0, str(error))]
                except ValueError:
                    pass  # free: the daemon says so
            found = self.session.call(ask.HeapValidate(self.id, 0 if block is None else block.address))
        return [Violation(*fields) for fields in found]

    def compact(self) -> int:
        """Coalesce what is free and give its memory back to the system; no block moves.

        Returns: bytes of the largest committed free extent, before it was given back.
        """
        self.check()
        with self._hold():
            self._count()
            self.release_cache(thorough=True)
            largest: int = self.session.call(ask.HeapCompact(self.id))
        return largest

    def trim(self) -> None:
        """Give the free blocks that this session caches back to the heap. Raises: DaemonError."""
        self.check()
        self._free_deferred()
        with self._hold():
            self._count()
            self.release_cache(thorough=True)

    def statistics(self) -> HeapStatistics:
        """Bytes and counts of the heap; the parts add up."""
        self.check()
        if self._front is not None:
            with self._hold(), self._enter():
                if self._front is not None:
                    self.count_acquisitions(self._front.take_count())
        return HeapStatistics(*self.session.call(ask.HeapStatisticsGet(self.id)))

    # -- names -------------------------------------------------------------------------------------------------------
    def publish(self, name: str, block: Block) -> None:
        """Let `name` stand for a block, at once in place of what it stood for. Whoever waits for it is told.

        Raises: WrongHeapError, StaleHandleError, ClosedError, InvalidArgumentError, LimitError.
        """
        self.check()
        self._check_own(block)
        self.session.call(ask.NamePublish(self.id, name, block.address, block.generation))

    def lookup(self, name: str, timeout: float | None = None) -> Block:
        """The block that `name` stands for.

        Args:   timeout (seconds to wait for somebody to publish it; None or 0: do not wait).
        Raises: NoSuchNameError if it stands for nothing and no wait was asked for; WaitTimeoutError past the timeout;
                DaemonLostError if the daemon has died, then at the latest.
        """
        timeout = as_timeout(timeout)
        deadline = monotonic() + (timeout or 0.0)
        for _ in range(_LOOKUP_RETRIES):
            publication = self._look_up(name, deadline, timeout)
            handle = Handle(self.mapping.instance, publication.slot, publication.address, publication.generation)
            try:
                return self.session.open(handle)
            except StaleHandleError:
                continue  # replaced, and the old block freed, between the answer and the look
        raise StaleHandleError(f"the block published as {name!r} is freed as often as it is looked up")

    def _look_up(self, name: str, deadline: float, timeout: float | None) -> Publication:
        while True:
            self.check()
            wait_s = min(max(deadline - monotonic(), 0.0), _LOOKUP_SLICE_S)
            try:
                request = ask.NameLookup(self.id, name, int(wait_s * 1000))
                found = self.session.call(request, wait_s, deadline if timeout else inf)
            except (WaitTimeoutError, NoSuchNameError):
                if not timeout:
                    raise NoSuchNameError(f"nothing is published as {name!r}", name=name) from None
                if monotonic() < deadline:
                    continue
                raise WaitTimeoutError(f"nothing was published as {name!r} within {timeout:g} s", name=name) from None
            return Publication(*found)

    def unpublish(self, name: str) -> None:
        """Let `name` stand for nothing. Raises: NoSuchNameError if it does."""
        self.check()
        self.session.call(ask.NameUnpublish(self.id, name))

    def names(self) -> Iterator[Publication]:
        """What is published in the heap, by name."""
        after: str | None = None
        while True:
            self.check()
            found = self.session.call(ask.NameList(self.id, after, _NAMES_PAGE))
            for fields in found:
                yield Publication(*fields)
            if len(found) < _NAMES_PAGE:
                return
            after = found[-1][0]

    # -- the end -----------------------------------------------------------------------------------------------------
    def destroy(self) -> None:
        """Give every page of the heap back, for all who have it open and whatever is allocated in it.

        Raises: NotPermittedError for a default heap; HeapDestroyedError if it is gone already.
        """
        self.check()
        self.session.call(ask.HeapDestroy(self.id))
        with self._enter():
            self._drop_front()
        self.session.forget(self)

    def close(self) -> None:
        """Use the heap no longer; a named one that nobody has open goes, unless it is persistent. Twice is harmless."""
        if self._is_closed:
            return
        with suppress(LookupError):  # gone already
            self.check()
            self._free_deferred()
            with self._hold():
                self.release_cache(thorough=True)
            self.session.call(ask.HeapClose(self.id))
        self.session.forget(self)
        self.mark_closed()


def _keep_from_reopening(block: Block) -> None:
    """Its views are of another size than when it was opened: it is not to be opened again as it is."""
    if isinstance(block, Visitor):
        block._base = 0


def _freed(block: Block) -> StaleHandleError:
    """What to say of a block whose place the daemon knows as no block's: it was one, so its slab or run has gone."""
    return StaleHandleError(f"the block at {block.address:#x} was freed", address=block.address)
