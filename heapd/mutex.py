"""The robust, process-shared, recursive mutex of a heap: pthread_mutex_t in the arena, through ctypes.

The only file that calls pthread. It takes *pointers* (addresses in this process), never keeps a mapping alive, and
never waits with the GIL held.

    trylock, the GIL held            free, or ours already: about 300 ns with the unlock
      |
      +-- EBUSY, another thread of this process has it: trylock now and then (`_poll` says why)
      +-- EBUSY: clocklock in slices, the GIL released, against the monotonic clock, until the deadline
      +-- EOWNERDEAD: the holder died; mark consistent, go on, tell the caller
      +-- ENOTRECOVERABLE: somebody unlocked without marking; nobody can ever take it again

Caveats, each by design of the kernel's robust lists:
- A thread that holds the mutex must not unmap it: the kernel then cannot release it when the thread dies.
- A mutex must never be decommitted or initialised again while anybody may use it.
- Holders are known by thread id, so all processes that share a mutex must be in one pid namespace.
- A forked child does not hold what its parent held, and the parent keeps it.

An exception from a signal handler (Ctrl-C) can arrive between the C call that takes or gives the mutex and the next
bytecode. So who takes it says `mark()` before and `unwind(mark)` in case of an exception; `held()` does both.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from ctypes import byref, c_int, c_uint32, c_void_p, py_object
from dataclasses import dataclass
from functools import cache, partial
from threading import get_native_id
from time import CLOCK_MONOTONIC, monotonic_ns, sleep
from typing import Any, Final

from heapd.errors import LockNotHeldError, LockTimeoutError, SegmentError

__all__ = ["MUTEX_SIZE", "Holder", "Lease", "Mutex", "fault", "held", "init", "make_ready"]

MUTEX_SIZE: Final = 64  # bytes set aside, one cache line; glibc uses 40 (x86-64) or 48 (aarch64)

# glibc's pthread_mutex_t, 4 bytes each; verified by _self_test.
_LOCK_OFFSET: Final = 0  # holder's thread id, | _DIED, | a waiters bit
_COUNT_OFFSET: Final = 4  # how often the holder holds it
_OWNER_OFFSET: Final = 8  # holder's thread id once it is consistent
_KIND_OFFSET: Final = 16  # process-shared, robust, recursive; never changes
_TID_MASK: Final = 0x3FFF_FFFF  # FUTEX_TID_MASK
_DIED: Final = 0x4000_0000  # FUTEX_OWNER_DIED
_WAITERS: Final = 0x8000_0000  # FUTEX_WAITERS
_INCONSISTENT: Final = 0x7FFF_FFFF  # the owner field between EOWNERDEAD and pthread_mutex_consistent
_LOST: Final = 0x7FFF_FFFE  # ... and for good, once it was given up unrepaired

_PROCESS_SHARED: Final = 1
_ROBUST: Final = 1
_RECURSIVE: Final = 1

_POLL_NS: Final = 50_000_000  # arbitrary: ten turns of the GIL, in each of which the mutex is free at about every other
_PAUSE_S: Final = 50e-6  # long enough for a thread that waits for the GIL to get it
_LONGEST_PAUSE_S: Final = 1e-3
_SLICE_NS: Final = 100_000_000  # arbitrary: how late Ctrl-C may get through to a waiting thread


class _Storage(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * MUTEX_SIZE)]


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def _bind(library: type[ctypes.CDLL], name: str, *, result: Any = c_int, arguments: Any = None) -> Any:
    try:
        function = library(None)[name]  # by index: a function object of our own, so that argtypes stay ours
    except AttributeError:
        raise ImportError(f"the C library has no {name}; heapd needs Linux with glibc 2.30 or later") from None
    function.restype = result
    if arguments is not None:
        function.argtypes = arguments
    return function


# How to call, measured for trylock + unlock on CPython 3.11 (3.13), 2 busy cores, 22 November 2026, ns:
#   CDLL, argtypes [c_void_p], int 550 (437); PyDLL, the same 405 (361); PyDLL, no argtypes, a prebuilt c_void_p 361
#   (320), a prebuilt byref 287 (266); functools.partial over the byref 281 (244), which is what a Mutex holds.
_TRYLOCK: Final = _bind(ctypes.PyDLL, "pthread_mutex_trylock")
_UNLOCK: Final = _bind(ctypes.PyDLL, "pthread_mutex_unlock")
_CLOCKLOCK: Final = _bind(ctypes.CDLL, "pthread_mutex_clocklock")
_CONSISTENT: Final = _bind(ctypes.PyDLL, "pthread_mutex_consistent")
# As an __exit__: takes (and ignores) its three arguments, and returns None so that no exception is swallowed.
_EXIT: Final = _bind(
    ctypes.PyDLL, "pthread_mutex_unlock", result=None, arguments=[c_void_p, py_object, py_object, py_object]
)
# As the deleter of a property: takes (and ignores) the object.
_DELETE: Final = _bind(ctypes.PyDLL, "pthread_mutex_unlock", result=None, arguments=[c_void_p, py_object])


def init(pointer: int) -> None:
    """Make a free mutex of the MUTEX_SIZE bytes at `pointer`; once, before anybody else can reach them.

    Raises: SegmentError if the system refuses, or its mutexes are not as this module knows them.
    """
    _self_test()
    _init(pointer)


def make_ready(pointer: int) -> bool:
    """See that a mutex which nobody has a use for any more is free and sound for whoever comes next; False if somebody
    holds it, or waits for it.

    Only `init` is called on it, which follows no pointer in it: everybody can write there, and taking and giving up a
    mutex whose links point anywhere writes there.
    """
    words = _Words(pointer)
    lock = words.lock.value
    if lock & _WAITERS or (lock & _TID_MASK and not lock & _DIED):
        return False
    if lock or words.owner.value or fault(pointer):
        init(pointer)
    return True


def fault(pointer: int) -> str:
    """What is wrong with the mutex, as a sentence; "" if it can be used. Reads it only."""
    kind = c_uint32.from_address(pointer + _KIND_OFFSET).value
    if kind != _self_test():
        return f"the mutex is of kind {kind:#x}, and was made as {_self_test():#x}"
    if _Words(pointer).owner.value == _LOST:
        return "the mutex is beyond recovery: its holder died and the next one gave it up unrepaired"
    return ""


def _init(pointer: int) -> None:
    attributes = _Storage()
    for name, *value in (
        ("pthread_mutexattr_init",),
        ("pthread_mutexattr_setpshared", _PROCESS_SHARED),
        ("pthread_mutexattr_setrobust", _ROBUST),
        ("pthread_mutexattr_settype", _RECURSIVE),
    ):
        _check(name, _bind(ctypes.CDLL, name)(byref(attributes), *value))
    _check("pthread_mutex_init", _bind(ctypes.CDLL, "pthread_mutex_init")(c_void_p(pointer), byref(attributes)))


def _check(what: str, status: int) -> None:
    if status:
        raise SegmentError(f"{what} failed: {os.strerror(status)}", errno=status)


@cache
def _self_test() -> int:
    """Check once that this C library keeps holder and count where `depth` and `holder_tid` look for them. Returns: the
    kind field of a mutex of ours."""
    storage = _Storage()
    _init(ctypes.addressof(storage))
    mutex = _Words(ctypes.addressof(storage))
    tid = get_native_id()
    statuses = [_TRYLOCK(byref(storage)), _TRYLOCK(byref(storage))]
    seen = (mutex.lock.value & _TID_MASK, mutex.count.value, mutex.owner.value)
    statuses += [_UNLOCK(byref(storage)), _UNLOCK(byref(storage))]
    if statuses != [0, 0, 0, 0] or seen != (tid, 2, tid) or mutex.lock.value:
        raise SegmentError("the C library's mutexes are not laid out as glibc's; heapd needs glibc")
    return c_uint32.from_buffer(storage, _KIND_OFFSET).value


class _Words:
    """The three fields of the mutex at `pointer`; reading one takes 25 to 40 ns."""

    __slots__ = ("count", "lock", "owner")

    def __init__(self, pointer: int) -> None:
        self.lock = c_uint32.from_address(pointer + _LOCK_OFFSET)
        self.count = c_uint32.from_address(pointer + _COUNT_OFFSET)
        self.owner = c_uint32.from_address(pointer + _OWNER_OFFSET)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a mutex: pid, tid, command (shortened), is_stopped (by SIGSTOP or a debugger).

    A thread that /proc does not show has pid None and an empty command.
    """

    tid: int
    pid: int | None
    command: str
    is_stopped: bool

    def __str__(self) -> str:
        if self.pid is None:
            return f"thread {self.tid}"
        stopped = ", stopped" if self.is_stopped else ""
        return f"process {self.pid} (thread {self.tid}, command {self.command!r}{stopped})"


