"""What the machine remembers of sessions, heaps and blocks: the plain model beside the service, and its small tools."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from heapd.errors import HeapdError, error_from_wire
from heapd.layout import F_FREE_ORPHANS, F_PERSISTENT
from heapd.records import Grant, HeapInfo, Publication
from heapd.service import Deferred, Peer, RunningJob
from heapd.wire import decode_reply

UID = 1000


@dataclass
class Caller:
    """Who sends a control message."""

    peer: Peer
    pid: int
    uid: int = UID

    def is_member(self, gid: int) -> bool:
        return False

    def admit(self) -> Peer:
        return self.peer


@dataclass(eq=False)
class ModelSession:
    """A client's side of a session; `heaps` are those it has open, `known` those it ever had."""

    number: int
    token: bytes
    peer: Peer
    heaps: set[int] = field(default_factory=set)
    known: set[int] = field(default_factory=set)
    last_id: int = 0


@dataclass
class ModelBlock:
    """A block that is out: BUSY with a size, or CACHED with None; `owner` is the session in its word."""

    grant: Grant
    owner: int
    size: int | None
    seed: int = 0

    @property
    def generation(self) -> int:
        return self.grant.generation


@dataclass
class ModelHeap:
    """`blocks` by address; `names` to (address, generation)."""

    info: HeapInfo
    creator: int
    openers: set[int]
    blocks: dict[int, ModelBlock] = field(default_factory=dict)
    names: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def frees_orphans(self) -> bool:
        return bool(self.info.flags & F_FREE_ORPHANS)

    @property
    def is_persistent(self) -> bool:
        return bool(self.info.flags & F_PERSISTENT)

    def published(self, name: str) -> ModelBlock | None:
        address, generation = self.names.get(name, (0, 0))
        block = self.blocks.get(address)
        return block if block and block.size is not None and block.generation == generation else None


@dataclass
class Wait:
    """A lookup that waits; `end` is what its answer must be, once that is known."""

    deferred: Deferred
    session: ModelSession
    heap_id: int
    name: str
    deadline_ns: int
    end: type[HeapdError] | Publication | None = None


@dataclass
class Job:
    """A large block that is being committed."""

    job: RunningJob
    session: ModelSession
    heap_id: int
    size: int


def result_of(answer: bytes) -> Any:
    """The result in a frame; raises the error in it."""
    reply = decode_reply(answer)
    if reply.code:
        raise error_from_wire(reply.code, *reply.payload)
    return reply.payload


def publication(name: str, block: ModelBlock) -> Publication:
    return Publication(name, block.grant.slot, block.grant.address, block.generation, block.size or 0)


@contextmanager
def failing_commits(nth: int, persistent: bool) -> Iterator[None]:
    """The `nth` posix_fallocate inside fails as on a full /dev/shm, or that one and all later ones."""
    real, calls = os.posix_fallocate, 0

    def fallocate(fd: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth or (persistent and calls > nth):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    with mock.patch.object(os, "posix_fallocate", fallocate):
        yield
