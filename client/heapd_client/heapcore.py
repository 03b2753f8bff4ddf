"""What a heap is in one process before it allocates anything: alive or not, its lock, its front end."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, cast

from heapd.errors import ClosedError, HeapDestroyedError, LockTimeoutError
from heapd.layout import (
    C_ACQUIRED,
    C_CONTENDED,
    C_HEAP_ID,
    C_HOLDER,
    C_LIVE,
    C_RECOVERED,
    C_WAITED_NS,
    F_EXECUTABLE,
    F_SERIALIZE,
    HEAP_INDEX_BITS,
    RUN_WORD,
    SLAB_WORD,
    WORD,
)
from heapd.mutex import Mutex, held
from heapd.records import HeapInfo
from heapd.units import PAGE_SHIFT, PAGE_SIZE, pages_for
from heapd.wire import messages as ask

from .arguments import as_timeout
from .block import Block, freed_elsewhere
from .frontend import FrontEnd, check_busy
from .homing import Away, Homes
from .hotpath import Lock, is_quiet
from .locking import HeldLock

if TYPE_CHECKING:
    from .allocating import AllocatingHeap
    from .heap import Heap
    from .mapping import Mapping
    from .session import Session

__all__ = ["HeapCore", "deferred", "working"]

# Threads (by ident) that are in some front end now. What a finaliser frees there waits in `deferred`: the lists are in
# the middle of a change, and to wait for another heap's gate or mutex could be to wait for ever.
working: Final[set[int]] = set()
deferred: Final[deque[tuple[AllocatingHeap, Block]]] = deque()


class HeapCore:
    """The part of Heap below its functions; see Heap.

    Fields: live_slot (of the heap's live word), releases_large (blocks of 1 MiB and more go back to the system when
    they are freed, past the caches).
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
        self.releases_large = False
        self._exempt: set[int] = set()  # threads (by ident) that take no mutex now
        self._is_closed = False
        self.live_slot = self._control + C_LIVE
        self.slabs = mapping.shape.first_page * (PAGE_SIZE // WORD)  # the first slot that may be in a slab
        self._live_word = info.epoch << 1 | 1
        self._recoveries: int = self._words[self._control + C_RECOVERED]  # at the last `lock`
        self._was_locked = False  # by `lock`, ever
        self._front: FrontEnd | None = None  # made at the first alloc or free; `self.alloc` is its hot function then
        self._had_front = False
        self._used = 0  # bytes that were in use when the front end before went
        self.away = Away(mapping)
        self.homes = Homes(cast("Heap", self))
        self._is_paused = False
        self._is_releasing = False
        self._is_swept = False  # perhaps: an answer was not waited for, and the daemon may yet take all that is CACHED
        self._gate = threading.RLock()  # of the front end, in this process; taken after the mutex
        self._harmless = {HeapCore._settle.__code__, type(self).alloc_slow.__code__}  # type: ignore[attr-defined]

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

    # -- the front end -----------------------------------------------------------------------------------------------
    def _enter(self) -> AbstractContextManager[object]:
        """The gate, round what is done with the front end: one thread at a time, and `release_cache` at another."""
        return self._gate if self.session.has_front_ends else nullcontext()

    def _front_end(self) -> FrontEnd | None:
        """The front end, inside `_enter`; made now if there is none, or it is of an earlier epoch. None in a session
        without front ends, while the daemon may be giving everything back, and in a finaliser that runs then."""
        self.check()
        front = self._front
        if front is not None and (front.live == self._live_word or get_ident() in working):
            return front
        if self._is_releasing or not self.session.has_front_ends:
            return None
        session = self.session.number
        self.release_cache()
        if self._is_swept:
            return None
        return self._front or self._new_front(session)

    @property
    def has_had_front_end(self) -> bool:
        """Blocks of this heap are, or were, cached here."""
        return self._had_front

    def open_front_end(self) -> bool:
        """Have the front end there before the first alloc. False in a session without front ends."""
        with self._enter():
            return self._front_end() is not None

    def _new_front(self, session: int) -> FrontEnd:
        lock = None
        if self._is_serialized:
            lock = Lock(self._mutex.trylock, self._mutex.unlock, self._settle, self._undo)
        front = self._front = FrontEnd(cast("Heap", self), session, self._live_word, lock, self._used)
        self._had_front = True
        self.__dict__["alloc"] = front.alloc
        return front

    def release_cache(self, *, thorough: bool = False) -> None:
        """Give back what is cached here, and start with empty caches.

        Args:   thorough (also what interrupted calls lost, if no front end has anything).
        Raises: DaemonError.
        """
        with self._enter():
            if self._is_releasing:
                return
            me = get_ident()
            if me in working:  # in `reclaim`, or a finaliser: what is there is needed yet
                if self._front is not None:
                    self.tell_given_back(self._front.empty())
                return
            try:
                working.add(me)
                self._is_releasing = True
                blocks = self._drop_front()
                if not (blocks or self._is_swept or (thorough and self._had_front)):
                    return
                if is_quiet(self._harmless):
                    self._is_swept = True
                    self.session.sweep(self.id)
                    self._is_swept = False
                else:
                    self.tell_given_back(blocks)
            finally:
                self._is_releasing = False
                working.discard(me)

    def release_cache_if_idle(self) -> None:
        """As release_cache, but not now if another thread or process is at work with the heap: its turn will come."""
        with suppress(LockTimeoutError), held(self._mutex, 0) if self._is_serialized else nullcontext():
            try:
                if self._gate.acquire(blocking=False):
                    self.release_cache()
            finally:
                if self._gate._is_owned():  # type: ignore[attr-defined]
                    self._gate.release()

    def tell_given_back(self, blocks: list[tuple[int, int]], *, waits: bool = True) -> None:
        """Give cached blocks, in no bin any more, back to the daemon: each as its address and generation.

        The daemon may get to know late, when the answer was not waited for, and one may have been leased again then: so
        the generation.
        Args:   waits (until it is done; else it is before what this thread asks the daemon next).
        Raises: DaemonError."""
        tell = self.session.call if waits else self.session.post
        for at in range(0, len(blocks), ask.MAX_BATCH):
            pairs = blocks[at : at + ask.MAX_BATCH]
            tell(ask.HeapGiveBack(self.id, [part for pair in pairs for part in pair]))

    def note_growth(self, size: int) -> None:
        """Blocks in use have become more by so many bytes, past the front end."""
        if self._front is not None:
            self._front.held += size

    def count_acquisitions(self, count: int) -> None:
        """Add to the counter of the mutex, which the caller holds."""
        self._words[self._acquired] += count

    def _drop_front(self) -> list[tuple[int, int]]:
        """Use the front end no longer. Returns: addresses and generations of what it cached."""
        front, self._front = self._front, None
        self.__dict__.pop("alloc", None)
        if front is None:
            return []
        self._used = front.used_bytes()
        self.count_acquisitions(front.take_count())
        return front.end()

    def _settle(self, status: int) -> object:
        """For the hot path: wait for the mutex."""
        return self._mutex.settle(status, self.session.timeout)

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

    # -- blocks as the arena shows them ------------------------------------------------------------------------------
    def word_of(self, block: Block) -> int:
        """The state word of an allocated block. Raises: DoubleFreeError, StaleHandleError."""
        slot = block.slot
        if slot < self.slabs:
            return check_busy(self._words[slot], block, RUN_WORD)
        # A slab may be gone; to read there would commit its page.
        if not self.mapping.is_committed(slot // (PAGE_SIZE // WORD)):
            raise freed_elsewhere(block)
        return check_busy(self._words[slot], block, SLAB_WORD)

    def has_unchanged(self, block: Block) -> bool:
        """Whether heap and block are there, the block as its object knows it; if not, `check` and `word_of` tell."""
        words, slot = self._words, block.slot
        return (
            words[self.live_slot] == self._live_word
            and (slot < self.slabs or self.mapping.is_committed(slot // (PAGE_SIZE // WORD)))
            and words[slot] == abs(block._word)
            and not self._is_closed
        )

    def note_handle(self, block: Block, word: int) -> None:
        """A handle of a block was made: if it is a run of ours, it may come home. Args: word (its state word)."""
        front = self._front
        if front is not None and block.slot < self.slabs and RUN_WORD.session(word) == front.session:
            front.note_away(block)

    def extent_of(self, block: Block, word: int) -> int:
        """Bytes that an allocated block occupies. Another process may have resized a run since we looked."""
        if block.word_here == word or block.slot >= self.slabs:
            return block.extent
        return max(pages_for(RUN_WORD.size(word)), 1) << PAGE_SHIFT

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
        timeout = as_timeout(timeout)
        mutex = self._mutex
        self._was_locked = True
        lock = HeldLock.of(self._unlock, self.mapping)
        words, holder = self._words, self._control + C_HOLDER
        me = self.session.number << 32 | os.getpid()
        mark = mutex.mark()
        try:
            status = mutex.trylock()
            if status:
                mutex.settle(status, timeout)
                self.check()  # it may have gone meanwhile, and the mutex be another heap's
            # Also where an alloc or a compact, here or elsewhere, was the first to take it from the dead holder.
            recoveries = words[self._control + C_RECOVERED]
            lock.recovered = recoveries != self._recoveries
            self._recoveries = recoveries
            words[self._acquired] += 1
            words[holder] = me
        except BaseException:
            mutex.unwind(mark)
            raise
        return lock

    @property
    def must_stay_mapped(self) -> bool:
        """A thread of this process holds the lock, perhaps: what the C library knows of the locks that a thread holds
        leads through the mutexes themselves, and its next lock of any heap would go there."""
        return self._was_locked and os.path.exists(f"/proc/self/task/{self._mutex.owner_tid()}")

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
        if self._takes_mutex:
            return held(self._mutex, self.session.timeout)
        return nullcontext()

    @property
    def _takes_mutex(self) -> bool:
        return self._is_serialized and not (self._exempt and get_ident() in self._exempt)

    @contextmanager
    def unserialized(self) -> Iterator[None]:
        """In the block the calling thread's functions of this heap take no mutex, but `lock` and the hot path of
        `alloc` and `Block.free`. As safe as a heap that is not serialized: see there."""
        me = get_ident()
        is_outer = me not in self._exempt
        try:
            self._exempt.add(me)
            yield
        finally:
            if is_outer:
                self._exempt.discard(me)

    def _count(self) -> None:
        """Count an acquisition, inside `_hold`; the heap may have gone while we waited."""
        if self._takes_mutex:
            self._words[self._acquired] += 1
            self.check()
        front = self._front
        if front is not None and front.live != self._live_word:
            self.release_cache()

    # -- the end, and forks ------------------------------------------------------------------------------------------
    def mark_closed(self, patience_s: float = 1.0) -> None:
        """For the session: its end, or this heap's. No thread makes use of what is cached from now on, unless one is
        stuck for `patience_s` seconds."""
        self._is_closed = True
        self.away.clear()
        self.homes.clear()
        is_ours = self._gate.acquire(timeout=patience_s)
        try:
            if self._drop_front():
                is_quiet(self._harmless)
        finally:
            if is_ours:
                self._gate.release()

    def prepare_fork(self) -> None:
        """In the parent, before a fork: what other threads free until `has_forked` waits, because the child gets
        copies of all Block objects, which must go stale when freed here."""
        self._is_paused = self._gate.acquire(timeout=self.session.timeout)
        if self._front is not None:
            self._front.stop_frees()

    def has_forked(self) -> None:
        """In the parent, after it."""
        front = self._front
        if front is not None:
            self.count_acquisitions(front.take_count())
            self._new_front(front.session).inherit(front)
        if self._is_paused:
            self._gate.release()

    def forked(self) -> None:
        """In the child: what is cached is the parent's."""
        self._gate = threading.RLock()
        self._is_swept = False
        self._exempt.clear()
        if self._front is not None:
            self._front.end()
            self._front = None
            self._used = 0
            self.__dict__.pop("alloc", None)
        self.away.clear()
        self.homes.clear()
