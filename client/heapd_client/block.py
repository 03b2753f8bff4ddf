"""A block: its bytes in this process, what is known of it, and the rule that no view outlives it.

A view must not dangle, so `free` and `realloc` are refused while one is alive. Every view is cut from an *exporter*
(exporter.py): it cannot be released while a memoryview, cast, slice or array made from it is alive, which is Python's
own buffer bookkeeping and costs nothing. The block's own `view` is told apart from what is derived of it by its
reference count.

A block knows its state word (`_word`): what the arena's word must be for the block to be this one. It is negated once a
handle was made, for then the next owner of the memory needs another generation; and 0 after free. That is all that
the hot path (hotpath.py) looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from sys import getrefcount
from typing import TYPE_CHECKING, Any

from heapd.errors import (
    BlockInUseError,
    ClosedError,
    DoubleFreeError,
    HeapdError,
    InvalidArgumentError,
    MissingExtraError,
    StaleHandleError,
)
from heapd.layout import RUN_WORD, SLAB_WORD, Handle, WordFormat

from .arguments import shown
from .exporter import IDLE, make_exporter, release_exporter

if TYPE_CHECKING:
    from pickle import PickleBuffer
    from types import TracebackType

    import numpy as np

    from .heap import Heap

__all__ = ["Block", "Visitor", "freed_elsewhere"]

_new_handle: Callable[..., Handle] = tuple.__new__  # without the Python function that the class calls
_RUN_GENERATION, _SLAB_GENERATION = RUN_WORD.generation_shift, SLAB_WORD.generation_shift
_OWN_REFERENCES = 2  # of an object that one local name alone refers to: the name, and getrefcount's argument


class Block:
    """Bytes in shared memory, as `Heap.alloc` gives them out or a handle leads to them.

    Dropping the object frees nothing: another process may use the block. `free` it, or leave a `with block:`.

    Attributes: heap; address (bytes from the arena's base, the same in every process); extent (bytes it occupies); slot
    (of its state word, see `Handle`).
    """

    __slots__ = (
        "_base",
        "_buffer",
        "_exporter",
        "_seen",
        "_tail",
        "_view",
        "_word",
        "address",
        "extent",
        "heap",
        "slot",
    )

    def __init__(self, heap: Heap, slot: int, address: int, extent: int, word: int) -> None:
        """For the library alone. `word` is the block's state word: BUSY, or CACHED and 0 is what `_word` becomes."""
        self.heap = heap
        self.slot = slot
        self.address = address
        self.extent = extent
        self._word = word
        self._base = 0  # the CACHED word that free stores; only in blocks that front ends deal with
        self._tail: tuple[int, int] | None = None  # see homing.Away
        self._view: memoryview | None = None
        self._exporter: memoryview | None = None
        self._buffer: PickleBuffer | None = None  # of the exporter; a memoryview of it has its own buffer bookkeeping
        self._seen: int | None = None  # `_word` when they were made

    def __repr__(self) -> str:
        state = f"size={self.size}" if self._word else "free"
        return f"<Block address={self.address:#x} {state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        from .registry import reopen_block

        self._check()
        return reopen_block, (str(self.heap.session.endpoint), tuple(self.handle))

    def _check(self) -> None:
        if self.is_free:
            raise ClosedError("the block has been freed")
        self.heap.check()

    @property
    def _form(self) -> WordFormat:
        return self.heap.mapping.shape.word_format(self.slot)

    @property
    def word(self) -> int:
        """The state word that the arena holds while the block is allocated; 0 once it was freed."""
        return abs(self._word)

    @property
    def word_here(self) -> int:
        """As `word` if no other object or process can know the block; else something that is no state word."""
        return self._word

    @property
    def is_free(self) -> bool:
        """True: freed through this object."""
        return not self._word

    @property
    def has_handle(self) -> bool:
        """A handle of it may be around: the memory's next block needs another generation."""
        return self._word < 0

    @property
    def size(self) -> int:
        """Bytes asked for; 0 once freed."""
        return self._form.size(abs(self._word))

    @property
    def generation(self) -> int:
        """Of the block, as in its handle."""
        word = abs(self._word)
        if self._word > 0:
            self._word = -word  # somebody may build a handle of it
            self.heap.note_handle(self, word)
        return word >> (_RUN_GENERATION if self.slot < self.heap.slabs else _SLAB_GENERATION)

    def become(self, slot: int, address: int, extent: int, word: int) -> None:
        """For Heap: this object stands for that allocated block from now on, or for the same one resized.
        A negative word: a handle may be around."""
        if (slot, extent) != (self.slot, self.extent):
            self._base, self._tail = 0, None  # they were of the block of before
        self.slot, self.address, self.extent, self._word = slot, address, extent, word

    def forget(self) -> None:
        """For Heap: the block was freed."""
        self._word = 0

    # -- bytes -------------------------------------------------------------------------------------------------------
    @property
    def handle(self) -> Handle:
        """What names the block in other processes; 40 bytes through `handle.encode()`, also picklable."""
        return _new_handle(Handle, (self.heap.mapping.instance, self.slot, self.address, self.generation))

    @property
    def view(self) -> memoryview:
        """The block's `size` bytes, writable; the same object each time, until it is released or the block resized.

        Raises: ClosedError after free or close; StaleHandleError if another process freed it; HeapDestroyedError;
                BlockInUseError if another process resized it while a view of before is alive here.
        """
        view = self._view
        if view is not None and self.heap.has_unchanged(self) and _is_alive(view):
            return view
        self._check()
        try:
            word = self.heap.word_of(self)
        except DoubleFreeError:
            raise freed_elsewhere(self) from None
        if word != self.word:
            del view  # a reference too many
            self.release_views()
            self.heap.note_resized(self, word)
        exporter = self._exporter
        if self._buffer is None or (exporter is not None and exporter.nbytes != self.size):
            exporter = None  # an interrupted call made it, or it is left from a life of another size
        if exporter is None:
            self._exporter, self._buffer = make_exporter(self.heap.mapping.base, self.address, self.size)
            self._seen = self._word
        assert self._buffer is not None
        view = self._view = memoryview(self._buffer)
        return view

    def ndarray(self, shape: int | tuple[int, ...], dtype: Any = "u1") -> np.ndarray[Any, Any]:
        """A numpy array over the block's first bytes; no copy. It counts as a view while it is alive.

        Args:   shape (an int or a tuple), dtype (anything numpy takes but Python objects).
        Raises: MissingExtraError without numpy; InvalidArgumentError if it does not fit the block.
        """
        try:
            import numpy as np
        except ImportError:
            raise MissingExtraError("numpy is not installed; install it with: pip install 'heapd[numpy]'") from None
        self._check()
        try:
            kind = np.dtype(dtype)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"{shown(dtype)} is no type that numpy knows: {error}") from None
        if kind.hasobject:
            raise InvalidArgumentError("an array of Python objects cannot be shared between processes")
        try:
            dimensions = (index(shape),) if not isinstance(shape, tuple) else tuple(map(index, shape))
        except TypeError:
            raise InvalidArgumentError("a shape is an int, or a tuple of ints") from None
        if any(length < 0 for length in dimensions):
            raise InvalidArgumentError(f"the shape {dimensions} has a negative length")
        count = 1
        for length in dimensions:
            count *= int(length)
        needed = count * kind.itemsize
        if needed > self.size:
            raise InvalidArgumentError(
                f"an array of shape {dimensions} and type {kind} takes {needed} bytes; the block has {self.size}"
            )
        view = self.view
        try:
            if needed == 0:
                return np.ndarray(dimensions, kind, buffer=view[:0])
            return np.frombuffer(view[:needed], kind.base).reshape(dimensions + kind.shape)
        except (ValueError, OverflowError) as error:
            raise InvalidArgumentError(f"numpy makes no array of shape {shown(dimensions)}: {error}") from None

    # -- life --------------------------------------------------------------------------------------------------------
    def realloc(self, size: int, *, zero: bool = False, in_place_only: bool = False) -> Block:
        """Resize the block, moving it if it cannot grow where it is; its first bytes stay what they were.

        A handle made before leads to the block where it was not moved, else it is stale.
        Args:    size (bytes), zero (bytes beyond the old size read as zero), in_place_only (rather fail than move).
        Returns: this object, updated.
        Raises:  BlockInUseError while a view is alive; HeapFullError, BlockTooLargeError, CannotResizeInPlaceError,
                 StaleHandleError, ClosedError, LockTimeoutError. The block is as it was then.
        """
        self._check()
        self.heap.realloc(self, size, zero=zero, in_place_only=in_place_only)
        return self

    def free(self) -> None:
        """Give the block back.

        Raises: BlockInUseError while a view, slice, cast or array of it is alive; DoubleFreeError, StaleHandleError
                if another process freed it; ClosedError if it was freed through this object; LockTimeoutError. The
                block is as it was then.
        """
        if self.is_free:
            raise ClosedError("the block has been freed")
        self.heap.free(self)

    def __enter__(self) -> Block:
        self._check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Free the block, if that has not been done. Its own view is released; derived ones are an error.

        An exception on its way is not replaced: then a block that cannot be freed stays, which a note of it says.
        """
        if self.is_free:
            return
        try:
            self.release_views(is_own_released=True)
            self.free()
        except HeapdError as fault:
            if error is None:
                raise
            error.add_note(f"heapd: the block at {self.address:#x} was not freed: {fault}")

    def release_views(self, *, is_own_released: bool = False) -> None:
        """See that no view of the block is alive, and that none can be made of those that were.

        Args:   is_own_released: True: release `view` whoever still refers to it.
        Raises: BlockInUseError; views stay as they are (but the own one, if it was to be released).
        """
        exporter = self._exporter
        if exporter is None:
            return
        view = self._view
        if view is not None:
            if not is_own_released and getrefcount(view) > _OWN_REFERENCES + 1 and _is_alive(view):
                raise self._in_use()
            try:
                view.release()
            except BufferError:
                raise self._in_use() from None
        # Slices and casts keep the exporter in use, and numpy.ndarray(buffer=view), which keeps no buffer open, does
        # refer to it. Until that is known `_view` stays, released: a signal handler may raise after any call, and a
        # block without a view is one that the hot path's free does not look at.
        if getrefcount(exporter) > IDLE + 1:
            raise self._in_use()
        view = self._view = self._exporter = self._buffer = self._seen = None
        release_exporter(exporter)

    def _in_use(self) -> BlockInUseError:
        return BlockInUseError(
            f"a view of the block at {self.address:#x} is alive; drop every view, slice and array of it first",
            address=self.address,
        )


class Visitor(Block):
    """A run of pages that another session allocated, opened by its handle. Its owner knows that a handle was made."""

    __slots__ = ()


def _is_alive(view: memoryview) -> bool:
    try:
        view.readonly  # noqa: B018
    except ValueError:
        return False
    return True


def freed_elsewhere(block: Block) -> StaleHandleError:
    """What to say of a block that another process freed, or whose slab or run has gone since."""
    return StaleHandleError(f"the block at {block.address:#x} was freed", address=block.address)
