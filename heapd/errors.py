"""Every error of heapd, one tree, one stable integer code a leaf.

    HeapdError
    +-- HeapFullError (MemoryError)            no memory: arena, commit limit, heap maximum
    |   +-- QuotaError                         the session has as much as one may have
    +-- BlockTooLargeError (MemoryError)       larger than the heap may ever give
    +-- CannotResizeInPlaceError (MemoryError) in place only was asked and there is no room
    +-- InvalidArgumentError (ValueError)      a value out of range, of the wrong type, a name too long
    +-- NotABlockError (ValueError)            the address is no block's first byte
    +-- WrongHeapError (ValueError)            the block belongs to another heap
    +-- DoubleFreeError (ValueError)           the block is free already
    +-- StaleHandleError (LookupError)         the handle's block was freed and used again, or its arena is gone
    +-- NoSuchHeapError (LookupError)          no heap of that name or id
    +-- HeapDestroyedError (LookupError)       the heap was destroyed
    +-- NoSuchNameError (LookupError)          nothing is published under that name
    +-- HeapExistsError (ValueError)           a heap of that name exists
    +-- NotPermittedError (PermissionError)    e.g. destroying the default heap
    +-- LimitError (RuntimeError)              sessions, heaps, names, waiters, open files: there can be no more
    +-- WaitTimeoutError (TimeoutError)        a name was not published in time
    +-- LockTimeoutError (TimeoutError)        a heap's lock was not free in time; names the holder
    +-- LockNotHeldError (RuntimeError)        unlock by a thread that does not hold the lock
    +-- BlockInUseError (BufferError)          free or resize while a view is alive
    +-- ClosedError (ValueError)               the session, heap or block was closed or freed here
    +-- ExecuteError (PermissionError)         the system refuses executable shared memory
    +-- MissingExtraError (ImportError)        an optional package is not installed
    +-- DaemonError (ConnectionError)          base of what concerns reaching the daemon
    |   +-- DaemonNotFoundError                no daemon answers at the endpoint
    |   +-- DaemonLostError                    it answered before, and did not within the deadline
    |   +-- DaemonStoppedError                 it was stopped on purpose
    |   +-- SessionLostError                   the daemon does not know the session's token
    |   +-- VersionError                       the two sides speak different protocol or layout versions
    +-- DaemonRunningError (RuntimeError)      another daemon serves that name already
    +-- AccessError (PermissionError)          the kernel says the peer is of another user
    +-- SegmentError (OSError)                 a shared memory segment is missing, foreign or malformed
    +-- MessageError (ValueError)              a request that cannot be decoded
        +-- MessageTooLargeError               over the size limit of one message
        +-- UnknownOpError                     no such operation

An error is also of the built-in kind in brackets, so that users catch what they know. Each one pickles and crosses
the wire as (code, message, details); the codes never change meaning. An error raised by an operation means that the
operation changed nothing, unless its docstring says otherwise.
"""

from __future__ import annotations

from typing import ClassVar, Self

from heapd.units import format_size

__all__ = [
    "AccessError",
    "BlockInUseError",
    "BlockTooLargeError",
    "CannotResizeInPlaceError",
    "ClosedError",
    "DaemonError",
    "DaemonLostError",
    "DaemonNotFoundError",
    "DaemonRunningError",
    "DaemonStoppedError",
    "DoubleFreeError",
    "ExecuteError",
    "HeapDestroyedError",
    "HeapExistsError",
    "HeapFullError",
    "HeapdError",
    "InternalError",
    "InvalidArgumentError",
    "LimitError",
    "LockNotHeldError",
    "LockTimeoutError",
    "MessageError",
    "MessageTooLargeError",
    "MissingExtraError",
    "NoSuchHeapError",
    "NoSuchNameError",
    "NotABlockError",
    "NotPermittedError",
    "QuotaError",
    "SegmentError",
    "SessionLostError",
    "StaleHandleError",
    "UnknownOpError",
    "VersionError",
    "WaitTimeoutError",
    "WrongHeapError",
    "error_from_wire",
    "error_to_wire",
]


class HeapdError(Exception):
    """Base of all errors of heapd.

    `code` is the stable number of the leaf; `details` are plain values (str, int, None) that say what it is about.
    """

    code: ClassVar[int] = 1

    def __init__(self, message: str = "", **details: str | int | None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.details)


class InternalError(HeapdError, RuntimeError):
    """The daemon met a fault of its own; its log has the traceback."""

    code = 2


