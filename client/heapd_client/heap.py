"""A heap as its clients use it: the Win32 heap functions over one session.

Every heap function of a serialized heap runs with the heap's mutex held, across the round trip that it needs; with
`serialize=False` none takes it. What the daemon knows it is asked; what lies in the mapping (is the heap alive, what
does a state word say) is read there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import index
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from heapd.errors import (
    CannotResizeInPlaceError,
    ClosedError,
    DaemonError,
    DoubleFreeError,
    InvalidArgumentError,
    NoSuchNameError,
    NotABlockError,
    StaleHandleError,
    WaitTimeoutError,
    WrongHeapError,
)
from heapd.layout import (
    F_FREE_ORPHANS,
    Handle,
)
from heapd.mutex import held
from heapd.records import Entry, EntryKind, HeapStatistics, Publication, Violation
from heapd.sizeclass import class_of
from heapd.units import PAGE_SHIFT, pages_for
from heapd.wire import MAX_BATCH
from heapd.wire import messages as ask

from .block import Block
from .frontend import check_busy
from .heapcore import HeapCore

if TYPE_CHECKING:
    pass

__all__ = ["Heap"]

_LOOKUP_SLICE_S: Final = 10.0  # longest wait that one request asks of the daemon
_LOOKUP_RETRIES: Final = 100  # arbitrary: a name replaced as often between question and look is not looked up
_KINDS: Final = {int(kind): kind for kind in EntryKind}
_WALK_PAGE: Final = 1024  # entries of a walk in one answer
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
        size = _as_size(size)
        self.check()
        if not self._is_serialized:
            return self._alloc(size, zero, popped)
        with held(self._mutex, self.session.timeout):
            self._words[self._acquired] += 1
            return self._alloc(size, zero, popped)

    def _alloc(self, size: int, zero: bool, popped: Block | None = None) -> Block:
        front = self._front_end()
        if front is not None:
            return front.allocate(size, zero, popped)
        slot, address, generation, extent, fresh = self.session.call(ask.HeapAlloc(self.id, size))
        block = self._block(slot, address, generation, extent, size)
        if zero or self.mapping.has_executable_pages or self.is_executable:
            self._prepare(block, zero and not fresh)
        return block

    def _block(self, slot: int, address: int, generation: int, extent: int, size: int) -> Block:
        """The object for a block that the daemon has allocated for this session."""
        word = self.mapping.shape.word_format(slot).busy(self.session.number, generation, size)
        return Block(self, slot, address, extent, word)

    def _prepare(self, block: Block, zero: bool) -> None:
        """Make a block just granted what was asked for; it is given back if that fails."""
        try:
            self.mapping.protect(block.address, max(block.extent, 1), executable=self.is_executable)
            if zero:
                self.mapping.zero(block.address, block.size)
        except BaseException:
            self.session.give_back_later(self.id, block.address, block.generation)
            raise

    def alloc_many(self, sizes: int | Iterable[int], count: int | None = None, *, zero: bool = False) -> list[Block]:
        """Allocate several blocks in few round trips; all of them or none.

        Args:    sizes (bytes, one each; or one size, with `count`), count (blocks of that size), zero (as for alloc).
        Returns: the blocks, in the order of `sizes`.
        Raises:  as alloc.
        """
        if isinstance(sizes, int):
            if count is None or count < 0:
                raise InvalidArgumentError("alloc_many of one size needs a count of blocks, 0 or more")
            wanted = [sizes] * count
        elif count is not None:
            raise InvalidArgumentError("alloc_many takes a count only with a single size")
        else:
            wanted = [_as_size(size) for size in sizes]
        self.check()
        with self._hold():
            self._count()
            front = self._front_end()
            found = [front.allocate_cached(size) for size in wanted] if front is not None else [None] * len(wanted)
            granted: list[Block] = []
            try:
                if zero:
                    for block in filter(None, found):
                        self.mapping.zero(block.address, block.size)
                missing = [size for size, block in zip(wanted, found, strict=True) if block is None]
                for at in range(0, len(missing), MAX_BATCH):
                    self._alloc_batch(missing[at : at + MAX_BATCH], zero, granted)
            except BaseException:
                for block in (*filter(None, found), *granted):
                    self.session.give_back_later(self.id, block.address, block.generation)
                self.session.give_back()
                raise
        rest = iter(granted)
        return [block if block is not None else next(rest) for block in found]

    def _alloc_batch(self, sizes: list[int], zero: bool, blocks: list[Block]) -> None:
        grants = self.session.call(ask.HeapAllocMany(self.id, sizes))
        first = len(blocks)
        blocks += [
            self._block(slot, address, generation, extent, size)
            for (slot, address, generation, extent, _), size in zip(grants, sizes, strict=True)
        ]
        if zero or self.mapping.has_executable_pages or self.is_executable:
            for block, grant in zip(blocks[first:], grants, strict=True):
                self.mapping.protect(block.address, max(block.extent, 1), executable=self.is_executable)
                if zero and not grant[4]:
                    self.mapping.zero(block.address, block.size)

    def free(self, block: Block) -> None:
        """Give a block of this heap back. Raises: as Block.free; WrongHeapError if it is of another heap."""
        self.check()
        self._check_own(block)
        block.release_views()
        if self._is_serialized:
            with held(self._mutex, self.session.timeout):
                self._words[self._acquired] += 1
                self._free(block)
        else:
            self._free(block)

    def _free(self, block: Block) -> None:
        front = self._front_end()
        if front is not None and self._is_ours_to_cache(block):
            front.take_back(block)
            return
        try:
            self.session.call(ask.HeapFree(self.id, block.address, block.generation))
        except NotABlockError:
            raise _freed(block) from None
        block.forget()

    def _is_ours_to_cache(self, block: Block) -> bool:
        """Whether the state word of an allocated block is this session's to write. In a heap that frees the blocks
        of sessions that died, the daemon may be about to do that to somebody else's."""
        if not self.info.flags & F_FREE_ORPHANS:
            return True
        form = self.mapping.shape.word_format(block.slot)
        return form.session(self._words[block.slot]) == self.session.number

    def free_many(self, blocks: Iterable[Block]) -> None:
        """Give several blocks back. All are checked before any is freed.

        Raises: as Block.free, of any of them; DoubleFreeError also if one is named twice.
        """
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
            if self._front_end() is None:
                self._free_batches(doomed)
                return
            for block in doomed:
                check_busy(self._words[block.slot], block, self.mapping.shape.word_format(block.slot))
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
        if block.heap is not self and (block.heap.id != self.id or block.heap.mapping is not self.mapping):
            raise WrongHeapError(f"the block at {block.address:#x} is of another heap", address=block.address)
        if block.is_free:
            raise ClosedError("the block has been freed")

    def realloc(self, block: Block, size: int, *, zero: bool = False, in_place_only: bool = False) -> Block:
        """Resize a block of this heap; see Block.realloc."""
        size = _as_size(size)
        self.check()
        self._check_own(block)
        block.release_views()
        with self._hold():
            self._count()
            old_size = block.size
            if not self._resize_here(block, size, in_place_only):
                self._resize_there(block, size, in_place_only)
            if zero and size > old_size:
                self.mapping.zero(block.address + old_size, size - old_size)
        return block

    def _resize_here(self, block: Block, size: int, in_place_only: bool) -> bool:
        """Resize within what the block occupies by storing its word; False if that is not possible, or too wasteful."""
        if self._front_end() is None or size > block.extent or not self._is_ours_to_cache(block):
            return False
        form = self.mapping.shape.word_format(block.slot)
        if self.mapping.shape.is_run_slot(block.slot):
            if max(pages_for(size), 1) << PAGE_SHIFT != block.extent:
                return False
        elif not in_place_only and class_of(size).extent * 2 < block.extent:
            return False
        word = check_busy(self._words[block.slot], block, form)
        word = form.busy(form.session(word), form.generation(word), size)
        self._words[block.slot] = word
        block.become(block.slot, block.address, block.extent, -word if block.has_handle else word)
        return True

    def _resize_there(self, block: Block, size: int, in_place_only: bool) -> None:
        """Have the daemon resize the block, or move it."""
        try:
            grant = self.session.call(ask.HeapResize(self.id, block.address, block.generation, size, in_place_only))
        except CannotResizeInPlaceError:
            if in_place_only:
                raise
            self._move(block, size)
        except NotABlockError:
            raise _freed(block) from None
        else:
            slot, address, _, extent, _ = grant
            block.become(slot, address, extent, -self._words[slot])
            self.mapping.protect(block.address, max(block.extent, 1), executable=self.is_executable)

    def _move(self, block: Block, size: int) -> None:
        """Make `block` a larger or smaller one elsewhere, with the same first bytes."""
        new = self._alloc(size, False)
        old = Block(self, block.slot, block.address, block.extent, -block.word)
        try:
            self.mapping.copy(new.address, block.address, min(block.size, size))
            self._free(old)
        except DaemonError:
            # Nobody knows whether the old one is free now: keep the copy, and ask again later.
            self.session.give_back_later(self.id, old.address, old.generation)
        except BaseException:
            self._free(new)
            raise
        block.become(new.slot, new.address, new.extent, -new.word)

    # -- looking -----------------------------------------------------------------------------------------------------
    def walk(self) -> Iterator[Entry]:
        """The heap's entries in address order: each region, and what tiles it. Asked for page by page: a heap that
        changes meanwhile may show a change in part."""
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
            found = self.session.call(ask.HeapValidate(self.id, 0 if block is None else block.address))
        return [Violation(*fields) for fields in found]

    def compact(self) -> int:
        """Coalesce what is free and give its memory back to the system; no block moves.

        Returns: bytes of the largest committed free extent, before it was given back.
        """
        self.check()
        with self._hold():
            self._count()
            self.release_cache()
            largest: int = self.session.call(ask.HeapCompact(self.id))
        return largest

    def trim(self) -> None:
        """Give the free blocks that this session caches back to the heap. Raises: DaemonError."""
        self.check()
        with self._hold():
            self._count()
            self.release_cache()

    def statistics(self) -> HeapStatistics:
        """Bytes and counts of the heap; the parts add up."""
        self.check()
        if self._front is not None:
            with self._hold():
                self._words[self._acquired] += self._front.take_count()
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
        Raises: NoSuchNameError if it stands for nothing and no wait was asked for; WaitTimeoutError past the timeout.
        """
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
                found = self.session.call(ask.NameLookup(self.id, name, int(wait_s * 1000)), wait_s)
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
        self._drop_front()
        self.session.forget(self)

    def close(self) -> None:
        """Use the heap no longer; a named one that nobody has open goes, unless it is persistent. Twice is harmless."""
        if self._is_closed:
            return
        with suppress(LookupError):  # gone already
            self.check()
            self.release_cache()
            self.session.call(ask.HeapClose(self.id))
        self.session.forget(self)
        self.mark_closed()


def _freed(block: Block) -> StaleHandleError:
    """What to say of a block whose place the daemon knows as no block's: it was one, so its slab or run has gone."""
    return StaleHandleError(f"the block at {block.address:#x} was freed", address=block.address)


def _as_size(size: Any) -> int:
    """An int out of what counts as one, such as numpy's."""
    try:
        value = index(size)
    except TypeError:
        raise InvalidArgumentError(f"a size is a count of bytes, not {type(size).__name__}") from None
    if not 0 <= value < 1 << 64:
        raise InvalidArgumentError("a size is a count of bytes, 0 to 2**64 - 1")
    return value
