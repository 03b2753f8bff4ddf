"""Every request, one dataclass each, with its number and what it answers.

A request crosses the wire as [PROTOCOL_VERSION, op, request id, token, field, field, ...] and its answer as
[request id, 0, result] or [request id, error code, [message, details]]; PROTOCOL.md has the whole story. The fields'
types carry their limits (`Annotated`): the codec checks exact type and range from here, so no handler needs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, NamedTuple

__all__ = [
    "CONTROL_OPS",
    "OPS",
    "KEPT_REPLIES",
    "PROTOCOL_VERSION",
    "Range",
    "Request",
    "Text",
    "Items",
]

PROTOCOL_VERSION: Final = 1
MAX_REQUEST_BYTES: Final = 64 * 1024  # one request frame; a larger one cuts the sender off (libzmq MAXMSGSIZE)
MAX_BATCH: Final = 4096  # blocks in one alloc_many, free_many, give_back
MAX_NAME_BYTES: Final = 255  # UTF-8 bytes of a heap's or block's name
TOKEN_BYTES: Final = 16
KEPT_REPLIES: Final = 64  # of a session, for repeats; arbitrary: more than the threads of a process that wait at once


class Range(NamedTuple):
    """An int between the two bounds, both included; a bool is refused."""

    low: int
    high: int


class Text(NamedTuple):
    """A str of at most `max_bytes` UTF-8 bytes, at least one, without control characters."""

    max_bytes: int


class Items(NamedTuple):
    """A list of at most `max_count` items that each satisfy `item`."""

    item: Range
    max_count: int


_U63 = Range(0, 2**63 - 1)
HeapId = Annotated[int, Range(1, 2**63 - 1)]
Address = Annotated[int, _U63]
Generation = Annotated[int, _U63]
# Sizes are let through up to 2**64 - 1 so that the heap can say what is too large about them.
Size = Annotated[int, Range(0, 2**64 - 1)]
Name = Annotated[str, Text(MAX_NAME_BYTES)]
OptionalName = Annotated[str | None, Text(MAX_NAME_BYTES)]
Flag = bool


@dataclass(slots=True)
class Request:
    """Base of all requests. `op` is the number on the wire, `name` the op's name in docs, logs and metrics.

    Nobody changes one, but none is frozen: that would make each take three times as long to build.
    """

    op: ClassVar[int] = 0
    name: ClassVar[str] = ""
    is_idempotent: ClassVar[bool] = False  # True: done again when repeated; False: a repeat is answered from memory


# -- control socket: who are you; needs no session --------------------------------------------------------------------
@dataclass(slots=True)
class Hello(Request):
    """Open a session for the calling process. Answer: a map, see PROTOCOL.md (session, token, instance, ...)."""

    op: ClassVar[int] = 1
    name: ClassVar[str] = "hello"
    layout_version: Annotated[int, _U63]


@dataclass(slots=True)
class Status(Request):
    """What the daemon is doing. Answer: a map of plain values (name, endpoint, pid, incarnation, uptime_s, ...)."""

    op: ClassVar[int] = 2
    name: ClassVar[str] = "status"
    is_idempotent: ClassVar[bool] = True


@dataclass(slots=True)
class Stop(Request):
    """Stop cleanly: answer, end, unlink the arena. Answer: None."""

    op: ClassVar[int] = 3
    name: ClassVar[str] = "stop"


# -- work socket: sessions --------------------------------------------------------------------------------------------
@dataclass(slots=True)
class SessionClose(Request):
    """End the calling session; its anonymous heaps go, what it allocated elsewhere follows the heaps' policy.
    Answer: None."""

    op: ClassVar[int] = 10
    name: ClassVar[str] = "session.close"


@dataclass(slots=True)
class SessionList(Request):
    """Answer: list of SessionInfo tuples, those of one process if `pid` is not 0."""

    op: ClassVar[int] = 11
    name: ClassVar[str] = "session.list"
    is_idempotent: ClassVar[bool] = True
    pid: Annotated[int, _U63] = 0


@dataclass(slots=True)
class ArenaStatisticsGet(Request):
    """Answer: ArenaStatistics tuple."""

    op: ClassVar[int] = 12
    name: ClassVar[str] = "arena.statistics"
    is_idempotent: ClassVar[bool] = True


@dataclass(slots=True)
class ArenaReclaim(Request):
    """Memory is short: decommit what all heaps have free, and ask every front end to give back what it caches, at its
    next operation. With `heap`, which must be open, of that heap alone. Answer: how many other sessions are asked."""

    op: ClassVar[int] = 13
    name: ClassVar[str] = "arena.reclaim"
    heap: Annotated[int, _U63] = 0


# -- heaps ------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class HeapCreate(Request):
    """Make a heap and open it. Answer: HeapInfo tuple.

    heap_name (None: anonymous, dies with its session), initial (bytes committed at once), maximum (bytes, 0:
    growable), flags (layout.F_* bits), max_block (largest request, 0: none of its own), session_quota (bytes that one
    session may have of it, 0: none of its own)."""

    op: ClassVar[int] = 20
    name: ClassVar[str] = "heap.create"
    heap_name: OptionalName
    initial: Size
    maximum: Size
    flags: Annotated[int, Range(0, 2**16 - 1)]
    max_block: Size = 0
    session_quota: Size = 0


@dataclass(slots=True)
class HeapOpen(Request):
    """Open a heap by name. Answer: HeapInfo tuple."""

    op: ClassVar[int] = 21
    name: ClassVar[str] = "heap.open"
    heap_name: Name


@dataclass(slots=True)
class HeapOpenId(Request):
    """Open a heap by id (from a pickled heap), or by the control index that a page word names (id < 2**16).
    Answer: HeapInfo tuple."""

    op: ClassVar[int] = 22
    name: ClassVar[str] = "heap.open_id"
    heap: Annotated[int, _U63]


@dataclass(slots=True)
class HeapDefault(Request):
    """The session's default heap, made at the first call. Answer: HeapInfo tuple. The two figures, in bytes, count
    only then; 0: the daemon's default (1 MiB reserved, 4 KiB committed)."""

    op: ClassVar[int] = 23
    name: ClassVar[str] = "heap.default"
    reserve: Size = 0
    commit: Size = 0


