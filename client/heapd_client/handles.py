"""From a handle or an address to its block, in the mapping alone.

A handle comes from another process, maybe long ago, maybe made up. So each step checks before it touches the next:
is the page committed and a slab's or run's, is there a state word, is it busy with that generation, does a block of
the class begin at that address. Pages may change their use between two steps; what was read from them is then some
other block's word, whose generation differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from heapd.errors import InvalidArgumentError, NotABlockError, StaleHandleError
from heapd.layout import (
    BUSY,
    KIND_RUN,
    KIND_SLAB,
    PAGE_COMMITTED,
    RUN_WORD,
    WORD,
    Handle,
    PageInfo,
    slab_class_index,
)
from heapd.sizeclass import CLASS_COUNT, CLASSES, SizeClass
from heapd.units import PAGE_SHIFT, PAGE_SIZE, pages_for

if TYPE_CHECKING:
    from .mapping import Mapping

__all__ = ["Located", "checked_handle", "locate", "locate_at", "stale", "was_block"]

_SLOT_SHIFT: Final = PAGE_SHIFT - 3  # pages to slots


class Located(NamedTuple):
    """What the mapping says of a busy block: size and extent in bytes, control_index of its heap."""

    size: int
    extent: int
    control_index: int


def checked_handle(handle: Handle | bytes) -> Handle:
    """A handle whose fields are of the right types, from one or from its 40 bytes. Raises: InvalidArgumentError."""
    if isinstance(handle, (bytes, bytearray, memoryview)):
        try:
            return Handle.decode(bytes(handle))
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from None
    if not isinstance(handle, tuple) or tuple(map(type, handle)) != (bytes, int, int, int):
        raise InvalidArgumentError(f"a Handle, or the 40 bytes of one, is needed, not {type(handle).__name__}")
    return Handle(*handle)


def stale(handle: Handle) -> StaleHandleError:
    return StaleHandleError(f"the block at {handle.address:#x} that the handle names was freed", address=handle.address)


def locate(arena: Mapping, handle: Handle) -> Located:
    """The busy block that `handle` names.

    Raises: StaleHandleError if it was freed, or is of another arena; NotABlockError if the state word is right and
            the address is not; InvalidArgumentError if slot or address lie where no block can be.
    """
    shape, slot, address = arena.shape, handle.slot, handle.address
    if handle.instance != arena.instance:
        raise StaleHandleError(f"the handle is of another arena than {arena.name}")
    if not 0 <= address < arena.size or not 0 <= slot < arena.size // WORD:
        raise InvalidArgumentError("the handle points beyond the arena")
    is_run = shape.is_run_slot(slot)
    page = slot - shape.run_words // WORD if is_run else slot >> _SLOT_SHIFT
    if not shape.first_page <= page < shape.page_count:
        raise InvalidArgumentError("the handle points into the arena's tables")
    info = arena.page(page)
    if info.state != PAGE_COMMITTED or info.kind != (KIND_RUN if is_run else KIND_SLAB):
        raise stale(handle)
    block = _run_at(arena, page, info.start) if is_run else _slab_block_at(arena, slot, info.start)
    if block is None:
        raise stale(handle)
    word: int = arena.words[slot]
    form = shape.word_format(slot)
    if form.state(word) != BUSY or form.generation(word) != handle.generation:
        raise stale(handle)
    start, extent = block
    if start != address:
        raise NotABlockError(f"no block begins at address {address:#x}", address=address)
    size = form.size(word)
    return Located(size, extent or _run_extent(size), info.heap)


def locate_at(arena: Mapping, address: int) -> tuple[Handle, Located]:
    """The busy block that begins at `address` now: its handle, and what `locate` says of that.

    Raises: NotABlockError if none does; InvalidArgumentError if it lies beyond the arena.
    """
    info = arena.find_page(address)
    if info is None:
        raise InvalidArgumentError(f"the address {address:#x} is beyond the arena", address=address)
    found = _find_slot(arena, address, info)
    if found is not None:
        slot, extent = found
        form, word = arena.shape.word_format(slot), arena.words[slot]
        if form.state(word) == BUSY:
            size = form.size(word)
            handle = Handle(arena.instance, slot, address, form.generation(word))
            return handle, Located(size, extent or _run_extent(size), info.heap)
    raise NotABlockError(f"no allocated block begins at address {address:#x}", address=address)


def was_block(arena: Mapping, address: int) -> bool:
    """Whether a block begins, or began, at `address`, as far as can be told where none is allocated."""
    info = arena.find_page(address)
    if info is None:
        return False
    page, rest = divmod(address, PAGE_SIZE)
    if info.kind in (KIND_SLAB, KIND_RUN):
        return _find_slot(arena, address, info) is not None
    if rest or not arena.is_run_word_ready(page):
        return False
    return RUN_WORD.generation(arena.words[arena.shape.run_slot(page)]) > 0


def _find_slot(arena: Mapping, address: int, info: PageInfo) -> tuple[int, int] | None:
    """(slot of the state word, extent or 0 for a run) of what may begin at `address`, in a page of that kind; None if
    no block does."""
    if info.state != PAGE_COMMITTED:
        return None
    if info.kind == KIND_RUN:
        is_first = address == info.start << PAGE_SHIFT and arena.is_run_word_ready(info.start)
        return (arena.shape.run_slot(info.start), 0) if is_first else None
    shape = _slab_shape_at(arena, info.start) if info.kind == KIND_SLAB else None
    if shape is None:
        return None
    number, rest = divmod(address - (info.start << PAGE_SHIFT) - shape.first_offset, shape.extent)
    if rest or not 0 <= number < shape.block_count:
        return None
    return (info.start << _SLOT_SHIFT) + 1 + number, shape.extent


def _run_at(arena: Mapping, page: int, start: int) -> tuple[int, int] | None:
    """(address, 0: the extent follows from the size) of the run that begins at `page`; None if none does."""
    if page != start or not arena.is_run_word_ready(page):
        return None
    return page << PAGE_SHIFT, 0


def _slab_block_at(arena: Mapping, slot: int, start: int) -> tuple[int, int] | None:
    """(address, extent) of the block whose state word is at `slot`, in the slab that begins at page `start`; None if
    no state word is there."""
    shape = _slab_shape_at(arena, start)
    number = slot - (start << _SLOT_SHIFT) - 1
    if shape is None or not 0 <= number < shape.block_count:
        return None
    return (start << PAGE_SHIFT) + shape.first_offset + number * shape.extent, shape.extent


def _slab_shape_at(arena: Mapping, start: int) -> SizeClass | None:
    """The size class of the slab that begins at page `start`; None if none does."""
    if not arena.is_committed(start):
        return None
    class_index = slab_class_index(arena.words[start << _SLOT_SHIFT])
    if class_index is None or class_index >= CLASS_COUNT or CLASSES[class_index].is_run:
        return None
    return CLASSES[class_index]


def _run_extent(size: int) -> int:
    """Bytes that a run for `size` bytes occupies."""
    return max(pages_for(size), 1) << PAGE_SHIFT