class Mutex:
    """The mutex at `pointer` (in this process), which `init` made.

    `trylock()` and `unlock()` are the C calls themselves, for the hot path: they return 0 or an errno value. After
    a trylock that returned another value than 0, `settle` does the rest of an `acquire`.

    Args: on_wait: called as (waited_ns, recovered) by each acquisition that was contended or that recovered the
    mutex from a dead holder, with the mutex held: where its holder counts such things. None: nobody counts.
    """

    __slots__ = ("_held_type", "_lease_type", "_on_wait", "_reference", "_words", "trylock", "unlock")

    trylock: Callable[[], int]
    unlock: Callable[[], int]

    def __init__(self, pointer: int, on_wait: Callable[[int, bool], None] | None = None) -> None:
        _self_test()
        self._reference = byref(_Storage.from_address(pointer))
        self._words = _Words(pointer)
        self._on_wait = on_wait
        self._held_type: type[_Held] | None = None
        self._lease_type: type[Lease] | None = None
        self.trylock = partial(_TRYLOCK, self._reference)
        self.unlock = partial(_UNLOCK, self._reference)

    def acquire(self, timeout_s: float | None = None) -> bool:
        """Take the mutex, once more if the calling thread holds it; wait for it if need be.

        Args:    timeout_s (seconds; None: for ever; 0 or less: do not wait).
        Returns: True if the previous holder died holding it, which is told once.
        Raises:  LockTimeoutError, naming the holder; SegmentError if it is beyond recovery. Not held then.
                 After an exception of a signal handler it may be held: see `unwind`.
        """
        status = self.trylock()
        return False if status == 0 else self.settle(status, timeout_s)

    def settle(self, status: int, timeout_s: float | None = None) -> bool:
        """Go on with an acquisition whose `trylock` returned `status`, not 0. As `acquire`; not held if it raises."""
        waited_ns = 0
        try:
            if status == errno.EBUSY:
                started_ns = monotonic_ns()
                status = self._wait(started_ns, timeout_s)
                waited_ns = monotonic_ns() - started_ns
            recovered = status == errno.EOWNERDEAD
            if recovered:
                _CONSISTENT(self._reference)
            elif status:
                raise self._error(status)
            if self._on_wait is not None:
                self._on_wait(waited_ns, recovered)
        except BaseException:
            self.unwind(0)  # a trylock by its holder succeeds, so it was not held before
            raise
        return recovered

    def release(self) -> None:
        """Give the mutex up once; the last time frees it.

        Raises: LockNotHeldError if the calling thread does not hold it.
        """
        if self._words.owner.value == _INCONSISTENT and self.depth():
            _CONSISTENT(self._reference)  # the acquisition was interrupted; unlocked so, it would be lost for good
        if self.unlock():
            holder = self.holder()
            raise LockNotHeldError(
                f"the calling thread does not hold the lock; {holder or 'nobody'} does",
                **_naming(holder),
            )

    def lease(self) -> Lease:
        """An object that can give the mutex up where nothing may be called."""
        kind = self._lease_type
        if kind is None:
            unlock = property(None, None, partial(_DELETE, self._reference))
            kind = self._lease_type = type("_Lease", (Lease,), {"__slots__": (), "held": unlock})
        return kind()

    def depth(self) -> int:
        """How often the calling thread holds the mutex; 0 if it does not."""
        return self._words.count.value if self.owner_tid() == get_native_id() else 0

    def owner_tid(self) -> int:
        """Id of the thread that holds the mutex, 0 if none does or it has died."""
        word = self._words.lock.value
        return 0 if word & _DIED else word & _TID_MASK

    def holder(self) -> Holder | None:
        """Who holds the mutex, None if it is free; may be out of date when it returns."""
        tid = self.owner_tid()
        return _holder_of(tid) if tid else None

    def mark(self) -> int:
        """How the mutex stands, for `unwind`; costs no system call, unlike `depth`."""
        return self.owner_tid() << 32 | self._words.count.value

    def unwind(self, mark: int) -> None:
        """Release the mutex until the calling thread holds it as often as when it took `mark`; 0: not at all.

        Harmless when there is nothing to release, so it may be called twice.
        """
        wanted = mark & 0xFFFF_FFFF if mark >> 32 == get_native_id() else 0
        while self.depth() > wanted:
            self.release()

    def _wait(self, now_ns: int, timeout_s: float | None) -> int:
        """The status of an acquisition that waits from `now_ns` on; LockTimeoutError past the deadline."""
        deadline_ns = None if timeout_s is None else now_ns + int(min(timeout_s, 1e9) * 1e9)
        status = self._poll(now_ns, deadline_ns)
        if status != errno.EBUSY:
            return status
        now_ns = monotonic_ns()
        while deadline_ns is None or now_ns < deadline_ns:
            until_ns = now_ns + _SLICE_NS if deadline_ns is None else min(now_ns + _SLICE_NS, deadline_ns)
            until = _Timespec(*divmod(until_ns, 1_000_000_000))
            status = int(_CLOCKLOCK(self._reference, CLOCK_MONOTONIC, byref(until)))
            if status != errno.ETIMEDOUT:
                return status
            now_ns = monotonic_ns()
        raise self._timeout_error(timeout_s or 0.0)

    def _poll(self, now_ns: int, deadline_ns: int | None) -> int:
        """Try again now and then while another thread of this process holds the mutex; the last status.

        That thread needs the GIL to give it up, and has it for some ms then. Who waits in the kernel meanwhile is woken
        at the first unlock, has the mutex before the GIL, and stops the other one at its next lock: a convoy, in which
        each of the two gets through a few calls between two changes of threads, at a third of the pace.
        """
        status, pause_s, end_ns = errno.EBUSY, _PAUSE_S, now_ns + _POLL_NS
        if deadline_ns is not None:
            end_ns = min(end_ns, deadline_ns)
        while status == errno.EBUSY and now_ns < end_ns and os.path.exists(f"/proc/self/task/{self.owner_tid()}"):
            sleep(min(pause_s, (end_ns - now_ns) / 1e9))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            status = self.trylock()
            now_ns = monotonic_ns()
        return status

    def _error(self, status: int) -> SegmentError:
        if status != errno.ENOTRECOVERABLE:
            return SegmentError(f"the lock cannot be taken: {os.strerror(status)}", errno=status)
        if self.owner_tid() == get_native_id():
            # glibc's trylock (2.36) reports this and leaves the mutex locked, so that the next one would succeed.
            self._words.lock.value = 0
        return SegmentError(
            "the lock is beyond recovery: its holder died and the next one gave it up unrepaired; "
            "destroy the heap and make it anew",
            errno=status,
        )

    def _timeout_error(self, timeout_s: float) -> LockTimeoutError:
        holder = self.holder()
        return LockTimeoutError(
            f"the lock was not free within {max(timeout_s, 0.0):g} s; it is held by {holder or 'nobody any more'}",
            **_naming(holder),
        )