@dataclass(slots=True)
class HeapClose(Request):
    """This session no longer uses the heap; a named one that nobody has open goes. Answer: None."""

    op: ClassVar[int] = 24
    name: ClassVar[str] = "heap.close"
    heap: HeapId


@dataclass(slots=True)
class HeapDestroy(Request):
    """Give back every page of the heap, whatever is allocated in it. Answer: None."""

    op: ClassVar[int] = 25
    name: ClassVar[str] = "heap.destroy"
    heap: HeapId


@dataclass(slots=True)
class HeapList(Request):
    """Answer: list of at most `limit` HeapInfo tuples with heap_id > `after`, by id; only those a process `pid`
    has open if it is not 0, its default heap first."""

    op: ClassVar[int] = 26
    name: ClassVar[str] = "heap.list"
    is_idempotent: ClassVar[bool] = True
    pid: Annotated[int, _U63] = 0
    after: Annotated[int, _U63] = 0
    limit: Annotated[int, Range(1, 1000)] = 500


# -- blocks -----------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class HeapAlloc(Request):
    """Answer: [slot, address, generation, extent, fresh] (Grant)."""

    op: ClassVar[int] = 30
    name: ClassVar[str] = "heap.alloc"
    heap: HeapId
    size: Size


@dataclass(slots=True)
class HeapAllocMany(Request):
    """All of them or none. Answer: list of Grant tuples in the order of `sizes`."""

    op: ClassVar[int] = 31
    name: ClassVar[str] = "heap.alloc_many"
    heap: HeapId
    sizes: Annotated[list[int], Items(Range(0, 2**64 - 1), MAX_BATCH)]


@dataclass(slots=True)
class HeapResize(Request):
    """Resize a block where it is. Answer: Grant tuple (same slot, address and generation, new extent).
    Error CannotResizeInPlace: the client moves it (alloc, copy, free) unless the user asked for in place only; without
    that flag a shrink to less than half of a slab block is refused so, too. In a heap that frees orphans the block is
    the caller's from then on, so that its word is the caller's to write."""

    op: ClassVar[int] = 32
    name: ClassVar[str] = "heap.resize"
    heap: HeapId
    address: Address
    generation: Generation
    size: Size
    in_place_only: Flag = False


@dataclass(slots=True)
class HeapFree(Request):
    """Answer: None."""

    op: ClassVar[int] = 33
    name: ClassVar[str] = "heap.free"
    heap: HeapId
    address: Address
    generation: Generation


@dataclass(slots=True)
class HeapFreeMany(Request):
    """All are checked before any is freed. `blocks` is flat: address, generation, address, generation, ...
    Answer: None."""

    op: ClassVar[int] = 34
    name: ClassVar[str] = "heap.free_many"
    heap: HeapId
    blocks: Annotated[list[int], Items(_U63, 2 * MAX_BATCH)]


