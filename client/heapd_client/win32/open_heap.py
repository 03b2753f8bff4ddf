"""One heap as this process has it open: what its Win32 functions come down to.

Blocks are found by address: those allocated here in `blocks`, any other in the mapping. `blocks` is a memory, not the
truth: another process may have freed a block, and its memory may be another block's by now; so each look compares the
state word. HeapAlloc and HeapFree of the common case do without this module (heaps.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import get_ident
from typing import ParamSpec, TypeVar

from heapd.errors import CannotResizeInPlaceError, HeapdError, LockTimeoutError, NotABlockError
from heapd.layout import F_GENERATE_EXCEPTIONS, F_SERIALIZE, HEAP_INDEX_BITS, PAGE_COMMITTED

from ..block import Block
from ..handles import was_block
from ..heap import Heap
from .constants import ERROR_INVALID_PARAMETER, ERROR_NOACCESS, HEAP_NO_SERIALIZE
from .last_error import Failure, failure_of, patiently

__all__ = ["OpenHeap"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_NO_SERIALIZE = int(HEAP_NO_SERIALIZE)
_INDEX_MASK = (1 << HEAP_INDEX_BITS) - 1


class OpenHeap:
    """Fields: heap, handle (address of its first region), blocks (by address), raises (it was made with
    HEAP_GENERATE_EXCEPTIONS), is_serialized, is_own (this process made it).
    """

    def __init__(self, heap: Heap) -> None:
        flags = heap.info.flags
        self.heap = heap
        self.handle = heap.info.base
        self.blocks: dict[int, Block] = {}
        self._locks: dict[int, int] = {}  # by HeapLock, of each thread
        self.raises = bool(flags & F_GENERATE_EXCEPTIONS)
        self.is_serialized = bool(flags & F_SERIALIZE)
        self.is_own = heap.info.creator == heap.session.number
        self._index = heap.id & _INDEX_MASK

    def locked(self, flags: int) -> AbstractContextManager[None]:
        """Round the functions of one call: HEAP_NO_SERIALIZE among its flags spares them the heap's mutex."""
        if flags & _NO_SERIALIZE and self.is_serialized:
            return self.heap.unserialized()
        return nullcontext()

    def call(self, flags: int, function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
        """A function of the heap under a call's flags; waits for the mutex without limit. Raises: Failure."""
        with self.locked(flags):
            return patiently(function, *arguments, **options)

    # -- blocks ------------------------------------------------------------------------------------------------------
    def find(self, address: int) -> Block:
        """The allocated block of this heap that begins at `address`.

        Raises: Failure: ERROR_NOACCESS beyond the arena, ERROR_INVALID_PARAMETER for a freed block, and the last error
        kept for an address that is no block's.
        """
        block = self.blocks.get(address)
        if block is not None:
            try:
                if self.heap.word_of(block) == block.word:
                    return block
            except (LookupError, ValueError):
                pass
            self.blocks.pop(address, None)  # freed by another process, or resized
        return self._find_afresh(address)

    def _find_afresh(self, address: int) -> Block:
        arena = self.heap.mapping
        info = arena.find_page(address)
        if info is None:
            raise Failure(ERROR_NOACCESS, f"the address {address:#x} is beyond the arena")
        block = None
        if info.state == PAGE_COMMITTED and info.heap == self._index:
            with suppress(NotABlockError, LookupError):
                block = self.heap.session.block_at(address)
        if block is not None and block.heap.id == self.heap.id:
            return block
        if was_block(arena, address):
            raise Failure(ERROR_INVALID_PARAMETER, f"the block at {address:#x} is free, or of another heap")
        raise Failure(None, f"no block begins at {address:#x}")

    def alloc(self, flags: int, size: int, zero: bool) -> int:
        """Address of a new block. Raises: Failure."""
        block = None
        try:
            while block is None:
                with suppress(LockTimeoutError), self.locked(flags):
                    block = self.heap.alloc_slow(size, zero, None)
        except HeapdError as error:
            raise failure_of(error) from None
        except BaseException:
            if block is not None:  # a signal handler's, at the end of `with`
                self.heap.session.strays.append((self.heap.id, block.address, block.generation))
            raise
        self.blocks[block.address] = block
        return block.address

    def realloc(self, flags: int, address: int, size: int, *, zero: bool, in_place: bool) -> int:
        """Resize a block; its address then. A smaller one stays where it is.

        Raises: Failure; the block is as it was. Also where a signal handler raises it is where it was, and whole; it
        may have the new size then.
        """
        block = self.find(address)
        in_place = in_place or size <= block.size
        if in_place or self.heap.can_grow_here(block, size):
            try:
                self._resize(flags, block, size, zero)
                return address
            except CannotResizeInPlaceError as error:
                if in_place:
                    raise failure_of(error) from None
        return self._move(flags, address, block, size, zero)

    def _resize(self, flags: int, block: Block, size: int, zero: bool) -> None:
        """Raises: CannotResizeInPlaceError, Failure."""
        with self.locked(flags):
            while True:
                try:
                    self.heap.realloc(block, size, zero=zero, in_place_only=True)
                    return
                except LockTimeoutError:
                    continue
                except CannotResizeInPlaceError:
                    raise
                except HeapdError as error:
                    raise failure_of(error) from None

    def _move(self, flags: int, address: int, block: Block, size: int, zero: bool) -> int:
        """Raises: Failure."""
        old_size, blocks = block.size, self.blocks

        def fill(where: int) -> None:
            self._fill_grown(where, old_size, size, zero)

        blocks.pop(address, None)
        while True:
            try:
                new = self.heap.replace(block, size, fill, serialize=not flags & _NO_SERIALIZE)
                break
            except LockTimeoutError:
                continue
            except BaseException as error:
                blocks[address] = block
                if isinstance(error, HeapdError):
                    raise failure_of(error) from None
                raise
        # Nothing is called from here to the return to the caller of HeapReAlloc.
        address = new.address
        blocks[address] = new
        return address

    def _fill_grown(self, address: int, old_size: int, size: int, zero: bool) -> None:
        """Write what a block that grew has beyond its old bytes. Args: sizes in bytes, as of the heap underneath."""
        if zero:
            self.heap.mapping.zero(address + old_size, size - old_size)

    def free(self, flags: int, address: int) -> None:
        """Raises: Failure; nothing has changed."""
        block = self.find(address)
        self.blocks.pop(address, None)
        try:
            self.call(flags, self._give_back, block)
        except BaseException:
            if not block.is_free:
                self.blocks[address] = block
            raise

    def _give_back(self, block: Block) -> None:
        self.heap.free(block)

    def size_of(self, address: int) -> int:
        """Bytes asked for. Raises: Failure."""
        return self.find(address).size

    # -- the lock ----------------------------------------------------------------------------------------------------
    def lock(self) -> None:
        """HeapLock. Raises: Failure; not held then."""
        me = get_ident()
        self._locks[me] = self._locks.get(me, 0) + 1
        try:
            self.heap.lock()  # last: a signal handler may raise after anything else, and the lock would be held
        except BaseException as error:
            self._locks[me] -= 1
            if isinstance(error, HeapdError):
                raise failure_of(error) from None
            raise

    def unlock(self) -> None:
        """Raises: LockNotHeldError."""
        self.heap.unlock()
        me = get_ident()
        self._locks[me] = max(self._locks.get(me, 0) - 1, 0)

    def let_go(self) -> None:
        """At the end of the session: give up what HeapLock took in this thread."""
        for _ in range(self._locks.pop(get_ident(), 0)):
            with suppress(HeapdError):
                self.heap.unlock()

    # -- the whole heap ----------------------------------------------------------------------------------------------
    def validate(self, flags: int, address: int) -> bool:
        """Whether the block at `address` is in order, or the heap if that is 0."""
        if not address:
            return not self.call(flags, self.heap.validate)
        try:
            block = self.find(address)
        except Failure:
            return False
        return not self.call(flags, self.heap.validate, block)
