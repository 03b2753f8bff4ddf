"""A block: its bytes in this process, what is known of it, and the rule that no view outlives it.

A view must not dangle, so `free` and `realloc` are refused while one is alive. Every view is cut from an *exporter*, a
memoryview of the block's bytes of its own: the exporter cannot be released while a memoryview, cast, slice or array
made from it is alive, which is Python's own buffer bookkeeping and costs nothing. The block's own `view` is told apart
from what is derived of it by its reference count.
"""

from __future__ import annotations

from pickle import PickleBuffer
from sys import getrefcount
from typing import TYPE_CHECKING, Any

from heapd.errors import BlockInUseError, ClosedError, HeapdError, InvalidArgumentError, MissingExtraError
from heapd.layout import Handle

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np

    from .heap import Heap

__all__ = ["Block"]

_OWN_REFERENCES = 2  # of an object that one local name alone refers to: the name, and getrefcount's argument


class Block:
    """Bytes in shared memory, as `Heap.alloc` gives them out or a handle leads to them.

    Dropping the object frees nothing: another process may use the block. `free` it, or leave a `with block:`.

    Attributes: heap; address (bytes from the arena's base, the same in every process); size (bytes asked for);
    extent (bytes it occupies); generation, slot (see `Handle`); is_free (True: freed through this object).
    """

    __slots__ = ("_exporter", "_view", "address", "extent", "generation", "heap", "is_free", "size", "slot")

    def __init__(self, heap: Heap, slot: int, address: int, generation: int, extent: int, size: int) -> None:
        """For the library alone."""
        self.heap = heap
        self.slot = slot
        self.address = address
        self.generation = generation
        self.extent = extent
        self.size = size
        self.is_free = False
        self._view: memoryview | None = None
        self._exporter: memoryview | None = None

    def __repr__(self) -> str:
        state = ", free" if self.is_free else ""
        return f"<Block address={self.address:#x} size={self.size} generation={self.generation}{state}>"

    def __reduce__(self) -> tuple[Any, ...]:
        from .registry import reopen_block

        self._check()
        return reopen_block, (str(self.heap.session.endpoint), tuple(self.handle))

    def _check(self) -> None:
        if self.is_free:
            raise ClosedError("the block has been freed")
        self.heap.check()

    # -- bytes -------------------------------------------------------------------------------------------------------
    @property
    def handle(self) -> Handle:
        """What names the block in other processes; 40 bytes through `handle.encode()`, also picklable."""
        return Handle(self.heap.mapping.instance, self.slot, self.address, self.generation)

    @property
    def view(self) -> memoryview:
        """The block's `size` bytes, writable; the same object each time, until it is released or the block resized.

        Raises: ClosedError after free or close; HeapDestroyedError.
        """
        view = self._view
        if view is not None and not self.is_free:
            try:
                view.readonly  # noqa: B018 - raises if the view was released by `with block.view` or `release()`
                return view
            except ValueError:
                pass
        self._check()
        exporter = self._exporter
        if exporter is None:
            exporter = self._exporter = self.heap.mapping.base[self.address : self.address + self.size]
        view = self._view = memoryview(PickleBuffer(exporter))
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
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise InvalidArgumentError("an array of Python objects cannot be shared between processes")
        dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
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
        if needed == 0:
            return np.ndarray(dimensions, kind, buffer=view[:0])
        return np.frombuffer(view, kind, count).reshape(dimensions)

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
        view, self._view = self._view, None
        if view is not None:
            if getrefcount(view) > _OWN_REFERENCES and not is_own_released and _is_alive(view):
                self._view = view
                raise self._in_use()
            try:
                view.release()
            except BufferError:
                self._view = view
                raise self._in_use() from None
            view = None
        # numpy.ndarray(buffer=view) keeps no buffer open, but does refer to the exporter: the count shows it.
        self._exporter = None
        try:
            if getrefcount(exporter) > _OWN_REFERENCES:
                raise self._in_use()
            exporter.release()
        except BufferError as error:
            self._exporter = exporter
            raise (error if isinstance(error, BlockInUseError) else self._in_use()) from None

    def _in_use(self) -> BlockInUseError:
        return BlockInUseError(
            f"a view of the block at {self.address:#x} is alive; drop every view, slice and array of it first",
            address=self.address,
        )


def _is_alive(view: memoryview) -> bool:
    try:
        view.readonly  # noqa: B018
    except ValueError:
        return False
    return True