# -- front ends: blocks in batches ------------------------------------------------------------------------------------
@dataclass(slots=True)
class HeapLease(Request):
    """Lend the session up to `count` free blocks for `size` bytes each, to allocate by itself: their state words say
    CACHED and name the session. And one block for each size of `others`, if there is memory: what else the front
    end has run out of. Answer: list of Grant tuples, at least one, in that order; it ends where memory is short.
    """

    op: ClassVar[int] = 35
    name: ClassVar[str] = "heap.lease"
    heap: HeapId
    size: Size
    count: Annotated[int, Range(1, MAX_BATCH)]
    others: Annotated[list[int], Items(Range(0, 2**64 - 1), MAX_BATCH)] = field(default_factory=list)


@dataclass(slots=True)
class HeapGiveBack(Request):
    """Take back blocks whose state words say that this session caches them; others in the list are passed over.
    `blocks` is flat: address, generation, ... With `sweep` every such block of the heap, listed or not. It is a number
    that grows from one sweep of the session to the next: an older one does nothing any more, also one that is under
    way. Answer: how many were taken back."""

    op: ClassVar[int] = 36
    name: ClassVar[str] = "heap.give_back"
    heap: HeapId
    blocks: Annotated[list[int], Items(_U63, 2 * MAX_BATCH)]
    sweep: Annotated[int, Range(0, 2**63 - 1)] = 0


# -- looking at a heap ------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class HeapWalk(Request):
    """Answer: [[Entry tuple, ...], next cursor]; cursor 0 starts, next cursor 0 is the end."""

    op: ClassVar[int] = 40
    name: ClassVar[str] = "heap.walk"
    is_idempotent: ClassVar[bool] = True
    heap: HeapId
    cursor: Annotated[int, _U63] = 0
    limit: Annotated[int, Range(1, 4096)] = 1024


@dataclass(slots=True)
class HeapValidate(Request):
    """Answer: list of at most 1,000 Violation tuples. `address` 0: the whole heap, else the block that begins there."""

    op: ClassVar[int] = 41
    name: ClassVar[str] = "heap.validate"
    is_idempotent: ClassVar[bool] = True
    heap: HeapId
    address: Address = 0


@dataclass(slots=True)
class HeapCompact(Request):
    """Coalesce, decommit free pages; answer: bytes of the largest committed free extent before decommit."""

    op: ClassVar[int] = 42
    name: ClassVar[str] = "heap.compact"
    heap: HeapId


@dataclass(slots=True)
class HeapStatisticsGet(Request):
    """Answer: HeapStatistics tuple."""

    op: ClassVar[int] = 43
    name: ClassVar[str] = "heap.statistics"
    is_idempotent: ClassVar[bool] = True
    heap: HeapId


# -- names ------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class NamePublish(Request):
    """Let `block_name` stand for a block of the heap, in place of what it stood for before. Answer: None."""

    op: ClassVar[int] = 50
    name: ClassVar[str] = "name.publish"
    heap: HeapId
    block_name: Name
    address: Address
    generation: Generation


@dataclass(slots=True)
class NameLookup(Request):
    """Answer: Publication tuple, at once or when it is published within `timeout_ms` (0: at once or never)."""

    op: ClassVar[int] = 51
    name: ClassVar[str] = "name.lookup"
    is_idempotent: ClassVar[bool] = True
    heap: HeapId
    block_name: Name
    timeout_ms: Annotated[int, Range(0, 2**31)] = 0


@dataclass(slots=True)
class NameUnpublish(Request):
    """Answer: None."""

    op: ClassVar[int] = 52
    name: ClassVar[str] = "name.unpublish"
    heap: HeapId
    block_name: Name


@dataclass(slots=True)
class NameList(Request):
    """Answer: list of at most `limit` Publication tuples whose name sorts after `after`."""

    op: ClassVar[int] = 53
    name: ClassVar[str] = "name.list"
    is_idempotent: ClassVar[bool] = True
    heap: HeapId
    after: OptionalName = None
    limit: Annotated[int, Range(1, 1000)] = 500


CONTROL_OPS: Final[dict[int, type[Request]]] = {kind.op: kind for kind in (Hello, Status, Stop)}
OPS: Final[dict[int, type[Request]]] = {
    kind.op: kind
    for kind in (
        SessionClose, SessionList, ArenaStatisticsGet, ArenaReclaim, HeapCreate, HeapOpen, HeapOpenId, HeapDefault,
        HeapClose, HeapDestroy, HeapList, HeapAlloc, HeapAllocMany, HeapResize, HeapFree, HeapFreeMany, HeapLease,
        HeapGiveBack, HeapWalk, HeapValidate, HeapCompact, HeapStatisticsGet, NamePublish, NameLookup, NameUnpublish,
        NameList,
    )
}  # fmt: skip
