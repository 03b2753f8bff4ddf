"""A session: this process, as one daemon knows it; heaps, blocks by handle, and what happens to both in a fork.

A forked child inherits Session, Heap and Block objects, the mapping, and sockets that it must not touch. At its first
call it opens a session of its own, opens the heaps anew that the object has open, and goes on.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from math import inf
from time import monotonic, sleep
from typing import Any, Final, NoReturn, TypeVar

import zmq

from heapd.errors import (
    ClosedError,
    DaemonStoppedError,
    HeapdError,
    HeapFullError,
    InvalidArgumentError,
    QuotaError,
    SegmentError,
    SessionLostError,
    StaleHandleError,
)
from heapd.layout import (
    BUSY,
    C_HEAP_ID,
    F_EXECUTABLE,
    F_FREE_ORPHANS,
    F_GENERATE_EXCEPTIONS,
    F_PERSISTENT,
    F_SERIALIZE,
    H_CONTROLS_READY,
    Handle,
)
from heapd.records import ArenaStatistics, Entry, EntryKind, HeapInfo, SessionInfo
from heapd.wire import Endpoint, Request, check_directory
from heapd.wire import messages as ask

from .arguments import as_patience, as_pid, as_timeout, shown
from .autostart import start_daemon
from .block import Block
from .connection import Connection
from .control import Greeting, await_daemon, descriptors, is_process_alive, not_found, say_hello
from .handles import Located, checked_handle, locate, locate_at, stale
from .heap import Heap
from .homing import Guests
from .mapping import Mapping
from .registry import register, unregister
from .strays import Strays

__all__ = ["Session", "connect"]

_Result = TypeVar("_Result")

DEFAULT_TIMEOUT_S: Final = 10.0
_CONNECT_ATTEMPTS: Final = 3  # a daemon may end between being found and being asked
_DEAD_PATIENCE_S: Final = 1.0  # arbitrary: how long a restart mostly takes, for a session that is closed meanwhile
# Arbitrary: who is at work makes a call within them, on a busy machine, too; who is idle does not.
_PAUSES_S: Final = (0.001, 0.004, 0.016, 0.064)
_LIST_PAGE: Final = 500
_WALK_PAGE: Final = 1024  # entries of a walk in one answer
_KINDS: Final = {int(kind): kind for kind in EntryKind}
_kept_mapped: Final[list[Mapping]] = []  # arenas of closed sessions in which a thread holds a lock yet


def connect(
    endpoint: str | None = None, *, autostart: bool = True, timeout: float = DEFAULT_TIMEOUT_S, front_end: bool = True
) -> Session:
    """Open a session with a daemon.

    Args:    endpoint ("ipc://DIRECTORY/NAME", or "NAME" in the user's runtime directory; None: $HEAPD_ENDPOINT, else
             the user's default daemon), autostart (start a daemon if none answers; it ends some seconds after its last
             session), timeout (seconds that connecting, each call, and a wait for a heap's mutex may take).
    Returns: the session; a context manager that closes it.
    Raises:  DaemonNotFoundError if none answers and none is or could be started; DaemonLostError past the timeout;
             VersionError, AccessError, SegmentError, LimitError; InvalidArgumentError for an endpoint that is none.
    """
    timeout = as_patience(timeout)
    where = Endpoint.parse(endpoint)
    deadline = monotonic() + timeout
    for attempt in range(1, _CONNECT_ATTEMPTS + 1):
        if await_daemon(where, deadline) is None:
            if not autostart:
                raise not_found(where)
            start_daemon(where, max(deadline - monotonic(), 0.1))
        try:
            return Session(where, timeout, front_end)
        except DaemonStoppedError:
            if attempt == _CONNECT_ATTEMPTS or monotonic() >= deadline:
                raise
    raise AssertionError("unreachable")


class Session:
    """One process at one daemon. Made by `connect`; any thread may use it; a context manager that closes it.

    Attributes: endpoint (text; connects to the same daemon anywhere), timeout (seconds), arena (the mapping: what each
    page is). `number`, `instance`, `daemon_pid` and `pid` are those of the calling process, also after a fork.
    """

    def __init__(self, endpoint: Endpoint, timeout: float, front_end: bool) -> None:
        """For the library alone; use `connect`."""
        self.endpoint = str(endpoint)
        self.timeout = timeout
        self.has_front_ends = front_end
        self._endpoint = endpoint
        self._is_closed = True  # until it is open: nothing to close if that fails
        self._is_left = False
        self._heaps: dict[int, Heap] = {}
        self._default: Heap | None = None
        self._paused: list[Heap] = []  # during a fork
        self._left_locked: list[Heap] = []  # closed or destroyed with their locks held
        self._asked = 0  # other sessions, to give back what they cache, when memory was short last
        self.strays = Strays()
        self._sweeps = count(1)
        self._lock = threading.RLock()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            greeting = say_hello(endpoint, timeout, context)
            access = check_directory(endpoint.directory)
            with descriptors():
                self.arena = Mapping(greeting.segment, greeting.arena_size, greeting.instance, access)
        except SegmentError as error:
            context.term()
            is_served = is_process_alive(greeting.daemon_pid, greeting.daemon_start_time)
            if is_served and not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise DaemonStoppedError(f"the daemon at {endpoint} went before its arena was mapped here") from None
        except BaseException:
            context.term()
            raise
        self._connection: Connection | None = self._open_connection(greeting, context)
        self._guests = Guests(self.arena)
        self._is_closed = False
        register(self)

    def _open_connection(self, greeting: Greeting, context: zmq.Context[zmq.Socket[bytes]]) -> Connection:
        # No reference to the session: it would never be collected.
        late = self.strays.take_late
        return Connection(self._endpoint, greeting, context, self.arena, timeout_s=self.timeout, on_late=late)

    def __repr__(self) -> str:
        return f"<Session {self.endpoint}{' closed' if self._is_closed else ''}>"

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- calls -------------------------------------------------------------------------------------------------------
    def call(self, request: Request, wait_s: float = 0.0, until: float = inf) -> Any:
        """Ask the daemon; what every method here and of Heap comes down to.

        Args:   wait_s (seconds the daemon itself may take on purpose, on top of the timeout), until (monotonic seconds
                from which on a daemon that has died for good is waited for no longer).
        Raises: what the daemon answers; DaemonLostError, DaemonStoppedError, ClosedError.
        """
        connection = self._connection
        if connection is None:
            connection = self._reconnect()
        if self.strays:
            self.strays.give_back(connection.call)
        try:
            return connection.call(request, wait_s, until)
        except SessionLostError:
            if self._is_closed:
                raise ClosedError("the session was closed while a call was waiting") from None
            raise

    def post(self, request: Request) -> None:
        """Tell the daemon something that may be done late, or twice, before what this thread asks next; its answer is
        waited for only if it has many to give. Raises: as `call`."""
        connection = self._connection
        if connection is None or not connection.post(request):
            self.call(request)

    def _reconnect(self) -> Connection:
        """In a forked child, at its first call: a session of its own, with the same heaps open."""
        with self._lock:
            if self._is_closed:
                raise ClosedError("the session is closed")
            if self._connection is not None:
                return self._connection
            if self.arena.is_stopped:
                raise DaemonStoppedError(f"the daemon at {self.endpoint} was stopped")
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            try:
                greeting = say_hello(self._endpoint, self.timeout, context)
                if greeting.instance != self.arena.instance:
                    raise StaleHandleError(f"another daemon serves {self.endpoint} now; connect to it anew")
            except BaseException:
                context.term()
                raise
            connection = self._open_connection(greeting, context)
            for heap_id in list(self._heaps):
                with suppress(HeapdError):  # it may be gone; its own methods say so
                    connection.call(ask.HeapOpenId(heap_id))
            self._connection = connection
            return connection

    def _ready(self) -> Connection:
        return self._connection or self._reconnect()

    def regret(self, request: Request) -> None:
        """A call that was interrupted: what it was or will be granted is wanted by nobody."""
        if self._connection is not None:
            self._connection.regret(request)

    def sweep(self, heap_id: int) -> None:
        """Give back all that this session caches of a heap. Raises: DaemonError; then the daemon may be about to."""
        self.call(ask.HeapGiveBack(heap_id, [], next(self._sweeps)))

    def give_back(self) -> None:
        """Free what nobody will ever get, as far as the daemon can be reached."""
        self.strays.give_back(self._ready().call)

    def reclaim(self, shortage: HeapFullError, heap_id: int) -> None:
        """Memory is short: give back what this session caches, and ask all others to do so at their next operation, if
        that may help: all that they cache, or what they cache of the heap where the heap's maximum is the bound."""
        self._asked = 0
        for heap in list(self._heaps.values()):
            with suppress(LookupError, ClosedError):
                heap.release_cache_if_idle()
        if not isinstance(shortage, QuotaError):
            self._asked = self.call(ask.ArenaReclaim(heap_id if shortage.bound == "heap" else 0))

    def retry(self, shortage: HeapFullError, attempt: Callable[[], _Result]) -> _Result:
        """`attempt` some moments later, once more and more: it found no memory, but others were asked for what they
        cache. For callers that hold no lock, which others may need to give back.

        Raises: what the last attempt raised; `shortage` if nobody was asked.
        """
        for pause_s in _PAUSES_S:
            if not self._asked:
                break
            sleep(pause_s)
            try:
                return attempt()
            except HeapFullError as error:
                shortage = error
        raise shortage from None

    def call_for_memory(self, request: Request, heap_id: int = 0) -> Any:
        """As `call`; where memory is short, caches are asked back first and the request is made once more."""
        try:
            return self.call(request)
        except HeapFullError as shortage:
            self.reclaim(shortage, heap_id)
        return self.call(request)

    def prepare_fork(self) -> None:
        """In the parent, before a fork."""
        self._paused = list(self._heaps.values())
        for heap in self._paused:
            heap.prepare_fork()

    def has_forked(self) -> None:
        """In the parent, after it."""
        for heap in self._paused:
            heap.has_forked()
        self._paused = []

    def forked(self) -> None:
        """In a forked child: what was the parent's is let go, untouched."""
        if self._connection is not None:
            self._connection.drop()
        self._connection = None
        self._default = None
        self.strays.clear()
        self._guests.clear()
        self._lock = threading.RLock()
        for heap in self._heaps.values():
            heap.forked()

    # -- who ---------------------------------------------------------------------------------------------------------
    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def number(self) -> int:
        """The session's number, as state words and walks show it."""
        return self._ready().greeting.session

    @property
    def instance(self) -> bytes:
        """16 bytes: the arena's identity."""
        return self.arena.instance

    @property
    def segment(self) -> str:
        """Name of the daemon's shared memory segment."""
        return self.arena.name

    @property
    def incarnation(self) -> int:
        """How often the daemon has been started on this arena, from 1."""
        return self.arena.server.incarnation

    @property
    def pid(self) -> int:
        """Id of the process that the session is of: this one."""
        return os.getpid()

    @property
    def daemon_pid(self) -> int:
        """Id of the process that serves the arena, or served it until it died: a restart changes it."""
        return self.arena.server.pid

    # -- heaps -------------------------------------------------------------------------------------------------------
    def create_heap(
        self,
        name: str | None = None,
        *,
        initial: int = 0,
        maximum: int = 0,
        serialize: bool = True,
        executable: bool = False,
        generate_exceptions: bool = False,
        persistent: bool = False,
        orphans: str = "keep",
        max_block: int = 0,
        session_quota: int = 0,
    ) -> Heap:
        """Make a heap.

        Args:    name (None: the heap goes with this session; else with the last session that has it open), initial
                 (bytes committed at once), maximum (bytes; 0: it grows), serialize (False: no function takes the
                 heap's mutex, as HEAP_NO_SERIALIZE), executable (its blocks may hold machine code),
                 generate_exceptions (recorded; errors are always exceptions here), persistent (stays until it is
                 destroyed), orphans ("keep" or "free" what a session that died had allocated), max_block (largest
                 request in bytes; 0: no limit of its own), session_quota (bytes that one session may have of it,
                 allocated or cached; 0: no limit of its own).
        Raises:  HeapExistsError, HeapFullError, LimitError, InvalidArgumentError; ExecuteError if the system does not
                 let shared memory be executed.
        """
        if not isinstance(orphans, str) or orphans not in ("keep", "free"):
            raise InvalidArgumentError('orphans is "keep" or "free"')
        flags = 0
        for is_set, flag in (
            (serialize, F_SERIALIZE),
            (executable, F_EXECUTABLE),
            (persistent, F_PERSISTENT),
            (generate_exceptions, F_GENERATE_EXCEPTIONS),
            (orphans == "free", F_FREE_ORPHANS),
        ):
            flags |= flag if is_set else 0
        return self.make_heap(name, initial, maximum, flags, max_block, session_quota)

    def make_heap(
        self, name: str | None, initial: int, maximum: int, flags: int, max_block: int = 0, session_quota: int = 0
    ) -> Heap:
        """As `create_heap`, its options as layout.F_*. With those, too, that the win32 module alone heeds: all blocks
        of a heap that checks tails are its own, as it writes the bytes behind them that `validate` looks for."""
        if flags & F_EXECUTABLE:
            self.arena.check_executable()
        request = ask.HeapCreate(name, initial, maximum, flags, max_block, session_quota)
        try:
            return self._adopt(self.call_for_memory(request))
        except HeapFullError as shortage:
            return self.retry(shortage, lambda: self._adopt(self.call_for_memory(request)))

    def open_heap(self, name: str) -> Heap:
        """The heap of that name. Raises: NoSuchHeapError."""
        return self._adopt(self.call(ask.HeapOpen(name)))

    @property
    def default_heap(self) -> Heap:
        """This session's own heap: serialized, growable, made at its first use, gone with the session."""
        return self.open_default_heap()

    def open_default_heap(self, reserve: int = 0, commit: int = 0) -> Heap:
        """As `default_heap`. The two figures, in bytes, count at its first use alone; 0: 1 MiB, and 4 KiB of it.

        Raises: InvalidArgumentError if commit exceeds reserve; HeapFullError.
        """
        heap = self._default
        if heap is None or not heap.is_live:
            heap = self._default = self._adopt(self.call(ask.HeapDefault(reserve, commit)))
        return heap

    @property
    def open_heaps(self) -> list[Heap]:
        """The heaps that this session has open, in the order in which they were."""
        with self._lock:
            heaps = list(self._heaps.values())
        return [heap for heap in heaps if heap.is_live]

    def open_heap_id(self, heap_id: int) -> Heap:
        """The heap with that id, as a pickled Heap or a HeapInfo names it. Raises: NoSuchHeapError."""
        if not isinstance(heap_id, int):
            raise InvalidArgumentError(f"a heap's id is an int, not {shown(heap_id)}")
        heap = self._heaps.get(heap_id)
        return heap if heap is not None and heap.is_live else self._adopt(self.call(ask.HeapOpenId(heap_id)))

    def heaps(self, pid: int | None = None) -> list[HeapInfo]:
        """All heaps, or those that a process has open, its default heap first."""
        process = as_pid(pid)
        found: dict[int, HeapInfo] = {}
        after = 0
        while True:
            page = self.call(ask.HeapList(process, after, _LIST_PAGE))
            found.update((fields[0], HeapInfo(*fields)) for fields in page)
            if len(page) < _LIST_PAGE:
                return list(found.values())
            after = max(fields[0] for fields in page)

    def walk(self, heap_id: int) -> Iterator[Entry]:
        """The entries of any heap, open here or not, as Heap.walk tells them; takes no lock. Raises: NoSuchHeapError,
        HeapDestroyedError."""
        cursor = 0
        while True:
            entries, cursor = self.walk_page(heap_id, cursor)
            yield from entries
            if not cursor:
                return

    def walk_page(self, heap_id: int, cursor: int) -> tuple[Iterator[Entry], int]:
        """For Heap: some entries of a walk. Returns: they, and the cursor to go on with, 0 if there are no more."""
        entries, cursor = self.call(ask.HeapWalk(heap_id, cursor, _WALK_PAGE))
        return map(_as_entry, entries), cursor

    def sessions(self, pid: int | None = None) -> list[SessionInfo]:
        """All sessions, or those of one process."""
        return [SessionInfo(*fields) for fields in self.call(ask.SessionList(as_pid(pid)))]

    def statistics(self) -> ArenaStatistics:
        """Bytes of the arena; the parts add up."""
        return ArenaStatistics(*self.call(ask.ArenaStatisticsGet()))

    def _adopt(self, fields: Any) -> Heap:
        """The one Heap object of this session for the heap that the daemon described."""
        info = HeapInfo(*fields)
        with self._lock:
            heap = self._heaps.get(info.heap_id)
            if heap is None or not heap.is_live:
                heap = self._heaps[info.heap_id] = Heap(self, self.arena, info)
            return heap

    def forget(self, heap: Heap) -> None:
        """For Heap: it was closed or destroyed."""
        with self._lock:
            if self._heaps.get(heap.id) is heap:
                del self._heaps[heap.id]
            if self._default is heap:
                self._default = None
            self._guests.clear(heap)
            if heap.must_stay_mapped:
                self._left_locked.append(heap)

    # -- blocks by handle --------------------------------------------------------------------------------------------
    def open(self, handle: Handle | bytes) -> Block:
        """The block that a handle names, whoever allocated it. Looked up in the mapping; asks the daemon only for a
        heap that this session has not opened.

        Raises: StaleHandleError if that block was freed, or its arena is gone; NotABlockError, InvalidArgumentError if
                the handle can never have been one.
        """
        if self._is_closed:
            raise ClosedError("the session is closed")
        handle = checked_handle(handle)
        located = locate(self.arena, handle)
        return self._open(handle, located, is_visitor=self.arena.shape.is_run_slot(handle.slot))

    def block_at(self, address: int) -> Block:
        """The block that begins at an address, whoever allocated it. As `open`, for who has kept nothing but addresses:
        they cannot tell a block from one that was at its place before.

        Raises: NotABlockError if no allocated block begins there; InvalidArgumentError if that is beyond the arena.
        """
        if self._is_closed:
            raise ClosedError("the session is closed")
        if not isinstance(address, int):
            raise InvalidArgumentError(f"an address is an int, not {type(address).__name__}")
        return self._open(*locate_at(self.arena, address), is_visitor=False)

    def _open(self, handle: Handle, located: Located, *, is_visitor: bool) -> Block:
        """Args: is_visitor (a run whose owner knows of the handle: it may be another session's, and go home)."""
        arena = self.arena
        heap = self._heap_at(located.control_index, handle)
        if heap.is_executable or arena.has_executable_pages:
            arena.protect(handle.address, max(located.extent, 1), executable=heap.is_executable)
        form, word = arena.shape.word_format(handle.slot), arena.words[handle.slot]
        if form.generation(word) != handle.generation or form.state(word) != BUSY:
            raise stale(handle)
        if is_visitor and form.session(word) != self.number:
            block = heap.guest(handle.slot, handle.address, located.extent, word)
            if not arena.has_executable_pages:
                self._guests.keep(block, word)
                if "open" not in self.__dict__:  # not before: it makes a cycle, as each heap does
                    self.__dict__["open"] = self._guests.make_open(partial(Session.open, self))
            return block
        return Block(heap, handle.slot, handle.address, located.extent, -word)

    def _heap_at(self, control_index: int, handle: Handle) -> Heap:
        words = self.arena.words
        heap_id = 0
        if control_index < words[H_CONTROLS_READY]:
            heap_id = words[self.arena.shape.control_slot(control_index) + C_HEAP_ID]
        heap = self._heaps.get(heap_id)
        if heap is not None and heap.is_live:
            return heap
        try:
            return self._adopt(self.call(ask.HeapOpenId(heap_id or control_index)))
        except LookupError:
            raise stale(handle) from None

    # -- the end -----------------------------------------------------------------------------------------------------
    def close(self, *, patience_s: float | None = None) -> None:
        """End the session: its anonymous heaps go, and named ones that nobody else has open. Twice is harmless.

        Args: patience_s (seconds that the daemon may take; None: the timeout, or 1 s for one that has died). No answer
        is no error: the daemon notices by itself when this process ends.
        """
        patience_s = as_timeout(patience_s)
        if patience_s is None and not is_process_alive(*self.arena.server[1:]):
            patience_s = min(self.timeout, _DEAD_PATIENCE_S)
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            connection, self._connection = self._connection, None
            unregister(self)
            for heap in self._heaps.values():  # first: no thread may allocate what the daemon is about to take back
                heap.mark_closed(self.timeout if patience_s is None else patience_s)
            if connection is not None:
                if patience_s is not None:
                    connection.timeout_s = patience_s
                try:
                    connection.call(ask.SessionClose())
                except HeapdError:
                    pass
                finally:
                    connection.close()
            self._keep_locked_mapped()
            self._heaps.clear()
            self._guests.clear()
            self.__dict__.pop("open", None)
            self._default = None
            self.arena.close()

    def _keep_locked_mapped(self) -> None:
        """Keep the mapping for good if a thread goes on holding a heap's lock there."""
        if any(heap.must_stay_mapped for heap in [*self._heaps.values(), *self._left_locked]):
            self.arena.stay_mapped()

    def leave(self, patience_s: float) -> None:
        """At the end of the process: close, unless another thread is still at work with it, or may be about to."""
        if self._connection is not None and (self._connection.is_shared or threading.active_count() > 1):
            self._connection.drop(is_closed=False)
            self._is_left = True
            self.arena.stay_mapped()  # such a thread may hold a lock, and does not run again
        else:
            self.close(patience_s=patience_s)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the session with {self.endpoint} is this process's own and cannot be pickled; "
            "hand over its heaps and blocks, or connect there"
        )

    def __del__(self) -> None:
        if self._is_closed or self._is_left:
            return
        self._is_closed = True
        self._keep_locked_mapped()
        if self._connection is not None:
            self._connection.close(0.0)
        self.arena.close()
        warnings.warn(f"unclosed session with {self.endpoint}", ResourceWarning, stacklevel=2, source=self)


def _as_entry(fields: list[Any]) -> Entry:
    fields[0] = _KINDS[fields[0]]
    return Entry._make(fields)
