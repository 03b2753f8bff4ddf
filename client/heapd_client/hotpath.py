"""What an allocation costs when it costs nothing: alloc pops a block, free pushes it, one store of a state word each.

What runs when that is not enough (no block cached, a view alive, a new epoch, the heap gone) is frontend.py. These
are closures, not methods, and each trick is here for its nanoseconds (scripts/bench alloc shows the sum):

- A closure's variables are one load each; the same through `self` would be two.
- There is one Block type a bin, so that `stack` and `limit` need not be looked up in the block; those who have the
  block alone, and time, find the stack as `_home`.
- Each bin's `free` has bytecode of its own, too (`_specialized`), and so inline caches: the interpreter keeps one type
  for each attribute it loads or stores there. Where sizes are mixed, that is a step in ten.
- `stack_of` maps the size asked for, in units of 16 bytes rounded up, to its bin's stack; extents are multiples of 16.
  The very size as the key would save 25 ns where there are few sizes, and cost 80 ns of cache misses where there are
  thousands, and the slow path for each new one. What is no key (0, negative, not an int, large and seen for the first
  time) is the slow path's.
- `larger_of` has the stack of the next larger bin, for the moments when there is nothing to take from the own one.
  Where sizes are mixed that is one alloc in five, and the slow path takes 4 us. An exception takes 400 ns, but only
  when it is raised; a look at the length before would take 30 ns always.
- In place of a stack of runs `stack_of` may have a `Stream` (stream.py), whose `pop` also finds those that come home.
- A cached block's word (`_base`) becomes BUSY by adding the size, and CACHED again by being stored (layout.py). Its
  generation need not change: no handle was made of it, or `_word` were negated and the slow path would see to it.
- `free` compares the arena's word with `_word`: a double free, a handle made, a free by someone else all differ.
- `pop(-2)`: not the block freed last, to which the caller's variable mostly still refers. A Block object is given
  out again only when nobody refers to it, so that a stale reference never comes back to life.

Exactness under signals, which CPython looks for after calls: in alloc nothing is called after the store, in free
nothing after the push. In a serialized heap the last call gives the mutex up, and what a signal handler raises out of
it undoes an alloc. Threads change after calls, too. So between the tests and the store of `free` nothing is called: no
other thread of this process can free the same block there, or have the front end stop. Between the pop and the store
of `alloc` something is: `is_quiet` tells who gives everything back whether a thread stands there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from sys import getrefcount
from threading import get_ident
from time import monotonic, sleep
from types import CodeType, FunctionType
from typing import Any, Final, NamedTuple

from .block import Block, Visitor
from .exporter import IDLE

__all__ = [
    "RELEASED",
    "Alloc",
    "Lock",
    "is_quiet",
    "is_unseen",
    "make_alloc",
    "make_block_type",
    "make_guest_type",
    "make_locked_alloc",
    "make_locked_block_type",
]

Alloc = Callable[..., Block]
SlowAlloc = Callable[[int, bool, Any], Block]  # size, zero, a cached block that somebody still refers to
SlowFree = Callable[[Any], None]
SetLimit = Callable[[int], None]
TakeCount = Callable[[], int]
StackOf = dict[int, Any]  # to something with a `pop`: list[Any] or Stream

_NO_SIZE: Final = (TypeError, OverflowError)  # the size is none, such as 64.0, or numpy's


def make_alloc(
    words: memoryview,
    live_slot: int,
    live: int,
    stack_of: StackOf,
    larger_of: StackOf,
    slow: SlowAlloc,
) -> Alloc:
    """The alloc of an unserialized heap, good while the heap's live word is `live`."""

    def alloc(size: int, zero: bool = False) -> Block:
        if words[live_slot] != live or zero:
            return slow(size, zero, None)
        block = None
        try:
            try:
                block = stack_of[size + 15 >> 4].pop(-2)
            except IndexError:
                block = larger_of[size + 15 >> 4].pop(-2)
            if getrefcount(block) == 2:
                block._word = word = block._base + size
                words[block.slot] = word
                return block  # type: ignore[no-any-return]
        except LookupError:
            pass
        except BaseException as error:
            _put_back(stack_of, block)
            if not isinstance(error, _NO_SIZE):
                raise
            block = None
        return slow(size, zero, block)

    return alloc


