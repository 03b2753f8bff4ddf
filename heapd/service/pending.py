"""Answers that are not ready at once, and the memory of those that were given."""

from __future__ import annotations

import logging
from dataclasses import is_dataclass
from typing import Any, Final

from heapd.errors import HeapdError, InternalError
from heapd.records import as_tuple
from heapd.service.backend import Job, Waiter
from heapd.wire import encode_error, encode_reply

__all__ = ["Deferred", "ReplyMemory", "RunningJob", "answer_of_fault"]

log = logging.getLogger("heapd.service")

_KEPT_REPLIES: Final = 64  # a session; arbitrary: more than the threads of a process that wait at once
_KEPT_BYTES: Final = 256 * 1024  # a session; arbitrary: two full alloc_many answers


def answer_of_fault(request_id: int, what: str) -> bytes:
    """Log the exception being handled, a fault of the daemon's own, and answer that there was one."""
    log.exception("fault in %s", what)
    return encode_error(request_id, InternalError(f"{what} met a fault inside the daemon; its log has the details"))


class RunningJob:
    """A job of the manager's with the answer that its end makes.

    Fields: request_id (None: nobody waits, e.g. the reaping of a dead session), what (for the log), reply_to (the
    loop's: where to answer), answer (the frame, once step() has returned True; None where nobody waits).
    """

    __slots__ = ("_job", "_memory", "answer", "reply_to", "request_id", "what")

    def __init__(self, job: Job, what: str, request_id: int | None = None, memory: ReplyMemory | None = None) -> None:
        """`memory` is told the answer if it knows of the request, and counts the job as unfinished till then."""
        self._job = job
        self._memory = memory
        if memory is not None:
            memory.unfinished += 1
        self.what = what
        self.request_id = request_id
        self.reply_to: list[bytes] = []
        self.answer: bytes | None = None

    def step(self) -> bool:
        """Run one slice. Returns: True if that was the last."""
        request_id = self.request_id or 0
        try:
            next(self._job)
            return False
        except StopIteration as end:
            answer = _encode(request_id, end.value, self.what)
        except HeapdError as error:
            if self.request_id is None:
                log.error("%s: %s", self.what, error)
            answer = encode_error(request_id, error)
        except Exception:
            answer = answer_of_fault(request_id, self.what)
        if self.request_id is not None:
            self.answer = answer
            if self._memory is not None:
                self._memory.settle(self.request_id, answer)
        return True


class Deferred:
    """A waiter of the manager's with the request it will answer.

    Fields: waiter, token (of the session that waits), request_id, what, reply_to, error (why it waits no longer,
    where the waiter itself does not say).
    """

    __slots__ = ("error", "reply_to", "request_id", "token", "waiter", "what")

    def __init__(self, waiter: Waiter, token: bytes, request_id: int, what: str) -> None:
        self.waiter = waiter
        self.token = token
        self.request_id = request_id
        self.what = what
        self.reply_to: list[bytes] = []
        self.error: HeapdError | None = None

    def answer(self) -> bytes:
        """The frame for a waiter that is ready."""
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

    Bounded in count and in bytes; the latest is always kept. Fields: unfinished (jobs of the session at work).
    """

    __slots__ = ("_bytes", "_kept", "unfinished")

    def __init__(self) -> None:
        self.unfinished = 0
        self._kept: dict[int, bytes | RunningJob] = {}  # oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, request_id: int) -> bytes | RunningJob | None:
        """What request `request_id` was answered, the job that is still at it, or None if it is new."""
        return self._kept.get(request_id)

    def keep(self, request_id: int, answer: bytes | RunningJob) -> None:
        """Remember `answer`; it takes the place of the job that made it."""
        kept = self._kept
        before = kept.get(request_id)
        kept[request_id] = answer
        self._bytes += len(answer) if type(answer) is bytes else 0
        self._bytes -= len(before) if type(before) is bytes else 0
        while len(kept) > _KEPT_REPLIES or self._bytes > _KEPT_BYTES:
            oldest = next(iter(kept))
            answer = kept[oldest]
            if type(answer) is not bytes or len(kept) == 1:
                self._drop_oldest_answer()
                return
            del kept[oldest]
            self._bytes -= len(answer)

    def _drop_oldest_answer(self) -> None:
        """Forget the oldest answer but the latest, past jobs at work, which are never forgotten."""
        latest = next(reversed(self._kept))
        for request_id, answer in self._kept.items():
            if type(answer) is bytes and request_id != latest:
                del self._kept[request_id]
                self._bytes -= len(answer)
                return

    def settle(self, request_id: int, answer: bytes) -> None:
        """A job of the session has finished: its answer takes its place, if it is remembered at all."""
        self.unfinished -= 1
        if request_id in self._kept:
            self.keep(request_id, answer)
