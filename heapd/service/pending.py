"""Answers that are not ready at once, and the memory of those that were given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, Final

from heapd.errors import HeapdError, InternalError
from heapd.records import as_tuple
from heapd.service.backend import Job, Waiter
from heapd.wire import KEPT_REPLIES, encode_error, encode_reply

__all__ = ["Deferred", "ReplyMemory", "RunningJob", "answer_of_fault"]

log = logging.getLogger("heapd.service")

_KEPT_BYTES: Final = 256 * 1024  # a session; arbitrary: two full alloc_many answers


def answer_of_fault(request_id: int, what: str) -> bytes:
    """Log the exception being handled, a fault of the daemon's own, and answer that there was one."""
    log.exception("fault in %s", what)
    return encode_error(request_id, InternalError(f"{what} met a fault inside the daemon; its log has the details"))


Commit = Callable[[int, bytes], object]  # (request id, its answer), or (0, b""): what changed is to last


def _nothing(request_id: int, answer: bytes) -> None:
    pass


class RunningJob:
    """A job of the manager's with the answer that its end makes.

    Fields: request_id (None: nobody waits, e.g. the reaping of a dead session), what (for the log), reply_to (the
    loop's: where to answer), answer (the frame, once step() has returned True; None where nobody waits).
    """

    __slots__ = ("_commit", "_decided", "_is_kept", "_job", "_memory", "answer", "reply_to", "request_id", "what")

    def __init__(
        self,
        job: Job,
        what: str,
        request_id: int | None = None,
        memory: ReplyMemory | None = None,
        *,
        is_kept: bool = True,
        commit: Commit = _nothing,
    ) -> None:
        """`memory` is where the request is unfinished until the answer is there; with `is_kept` the answer stays.
        `commit` is called after each slice, once with the answer that stays."""
        self._job = job
        self._commit = commit
        self._decided: bytes | None = None
        self._memory = memory
        self._is_kept = is_kept
        self.what = what
        self.request_id = request_id
        self.reply_to: list[bytes] = []
        self.answer: bytes | None = None

    def step(self) -> bool:
        """Run one slice. Returns: True if that was the last."""
        request_id = self.request_id or 0
        try:
            decided = next(self._job)
        except StopIteration as end:
            answer = _encode(request_id, end.value, self.what)
        except HeapdError as error:
            if self.request_id is None:
                log.error("%s: %s", self.what, error)
            answer = encode_error(request_id, error)
        except Exception:
            answer = answer_of_fault(request_id, self.what)
        else:
            if decided is None or self._decided is not None or not self._is_kept:
                self._commit(0, b"")
            else:
                self._decide(request_id, _encode(request_id, decided.answer, self.what))
            return False
        self._end(self._decided or answer)
        return True

    def _decide(self, request_id: int, answer: bytes) -> None:
        """The answer is known before the job is done; should this process die now, the next one gives it."""
        self._decided = answer
        if self._memory is not None:
            self._memory.keep(request_id, answer)
        self._commit(request_id, answer)

    def _end(self, answer: bytes) -> None:
        is_news = self._is_kept and self._decided is None
        if self.request_id is None:
            self._commit(0, b"")
            return
        self.answer = answer
        if self._memory is not None:
            self._memory.settle(self.request_id, answer if is_news else None)
        self._commit(*(self.request_id, answer) if is_news else (0, b""))


class Deferred:
    """A waiter of the manager's with the request it will answer.

    Fields: waiter, request_id, what, reply_to, error (why it waits no longer, where the waiter itself does not say).
    """

    __slots__ = ("_memory", "error", "reply_to", "request_id", "waiter", "what")

    def __init__(self, waiter: Waiter, what: str, request_id: int, memory: ReplyMemory) -> None:
        """`memory` is where the request is unfinished until `answer` was called."""
        self.waiter = waiter
        self._memory = memory
        self.request_id = request_id
        self.what = what
        self.reply_to: list[bytes] = []
        self.error: HeapdError | None = None

    def answer(self) -> bytes:
        """The frame for a waiter that is ready."""
        self._memory.settle(self.request_id, None)
        error = self.error or self.waiter.error
        if error is not None:
            return encode_error(self.request_id, error)
        result = self.waiter.result
        return _encode(self.request_id, as_tuple(result) if is_dataclass(result) else result, self.what)


def _encode(request_id: int, result: Any, what: str) -> bytes:
    try:
        return encode_reply(request_id, result)
    except Exception:
        return answer_of_fault(request_id, what)


class ReplyMemory:
    """The last answers of one session, so that a request that comes twice is executed once.

    Bounded in count and in bytes; the latest is always kept. Fields: unfinished (by request id, what has no answer
    yet: a repeat of such a request joins it).
    """

    __slots__ = ("_bytes", "_kept", "unfinished")

    def __init__(self, kept: dict[int, bytes] | None = None) -> None:
        """`kept` is where answers are kept, oldest first: with the manager, which has them after a restart, too."""
        self.unfinished: dict[int, RunningJob | Deferred] = {}
        self._kept = {} if kept is None else kept
        self._bytes = sum(map(len, self._kept.values()))

    def __len__(self) -> int:
        """Answers kept."""
        return len(self._kept)

    def find(self, request_id: int) -> bytes | RunningJob | Deferred | None:
        """What request `request_id` was answered, what is still at it, or None if it is new."""
        return self._kept.get(request_id) or self.unfinished.get(request_id)

    def keep(self, request_id: int, answer: bytes) -> None:
        """Remember the answer to a request that has none yet."""
        kept = self._kept
        kept[request_id] = answer
        self._bytes += len(answer)
        while len(kept) > KEPT_REPLIES or (self._bytes > _KEPT_BYTES and len(kept) > 1):
            self._bytes -= len(kept.pop(next(iter(kept))))

    def settle(self, request_id: int, answer: bytes | None) -> None:
        """If the request is unfinished, it no longer is; `answer` is remembered unless it is None."""
        if self.unfinished.pop(request_id, None) is not None and answer is not None:
            self.keep(request_id, answer)