class Lease:
    """What `Mutex.lease` returns: `del lease.held` gives the mutex up once.

    To the interpreter that is no call, after which it would look for signals: what a handler raises comes before it, or
    after the next call.
    """

    __slots__ = ()
    held: object  # the subclass has it


class _Held:
    """What `held` returns; `recovered` is True inside the block if the previous holder died holding the mutex.

    `__exit__` has to be C throughout: a Python function checks for signals as it begins, before it could release
    anything. So each mutex has a subclass whose `__exit__` is pthread_mutex_unlock of that mutex.
    """

    __slots__ = ("_mutex", "_timeout_s", "recovered")

    def __init__(self, mutex: Mutex, timeout_s: float | None) -> None:
        self._mutex = mutex
        self._timeout_s = timeout_s
        self.recovered = False

    def __enter__(self) -> _Held:
        mark = self._mutex.mark()
        try:
            self.recovered = self._mutex.acquire(self._timeout_s)
        except BaseException:
            self._mutex.unwind(mark)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        raise NotImplementedError  # the subclass has it


def held(mutex: Mutex, timeout_s: float | None = None) -> _Held:
    """`with held(mutex):` holds it in the block and not after, also when a signal handler raises at any point.

    Raises: as `Mutex.acquire`, at entry.
    """
    kind = mutex._held_type
    if kind is None:
        unlock = staticmethod(partial(_EXIT, mutex._reference))
        kind = mutex._held_type = type("_Held", (_Held,), {"__slots__": (), "__exit__": unlock})
    return kind(mutex, timeout_s)


def _naming(holder: Holder | None) -> dict[str, int | None]:
    """The details of an error about who holds the mutex."""
    return {"holder_pid": holder.pid if holder else None, "holder_tid": holder.tid if holder else None}


def _holder_of(tid: int) -> Holder:
    try:
        with open(f"/proc/{tid}/status", encoding="utf-8", errors="replace") as file:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        with open(f"/proc/{tid}/cmdline", "rb") as file:
            command = file.read(200).replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return Holder(tid, None, "", False)
    return Holder(tid, int(fields["Tgid"]), command[:80] or fields["Name"], fields["State"][0] in "Tt")
