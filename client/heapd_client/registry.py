"""The sessions of this process: closed at its end, let go of in a forked child, found by what is unpickled.

A spawned child, or any other process, gets Blocks and Heaps by pickle. They look for an open session of that process
with the same daemon, or open one, which lives as long as the process.
"""

from __future__ import annotations

import atexit
import os
import threading
from time import monotonic
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

from heapd.errors import StaleHandleError
from heapd.layout import Handle

from .heapcore import deferred, working

if TYPE_CHECKING:
    from .block import Block
    from .heap import Heap
    from .session import Session

__all__ = ["is_exiting", "register", "reopen_block", "reopen_heap", "unregister"]

_EXIT_PATIENCE_S: Final = 0.5  # what closing all sessions may delay the end of the process by

_open: WeakSet[Session] = WeakSet()
_kept: list[Session] = []  # opened to unpickle something
_forking: list[Session] = []  # the process forks now
_keeping = threading.Lock()
_is_hooked = False
_is_exiting = False


def register(session: Session) -> None:
    """Say that a session was opened."""
    global _is_hooked
    _open.add(session)
    if not _is_hooked:
        _is_hooked = True
        atexit.register(_close_all)
        os.register_at_fork(before=_before_fork, after_in_child=_in_child, after_in_parent=_in_parent)


def unregister(session: Session) -> None:
    """Say that a session was closed."""
    _open.discard(session)


def is_exiting() -> bool:
    """The interpreter ends; sessions are being closed, or are."""
    return _is_exiting


def _close_all() -> None:
    """At exit: tell the daemons, quickly. They notice anyway, so a session that a daemon thread uses is left to them:
    closed under its hands, that thread would complain."""
    global _is_exiting
    _is_exiting = True
    deadline = monotonic() + _EXIT_PATIENCE_S
    for session in list(_open):
        session.leave(max(deadline - monotonic(), 0.01))


def _before_fork() -> None:
    _forking[:] = _open
    for session in _forking:
        session.prepare_fork()


def _in_child() -> None:
    global _keeping
    _keeping = threading.Lock()  # another thread of the parent may have held it
    _forking.clear()
    working.clear()
    deferred.clear()
    for session in list(_open):
        session.forked()


def _in_parent() -> None:
    for session in _forking:
        session.has_forked()
    _forking.clear()


def _session_for(endpoint: str, instance: bytes) -> Session:
    """An open session of this process with that daemon; one is opened, and kept, if there is none."""
    from .session import connect

    with _keeping:
        session = next((one for one in list(_open) if (one.endpoint, one.instance) == (endpoint, instance)), None)
        if session is None:
            session = connect(endpoint, autostart=False)
            _kept.append(session)
        return session


def reopen_block(endpoint: str, handle: tuple[bytes, int, int, int]) -> Block:
    """For pickle: the block of a handle, in the process that unpickles it."""
    return _session_for(endpoint, handle[0]).open(Handle(*handle))


def reopen_heap(endpoint: str, instance: bytes, heap_id: int) -> Heap:
    """For pickle: the heap, opened by the process that unpickles it."""
    session = _session_for(endpoint, instance)
    if session.instance != instance:
        raise StaleHandleError(f"the pickled heap is of another arena than that of {endpoint}")
    return session.open_heap_id(heap_id)
