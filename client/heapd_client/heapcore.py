"""What a heap is in one process before it allocates anything: alive or not, its lock, its front end."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from heapd.errors import (
    ClosedError,
    HeapDestroyedError,
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
    F_SERIALIZE,
    HEAP_INDEX_BITS,
)
from heapd.mutex import Mutex, held
from heapd.records import HeapInfo

from .frontend import FrontEnd
from .hotpath import Lock
from .locking import HeldLock

if TYPE_CHECKING:
    from .heap import Heap
    from .mapping import Mapping
    from .session import Session

__all__ = ["HeapCore"]


class HeapCore:
    """The part of Heap below its functions; see Heap.

    Fields: live_slot (of the heap's live word).
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
        front = self._front = FrontEnd(cast("Heap", self), session, self._live_word, lock)
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