def _put_back(stack_of: StackOf, block: Any) -> None:
    """Cache a block again, in the bin it came from, that an exception kept from being given out. Where the front end
    has stopped meanwhile, the block is among those that giving everything back finds."""
    if block is not None:
        block._word = 0
        if stack_of:
            block._home.append(block)


_SEEN_BY_BLOCK: Final = 3  # references to a view that nobody else has: the block's, a local name's, getrefcount's
_view_slowly: Final = Block.view.fget  # type: ignore[attr-defined]


def _make_view(words: memoryview, live_slot: int, live: int | None) -> tuple[property, Callable[[], None]]:
    """`Block.view` for a block that has a buffer of the right size from its last life, so that no slice need be made;
    or that has a view, and no handle: its slab cannot be gone, and its word may be read. And what has every view take
    the slow path from then on, which knows whether the heap was closed."""

    def view(self: Any) -> memoryview:
        made = self._view
        if words[live_slot] == live:
            if made is None:
                if self._seen == self._word:
                    self._view = made = memoryview(self._buffer)
                    return made
            elif words[self.slot] == self._word:
                try:
                    made.readonly  # noqa: B018 - raises if the view was released
                    return made  # type: ignore[no-any-return]
                except ValueError:
                    pass
        made = None  # a reference too many
        return _view_slowly(self)  # type: ignore[no-any-return]

    def stop_views() -> None:
        nonlocal live
        live = None

    return property(view, doc=Block.view.__doc__), stop_views


def is_unseen(block: Any) -> bool:
    """Drop a block's own view if nobody else refers to it, or to what was made of it; True if that is so.

    A block that others can see has a view at every instant: without one, the next `free` would not look.
    """
    view = block._view
    if view is None or getrefcount(view) != _SEEN_BY_BLOCK:
        return False
    try:
        view = block._view = None
        if getrefcount(block._exporter) == IDLE:
            return True
        block._view = memoryview(block._buffer)
    except BaseException:
        block._view = memoryview(block._buffer)
        raise
    return False


def _specialized(function: Any) -> Any:
    """The same function, with a copy of the code: what the interpreter learns of its types it keeps in the code."""
    code: CodeType = function.__code__
    return FunctionType(code.replace(), function.__globals__, code.co_name, None, function.__closure__)


def make_block_type(
    words: memoryview, live_slot: int, live: int, stack: list[Any], slow: SlowFree
) -> tuple[type[Block], SetLimit]:
    """The Block type of one bin, and what sets how many blocks `free` may push on `stack` (at first none)."""
    limit = 0

    def set_limit(blocks: int) -> None:
        nonlocal limit
        limit = blocks

    class _Block(Block):
        __slots__ = ()
        _home = stack
        view, stop_views = _make_view(words, live_slot, live)

        @_specialized
        def free(self) -> None:
            if (
                (self._view is not None and not is_unseen(self))
                or len(stack) >= limit
                or words[live_slot] != live
                or words[self.slot] != self._word
            ):
                return slow(self)
            self._word = 0
            words[self.slot] = self._base
            stack.append(self)
            return None

    return _Block, set_limit


def make_guest_type(
    words: memoryview,
    live_slot: int,
    live: int,
    home_slot: int,
    home: int,
    slow: SlowFree,
    save: SlowFree,
    home_of: object,
) -> type[Block]:
    """The Block type of runs that another session allocated: `free` sends them home (homing.py).

    Args: home_slot, home (the session's word, and what it is while it lives), save (told of a block whose owner died
    while it was sent), home_of (for `Guests`).
    """

    class _Guest(Visitor):
        __slots__ = ("_place", "_stem", "_turn")
        _live_slot, _live = live_slot, live
        _home_of = home_of
        view, stop_views = _make_view(words, live_slot, live)

        def free(self) -> None:
            if (
                (self._view is not None and not is_unseen(self))
                or not self._base  # it was resized, or is not kept: what is sent is to be counted
                or words[live_slot] != live
                or words[home_slot] != home
                or words[self.slot] != -self._word
            ):
                return slow(self)
            self._word = 0
            words[self.slot] = self._base
            if words[home_slot] != home:
                save(self)
            return None

    return _Guest


