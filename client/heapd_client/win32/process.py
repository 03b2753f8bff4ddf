"""What a Win32 process is here: one session, and the heaps that it has made or opened, by handle.

A heap's handle is the address of its first region: a handle means the same heap in every process, which opens it by
using it. But where a heap of this process was, another process may make one: a handle that is left over must not become
that one's, so it stays invalid until this process makes a heap there, or its session opens one.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from operator import index
from typing import Final

from heapd.errors import InvalidArgumentError
from heapd.layout import F_FREE_CHECK, F_TAIL_CHECK, PAGE_FREE
from heapd.units import GRANULE_SIZE, PAGE_SIZE, parse_size

from ..block import Block
from ..heap import Heap
from ..session import Session, connect
from .checked_heap import CheckedHeap
from .constants import ERROR_INVALID_HANDLE
from .last_error import Failure
from .open_heap import OpenHeap
from .table import Table

__all__ = ["Process", "attach", "detach", "heap_of", "hot", "process"]

HEAP_VARIABLE: Final = "HEAPD_HEAP"

# Heaps whose HeapAlloc and HeapFree need nothing that heaps.py does not do in a line, by handle: (heap, its blocks,
# handle).
hot: Final[dict[int, tuple[Heap, dict[int, Block], int]]] = {}

# Handles of heaps that this process made, and that are gone: (instance of the arena, handle).
_gone: Final[set[tuple[bytes, int]]] = set()

_lock = threading.RLock()
_current: Process | None = None


class Process:
    """A session as a Win32 process.

    Fields: session, is_own (we opened it, so we close it), reserve and commit (bytes: of the process heap; 0: the
    daemon's default), table (of moveable objects).
    """

    def __init__(self, session: Session, is_own: bool, reserve: int, commit: int) -> None:
        self.session = session
        self.is_own = is_own
        self.reserve = reserve
        self.commit = commit
        self.table = Table()
        self._open: dict[int, OpenHeap] = {}  # by handle
        self._default: OpenHeap | None = None

    def default_heap(self) -> OpenHeap:
        """The process heap, made at the first call."""
        found = self._default
        if found is None or not found.heap.is_live:
            found = self._default = self.make(self.session.open_default_heap(self.reserve, self.commit))
        return found

    def make(self, heap: Heap) -> OpenHeap:
        """Adopt a heap that a Win32 function made: its large blocks go back to the system as they are freed."""
        heap.releases_large = True
        return self.adopt(heap)

    def adopt(self, heap: Heap) -> OpenHeap:
        """The one OpenHeap for a heap of the session."""
        handle = heap.info.base
        with _lock:
            found = self._open.get(handle)
            if found is None or found.heap is not heap:
                _gone.discard((self.session.instance, handle))
                found = self._open[handle] = CheckedHeap(heap) if _is_checked(heap) else OpenHeap(heap)
                hot.pop(handle, None)
                if not _is_checked(heap):
                    hot[handle] = heap, found.blocks, handle
            return found

    def find(self, handle: int) -> OpenHeap:
        """The heap of a handle. Raises: Failure(ERROR_INVALID_HANDLE)."""
        found = self.find_open(handle)
        if found is None:
            heap = self._open_at(handle)
            if heap is None:
                raise Failure(ERROR_INVALID_HANDLE, f"{handle:#x} is no heap")
            found = self.adopt(heap)
        return found

    def find_open(self, handle: int) -> OpenHeap | None:
        """The heap of a handle, if this process has it open."""
        found = self._open.get(handle)
        if found is not None and found.heap.is_live:
            return found
        self._forget(handle)
        return next((self.adopt(heap) for heap in self.session.open_heaps if heap.info.base == handle), None)

    def _open_at(self, handle: int) -> Heap | None:
        """Another process's heap whose first region begins at `handle`, opened."""
        info = self.session.arena.find_page(handle)
        if info is None or info.state == PAGE_FREE or handle % GRANULE_SIZE:
            return None
        if (self.session.instance, handle) in _gone:
            return None
        with suppress(LookupError):
            heap = self.session.open_heap_id(info.heap)  # its control index
            if heap.info.base == handle:
                return heap
        return None

    def open_heaps(self) -> list[OpenHeap]:
        """The process heap, then the others in the order in which they were made or opened here."""
        first = self.default_heap()
        others = [self.adopt(heap) for heap in self.session.open_heaps if heap is not first.heap]
        return [first, *others]

    def destroy(self, found: OpenHeap) -> None:
        """Raises: HeapdError."""
        found.heap.destroy()
        found.let_go()
        self._forget(found.handle)

    def _forget(self, handle: int) -> None:
        with _lock:
            hot.pop(handle, None)
            found = self._open.pop(handle, None)
            if found is not None and found.is_own:
                _gone.add((self.session.instance, handle))

    def forked(self) -> None:
        """In the child of a fork: it has a process heap of its own, without objects; the others are its parent's."""
        for found in self._open.values():
            found.is_own = False
        self._default = None
        self.table = Table()

    def end(self) -> None:
        """Give up the locks of this thread, and close the session if it is ours."""
        for handle, found in list(self._open.items()):
            found.let_go()
            if self.is_own:
                self._forget(handle)
        hot.clear()
        self._open.clear()
        if self.is_own:
            self.session.close()


def process() -> Process:
    """The process as it is attached; it attaches itself to the default daemon if it is not."""
    found = _current
    if found is None or found.session.is_closed:
        with _lock:
            found = _current
            if found is None or found.session.is_closed:
                attach()
                found = _current
                assert found is not None
    return found


def heap_of(handle: int) -> OpenHeap:
    """The heap of a handle. Raises: Failure(ERROR_INVALID_HANDLE)."""
    return process().find(handle)


def attach(endpoint: str | Session | None = None, *, heap: tuple[int, int] | None = None) -> None:
    """Choose the daemon for all Win32 functions of this process; what was attached before is detached.

    Args:   endpoint (as for `connect`; None: $HEAPD_ENDPOINT, or the user's default daemon, started on demand; or an
            open Session, which `detach` does not close), heap (reserve and commit of the process heap in bytes, as the
            linker's /HEAP; None: $HEAPD_HEAP as "reserve[,commit]", or 1 MiB and 4 KiB).
    Raises: InvalidArgumentError if the figures are none, commit exceeds reserve, or reserve the arena; TypeError; what
            `connect` raises. What was attached stays attached then.
    """
    global _current
    if not isinstance(endpoint, (str, Session, type(None))):
        raise TypeError(f"an endpoint is a str, a Session or None, not {type(endpoint).__name__}")
    reserve, commit = _heap_figures(heap)
    is_own = not isinstance(endpoint, Session)
    session = endpoint if isinstance(endpoint, Session) else connect(endpoint)
    if reserve > session.arena.size:
        size = session.arena.size
        if is_own:
            session.close()
        raise InvalidArgumentError(f"the process heap cannot reserve {reserve} bytes of an arena of {size}")
    with _lock:
        detach()
        _current = Process(session, is_own, reserve, commit)


def detach() -> None:
    """End the session: the heaps made by this process go. The next Win32 function attaches again."""
    global _current
    with _lock:
        gone, _current = _current, None
        if gone is not None:
            gone.end()


def _is_checked(heap: Heap) -> bool:
    return bool(heap.info.flags & (F_TAIL_CHECK | F_FREE_CHECK))


def _heap_figures(heap: tuple[int, int] | None) -> tuple[int, int]:
    """Reserve and commit of the process heap, rounded up to 4 bytes as a linker does; 0: the default."""
    text = os.environ.get(HEAP_VARIABLE, "")
    try:
        if heap is not None:
            reserve, commit = map(index, heap)
        else:
            reserve, commit = ([parse_size(part) for part in text.split(",")] + [0])[:2] if text.strip() else (0, 0)
        if text.count(",") > 1 or min(reserve, commit) < 0:
            raise ValueError
    except (TypeError, ValueError):
        source = f"heap={heap!r}" if heap is not None else f"${HEAP_VARIABLE}={text!r}"
        raise InvalidArgumentError(
            f"{source}: a reserve and a commit are needed, in bytes: 'reserve[,commit]'"
        ) from None
    reserve, commit = (reserve + 3) & ~3, (commit + 3) & ~3
    if commit > (reserve or 1 << 20):
        raise InvalidArgumentError(f"the process heap cannot commit {commit} bytes of {reserve or 1 << 20} reserved")
    if reserve and not commit:
        commit = min(reserve, PAGE_SIZE)  # the default, which fits whatever is reserved
    return reserve, commit


def _forked() -> None:
    global _lock
    _lock = threading.RLock()
    if _current is not None:
        _current.forked()


os.register_at_fork(after_in_child=_forked)
