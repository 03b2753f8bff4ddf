"""A heap as its clients use it: the Win32 heap functions over one session.

Every heap function of a serialized heap runs with the heap's mutex held, across the round trip that it needs; with
`serialize=False` none takes it. What the daemon knows it is asked; what lies in the mapping (is the heap alive, what
does a state word say) is read there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from operator import index
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from heapd.errors import (
    CannotResizeInPlaceError,
    ClosedError,
    DaemonError,
    DoubleFreeError,
    HeapDestroyedError,
    InvalidArgumentError,
    NoSuchNameError,
    NotABlockError,
    StaleHandleError,
    WaitTimeoutError,
    WrongHeapError,
)
from heapd.layout import (
    C_ACQUIRED,
    C_CONTENDED,
    C_HEAP_ID,
    C_HOLDER,
    C_LIVE,
    C_RECOVERED,
    C_WAITED_NS,
    F_EXECUTABLE,
    F_FREE_ORPHANS,
    F_SERIALIZE,
    HEAP_INDEX_BITS,
    Handle,
)
from heapd.mutex import Mutex, held
from heapd.records import Entry, EntryKind, HeapInfo, HeapStatistics, Publication, Violation
from heapd.sizeclass import class_of
from heapd.units import PAGE_SHIFT, pages_for
from heapd.wire import MAX_BATCH
from heapd.wire import messages as ask

from .block import Block
from .frontend import FrontEnd, check_busy
from .hotpath import Lock
from .locking import HeldLock

if TYPE_CHECKING:
    from .mapping import Mapping
    from .session import Session

__all__ = ["Heap"]

_LOOKUP_SLICE_S: Final = 10.0  # longest wait that one request asks of the daemon
_LOOKUP_RETRIES: Final = 100  # arbitrary: a name replaced as often between question and look is not looked up
_WALK_PAGE: Final = 1024  # entries of a walk in one answer
_NAMES_PAGE: Final = 500


class Heap:
    """One heap; made by `Session.create_heap`, `open_heap` and `default_heap`.

    Attributes: session; mapping (the arena); id (never used again); is_executable; info (HeapInfo, of when it
    was opened).
    Locks: each method says nothing of its own; a serialized heap's functions take the heap's mutex, and wait for it
    at most the session's timeout (LockTimeoutError names the holder).
    """

    def __init__(self, session: Session, mapping: Mapping, info: HeapInfo) -> None:
        """For the library alone."""
        self.session = session
        self.mapping = mapping
        self.info = info
        self.id = info.heap_id
        self._words = mapping.words
        control_index = info.heap_id & (1 << HEAP_INDEX_BITS) - 1
        self._control = mapping.shape.control_slot(control_index)
        self._acquired = self._control + C_ACQUIRED
        self._mutex = Mutex(mapping.pointer + mapping.shape.mutex_address(control_index), self._count_wait)
        self._unlock = held(self._mutex).__exit__
        self._is_serialized = bool(info.flags & F_SERIALIZE)
        self.is_executable = bool(info.flags & F_EXECUTABLE)
        self._is_closed = False
        self.live_slot = self._control + C_LIVE
        self._live_word = info.epoch << 1 | 1
        self._front: FrontEnd | None = None  # made at the first alloc or free; `self.alloc` is its hot function then

    def __repr__(self) -> str:
        return f"<Heap {self.info.name or 'anonymous'!r} id={self.id:#x}>"

    def __reduce__(self) -> tuple[Any, ...]:
        from .registry import reopen_heap

        self.check()
        return reopen_heap, (str(self.session.endpoint), self.mapping.instance, self.id)

    @property
    def name(self) -> str | None:
        """The name it was created with, None for an anonymous heap."""
        return self.info.name

    @property
    def is_live(self) -> bool:
        """False once it was destroyed, or closed here. Read from the mapping; asks nobody."""
        return not self._is_closed and self._find_live_word() is not None

    def check(self) -> None:
        """Raises: ClosedError if the heap or its session was closed here, HeapDestroyedError if the heap is gone."""
        if self._is_closed:
            raise ClosedError("the heap was closed, or its session was")
        if self._words[self.live_slot] != self._live_word:
            word = self._find_live_word()
            if word is None:
                raise HeapDestroyedError(f"the heap {self.info.name or self.id} was destroyed", heap=self.id)
            self._live_word = word
            self.release_cache()

    def release_cache(self) -> None:
        """Give back what is cached here, and start with empty caches. Raises: DaemonError."""
        front = self._front
        if front is not None:
            self._drop_front()
            front.give_back_all()

    def _drop_front(self) -> None:
        if self._front is not None:
            self._words[self._acquired] += self._front.take_count()
            self._front.abandon()
            self._front = None
            self.__dict__.pop("alloc", None)

    def _front_end(self) -> FrontEnd | None:
        """The front end, made now if need be; None in a session without front ends."""
        if self._front is None and self.session.has_front_ends:
            session = self.session.number
            self.check()
            return self._new_front(session)
        return self._front

    def _new_front(self, session: int) -> FrontEnd:
        lock = None
        if self._is_serialized:
            mutex, timeout = self._mutex, self.session.timeout
            lock = Lock(mutex.trylock, mutex.unlock, lambda status: mutex.settle(status, timeout), self._undo)
        front = self._front = FrontEnd(self, session, self._live_word, lock)
        self.__dict__["alloc"] = front.alloc
        return front

    def _undo(self, status: int | None) -> None:
        """Give the mutex up, as a hot function's `status` tells; see hotpath.Lock."""
        mutex = self._mutex
        if status is None:
            if mutex.depth():  # trylock took it
                mutex.release()
        elif status == 0:
            mutex.release()
        elif status > 0:
            mutex.unwind(0)  # it waited, so it did not hold it before

    def _find_live_word(self) -> int | None:
        """The live word, None if the heap is no more or its control block serves another one."""
        words = self._words
        word: int = words[self.live_slot]
        return word if word & 1 and words[self._control + C_HEAP_ID] == self.id else None

    # -- the lock ----------------------------------------------------------------------------------------------------
    def lock(self, timeout: float | None = None) -> HeldLock:
        """Take the heap's lock: `with heap.lock():`, or until `unlock`. A thread may hold it more than once.

        While it is held no other process and no other thread gets through a heap function of a serialized heap. The
        kernel gives it up when its holder dies; the next one is told by `recovered`.
        Args:    timeout (seconds; None: for ever; 0: do not wait).
        Returns: the held lock; as a context manager it is given up at the end.
        Raises:  LockTimeoutError, naming the holder; HeapDestroyedError, ClosedError. Not held then.
        """
        self.check()
        mutex = self._mutex
        lock = HeldLock.of(self._unlock, self.mapping)
        words, holder = self._words, self._control + C_HOLDER
        me = self.session.number << 32 | os.getpid()
        mark = mutex.mark()
        try:
            status = mutex.trylock()
            if status:
                lock.recovered = mutex.settle(status, timeout)
            words[self._acquired] += 1
            words[holder] = me
        except BaseException:
            mutex.unwind(mark)
            raise
        return lock

    def unlock(self) -> None:
        """Give up a `lock` that was not taken by `with`.

        Raises: LockNotHeldError if the calling thread does not hold it.
        """
        if self._mutex.depth() == 1:
            self._words[self._control + C_HOLDER] = 0
        self._mutex.release()

    def _count_wait(self, waited_ns: int, recovered: bool) -> None:
        """Called with the mutex held, for an acquisition that waited or found its previous holder dead."""
        words, control = self._words, self._control
        if waited_ns:
            words[control + C_CONTENDED] += 1
            words[control + C_WAITED_NS] += waited_ns
        if recovered:
            words[control + C_RECOVERED] += 1

    def _hold(self) -> AbstractContextManager[object]:
        """The mutex of a serialized heap, round one heap function; counted by `_count`."""
        if self._is_serialized:
            return held(self._mutex, self.session.timeout)
        return nullcontext()

    def _count(self) -> None:
        """Count an acquisition, inside `_hold`; the heap may have gone while we waited."""
        if self._is_serialized:
            self._words[self._acquired] += 1
            self.check()

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
        blocks: list[Block] = []
        with self._hold():
            self._count()
            try:
                for at in range(0, len(wanted), MAX_BATCH):
                    self._alloc_batch(wanted[at : at + MAX_BATCH], zero, blocks)
            except BaseException:
                for block in blocks:
                    self.session.give_back_later(self.id, block.address, block.generation)
                self.session.give_back()
                raise
        return blocks

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
            for kind, *rest in entries:
                yield Entry(EntryKind(kind), *rest)
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

    def mark_closed(self) -> None:
        """For the session: its end, or this heap's."""
        self._is_closed = True
        self._drop_front()

    def has_forked(self) -> None:
        """In the parent of a fork: the child has copies of all Block objects, which must go stale when freed here."""
        front = self._front
        if front is not None:
            self._words[self._acquired] += front.take_count()
            self._new_front(front.session).inherit(front)

    def forked(self) -> None:
        """In a forked child: what is cached is the parent's."""
        if self._front is not None:
            self._front.abandon()
            self._front = None
            self.__dict__.pop("alloc", None)


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