class Lock(NamedTuple):
    """A heap's mutex, as the hot path uses it.

    Fields: trylock, unlock (the C calls), settle (goes on from what trylock returned, if not 0), undo (after an
    exception, gets the `status` below).

    `status` says in one local variable how far a hot function has come with the mutex. None: trylock was called, and
    a signal's exception kept its result from us. 0: held. More: settle waits, or took it. RELEASED: given up.
    """

    trylock: Callable[[], int]
    unlock: Callable[[], int]
    settle: Callable[[int], object]
    undo: Callable[[int | None], None]


RELEASED: Final = -1


def make_locked_alloc(
    words: memoryview,
    live_slot: int,
    live: int,
    stack_of: StackOf,
    larger_of: StackOf,
    slow: SlowAlloc,
    lock: Lock,
) -> tuple[Alloc, TakeCount]:
    """The alloc of a serialized heap, and what tells (and forgets) how often it took the mutex."""
    trylock, unlock, settle, undo = lock
    count = 0

    def alloc(size: int, zero: bool = False) -> Block:
        nonlocal count
        status = block = None
        try:
            status = trylock()
            if status:
                settle(status)
                status = 0
            if words[live_slot] == live and not zero:
                try:
                    try:
                        block = stack_of[size + 15 >> 4].pop(-2)
                    except IndexError:
                        block = larger_of[size + 15 >> 4].pop(-2)
                    if getrefcount(block) == 2:
                        count += 1
                        block._word = word = block._base + size
                        words[block.slot] = word
                        status = RELEASED
                        unlock()
                        return block  # type: ignore[no-any-return]
                except LookupError:
                    pass
                except _NO_SIZE:
                    _put_back(stack_of, block)
                    block = None
            status = RELEASED
            unlock()
        except BaseException:
            if block is not None:
                words[block.slot] = block._base
                _put_back(stack_of, block)
            undo(status)
            raise
        return slow(size, zero, block)

    def take_count() -> int:
        nonlocal count
        taken, count = count, 0
        return taken

    return alloc, take_count


def make_locked_block_type(
    words: memoryview, live_slot: int, live: int, stack: list[Any], slow: SlowFree, lock: Lock
) -> tuple[type[Block], SetLimit, TakeCount]:
    """As make_block_type, for a serialized heap; and what tells how often `free` took the mutex."""
    trylock, unlock, settle, undo = lock
    limit = count = 0

    def set_limit(blocks: int) -> None:
        nonlocal limit
        limit = blocks

    def take_count() -> int:
        nonlocal count
        taken, count = count, 0
        return taken

    class _Block(Block):
        __slots__ = ()
        _home = stack
        view, stop_views = _make_view(words, live_slot, live)

        @_specialized
        def free(self) -> None:
            nonlocal count
            status = None
            try:
                status = trylock()
                if status:
                    settle(status)
                    status = 0
                if (
                    (self._view is None or is_unseen(self))
                    and len(stack) < limit
                    and words[live_slot] == live
                    and words[self.slot] == self._word
                ):
                    count += 1
                    self._word = 0
                    words[self.slot] = self._base
                    stack.append(self)
                    status = RELEASED
                    unlock()
                    return None
                status = RELEASED
                unlock()
            except BaseException:
                undo(status)
                raise
            return slow(self)

    return _Block, set_limit, take_count


# -- is a thread between the pop and the store of an alloc? ------------------------------------------------------------
_ALLOC_CODES: Final = {
    constant
    for maker in (make_alloc, make_locked_alloc)
    for constant in maker.__code__.co_consts
    if isinstance(constant, CodeType) and constant.co_name == "alloc"
}


def is_quiet(harmless: set[CodeType], patience_s: float = 0.1) -> bool:
    """Whether no thread stands in a hot alloc of any heap, from where it may still make a block BUSY that it popped.
    Waits for other threads to leave it, in vain only for one that stands there below us, in a finaliser or handler.

    Args: harmless (functions that alloc calls with nothing popped, or whose caller does not rely on what it popped).
    """
    deadline = monotonic() + patience_s
    while True:
        standing = [ident for ident, frame in sys._current_frames().items() if _is_allocating(frame, harmless)]
        if not standing:
            return True
        if get_ident() in standing or monotonic() >= deadline:
            return False
        sleep(0.0002)


def _is_allocating(frame: Any, harmless: set[CodeType]) -> bool:
    called = None
    while frame is not None:
        if frame.f_code in _ALLOC_CODES and called not in harmless:
            return True
        called, frame = frame.f_code, frame.f_back
    return False