class HeapFullError(HeapdError, MemoryError):
    """No memory for the request; nothing has changed.

    `requested` and `used` are bytes; `limit` is the bound that was met, in bytes; `bound` says which one it was:
    "reserve" (address space of the arena), "commit" (the daemon's commit limit), "memory" (what the machine, its
    /dev/shm or its cgroup has left), "heap" (the heap's maximum), "quota" and "heap-quota" (see QuotaError). Where it
    is the daemon's own records that find no memory, `requested` is what they lack.
    """

    code = 10

    @classmethod
    def of(cls, bound: str, *, requested: int, used: int, limit: int, advice: str) -> Self:
        """The error with its figures in the text. Sizes are in bytes; `advice` tells the user what to do."""
        text = (
            f"{format_size(requested)} requested, {format_size(used)} of {format_size(limit)} used "
            f"({_BOUNDS.get(bound, bound)}); {advice}"
        )
        return cls(text, bound=bound, requested=requested, used=used, limit=limit, advice=advice)

    def for_request(self, requested: int, used: int | None = None) -> Self:
        """The same, told of the whole request instead of the step of it that failed.

        Args: requested (bytes the caller asked for), used (bytes in use now that its first steps were undone; None: as
        it was told).
        """
        return type(self).of(
            self.bound,
            requested=requested,
            used=self.used if used is None else used,
            limit=self.limit,
            advice=str(self.details.get("advice", "")),
        )

    @property
    def requested(self) -> int:
        return int(self.details.get("requested") or 0)

    @property
    def used(self) -> int:
        return int(self.details.get("used") or 0)

    @property
    def limit(self) -> int:
        return int(self.details.get("limit") or 0)

    @property
    def bound(self) -> str:
        return str(self.details.get("bound") or "")


_BOUNDS = {
    "reserve": "the arena's reserved address space",
    "commit": "the daemon's commit limit",
    "memory": "shared memory the machine has left",
    "heap": "the heap's maximum size",
    "quota": "what a session may have of this daemon",
    "heap-quota": "what a session may have of this heap",
}


class QuotaError(HeapFullError):
    """The session has as much as one session may have: of all heaps together (bound "quota"), or of this heap (bound
    "heap-quota"). There may be memory for others."""

    code = 13


class BlockTooLargeError(HeapdError, MemoryError):
    code = 11


class CannotResizeInPlaceError(HeapdError, MemoryError):
    code = 12


class InvalidArgumentError(HeapdError, ValueError):
    code = 20


class NotABlockError(HeapdError, ValueError):
    code = 21


class WrongHeapError(HeapdError, ValueError):
    code = 22


class DoubleFreeError(HeapdError, ValueError):
    code = 23


class StaleHandleError(HeapdError, LookupError):
    code = 24


class NoSuchHeapError(HeapdError, LookupError):
    code = 30


class HeapDestroyedError(HeapdError, LookupError):
    code = 31


class HeapExistsError(HeapdError, ValueError):
    code = 32


class NoSuchNameError(HeapdError, LookupError):
    code = 33


class NotPermittedError(HeapdError, PermissionError):
    code = 34


class LimitError(HeapdError, RuntimeError):
    code = 35


class WaitTimeoutError(HeapdError, TimeoutError):
    code = 40


class LockTimeoutError(HeapdError, TimeoutError):
    code = 41


class LockNotHeldError(HeapdError, RuntimeError):
    code = 42


class BlockInUseError(HeapdError, BufferError):
    code = 43


class ClosedError(HeapdError, ValueError):
    code = 44


class ExecuteError(HeapdError, PermissionError):
    code = 45


class MissingExtraError(HeapdError, ImportError):
    code = 46


class DaemonError(HeapdError, ConnectionError):
    code = 50


class DaemonNotFoundError(DaemonError):
    code = 51


class DaemonLostError(DaemonError):
    code = 52


class DaemonStoppedError(DaemonError):
    code = 53


class SessionLostError(DaemonError):
    code = 54


class VersionError(DaemonError):
    code = 55


class DaemonRunningError(HeapdError, RuntimeError):
    code = 56


class AccessError(HeapdError, PermissionError):
    code = 57


class SegmentError(HeapdError, OSError):
    code = 58


class MessageError(HeapdError, ValueError):
    code = 60


class MessageTooLargeError(MessageError):
    code = 61


class UnknownOpError(MessageError):
    code = 62


def _leaves(root: type[HeapdError]) -> dict[int, type[HeapdError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_leaves(child))
    return found


_BY_CODE = _leaves(HeapdError)


def _rebuild(kind: type[HeapdError], message: str, details: dict[str, str | int | None]) -> HeapdError:
    return kind(message, **details)


def error_to_wire(error: HeapdError) -> tuple[int, str, dict[str, str | int | None]]:
    """What crosses the socket for `error`: (code, message, details)."""
    return error.code, error.message, error.details


def error_from_wire(code: int, message: str, details: dict[str, str | int | None]) -> HeapdError:
    """The error that `code` stands for; a plain HeapdError for a code this version does not know."""
    return _BY_CODE.get(code, HeapdError)(message, **details)
