"""The part of a heap that resizes blocks: where they are, by a state word, or by a move that happens at once or not.

A block that its extent has room for is resized here. The daemon resizes runs, as long as pages behind them are spare.
Else the block moves: another one is allocated, the bytes are copied, and the old one is freed, by stores alone, so that
no signal handler gets in between the end of the one and the other's being known.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident

from heapd.errors import CannotResizeInPlaceError, HeapFullError, NotABlockError
from heapd.layout import RUN_WORD
from heapd.sizeclass import class_of
from heapd.units import MIB, PAGE_SHIFT, pages_for
from heapd.wire import messages as ask

from .allocating import AllocatingHeap
from .arguments import as_size
from .block import Block, Visitor, freed_elsewhere
from .frontend import Freeing
from .heapcore import working

__all__ = ["ResizingHeap"]


class ResizingHeap(AllocatingHeap):
    """The part of Heap that resizes; see Heap."""

    def realloc(self, block: Block, size: int, *, zero: bool = False, in_place_only: bool = False) -> Block:
        """Resize a block of this heap; see Block.realloc."""
        size = as_size(size)
        try:
            return self._realloc(block, size, zero, in_place_only)
        except HeapFullError as shortage:
            return self.session.retry(shortage, lambda: self._realloc(block, size, zero, in_place_only))

    def _realloc(self, block: Block, size: int, zero: bool, in_place_only: bool) -> Block:
        self.check()
        self._check_own(block)
        block.release_views()
        with self._hold():
            self._count()
            old_size = self.mapping.shape.word_format(block.slot).size(self.word_of(block))
            if not self._resize_here(block, size, in_place_only):
                self._resize_there(block, old_size, size, in_place_only)
            if zero and size > old_size:
                self.mapping.zero(block.address + old_size, size - old_size)
        return block

    def _resize_here(self, block: Block, size: int, in_place_only: bool) -> bool:
        """Resize within what the block occupies by storing its word; False if that is not possible, or too wasteful."""
        if not self.session.has_front_ends:
            return False
        form = self.mapping.shape.word_format(block.slot)
        with self._gate:  # so that the session does not end in between
            self.check()
            word = self.word_of(block)
            extent = self.extent_of(block, word)
            if size > extent or not self._is_ours_to_cache(word, block):
                return False
            if form is RUN_WORD and max(pages_for(size), 1) << PAGE_SHIFT != extent:
                return False
            if not in_place_only and self._would_waste(block, size):
                return False
            word = form.busy(form.session(word), form.generation(word), size)
            own = -word if block.has_handle else word
            self._words[block.slot] = word
            block.become(block.slot, block.address, extent, own)
            _keep_from_reopening(block)
        return True

    def note_resized(self, block: Block, word: int) -> None:
        """For Block: another process resized the block. Args: word (its state word now)."""
        block.become(block.slot, block.address, self.extent_of(block, word), -word)
        _keep_from_reopening(block)

    def can_grow_here(self, block: Block, size: int) -> bool:
        """Whether a block may have `size` bytes where it is: a run, for all we know, or one of a slab in its extent."""
        return block.slot < self.slabs or size <= block.extent

    def _would_waste(self, block: Block, size: int) -> bool:
        """Whether a block of a slab would use less than half of what it occupies, which it has room for: the daemon
        resizes none so."""
        return block.slot >= self.slabs and class_of(size).extent * 2 < block.extent

    def _resize_there(self, block: Block, old_size: int, size: int, in_place_only: bool) -> None:
        """Have the daemon resize the block, or move it."""
        if not in_place_only and (not self.can_grow_here(block, size) or self._would_waste(block, size)):
            self._move(block, old_size, size)
            return
        try:
            request = ask.HeapResize(self.id, block.address, block.generation, size, in_place_only)
            grant = self.session.call_for_memory(request, self.id)
        except CannotResizeInPlaceError:
            if in_place_only:
                raise
            self._move(block, old_size, size)
        except NotABlockError:
            raise freed_elsewhere(block) from None
        else:
            slot, address, _, extent, _ = grant
            self.away.forget(slot)
            self.note_growth(extent - block.extent)
            block.become(slot, address, extent, -self._words[slot])
            self.note_handle(block, block.word)
            self.mapping.protect(block.address, max(block.extent, 1), executable=self.is_executable)

    def _move(self, block: Block, old_size: int, size: int) -> None:
        """Make `block` a larger or smaller one elsewhere, with the same first bytes."""
        new, freeing = self._prepare_move(block, old_size, size)
        # Nothing is called here: no signal handler gets in between.
        self._words[block.slot] = freeing.freed
        shelf = freeing.shelf
        shelf += (freeing.entry,)
        block.slot, block.address, block.extent, block._word = new.slot, new.address, new.extent, -new._word
        block._base, block._tail = 0, None
        self.note_handle(block, block.word)

    def replace(self, block: Block, size: int, fill: Callable[[int], None], *, serialize: bool = True) -> Block:
        """Another block of `size` bytes with the same first bytes for this one, which is freed.

        All or nothing, whatever a signal handler raises: nothing is called between the last thing that can fail and the
        return, so that who calls this and keeps what it returns can rely on the exception, too: then `block` is as it
        was.
        Args:   fill (is called with the new block's address, before anybody can know of it), serialize (False: without
                the mutex, as in `unserialized`).
        Raises: as alloc; BlockInUseError, StaleHandleError, ClosedError.
        """
        try:
            return self._replace(block, size, fill, serialize)
        except HeapFullError as shortage:
            return self.session.retry(shortage, lambda: self._replace(block, size, fill, serialize))

    def _replace(self, block: Block, size: int, fill: Callable[[int], None], serialize: bool) -> Block:
        self.check()
        self._check_own(block)
        block.release_views()
        mutex, is_held = self._mutex, serialize and self._takes_mutex
        lease, mark = mutex.lease(), mutex.mark()
        try:
            if is_held:
                mutex.acquire(self.session.timeout)
                self._count()
            old_size = self.mapping.shape.word_format(block.slot).size(self.word_of(block))
            new, freeing = self._prepare_move(block, old_size, size, fill)
        except BaseException:
            if is_held:
                mutex.unwind(mark)
            raise
        # Nothing is called from here on, not even to give up the mutex.
        self._words[block.slot] = freeing.freed
        shelf = freeing.shelf
        shelf += (freeing.entry,)
        block._word = 0
        if is_held:
            del lease.held
        return new

    def _prepare_move(
        self, block: Block, old_size: int, size: int, fill: Callable[[int], None] | None = None
    ) -> tuple[Block, Freeing]:
        """All of a move that can fail: another block with the same first bytes, and what is left to do to free this
        one, at once. Raises: as alloc; nothing has changed then."""
        new = None
        try:
            new = self._alloc(size, False)
            self.mapping.copy(new.address, block.address, min(old_size, size))
            if fill is not None:
                fill(new.address)
            while True:
                freeing = self._prepare_free(block)
                if freeing is None:
                    self._take_over(block, old_size)
                    continue
                # Another thread may have had the caches given back since, or the heap may have gone.
                if (
                    self._words[self.live_slot] == self._live_word
                    and self._words[block.slot] == freeing.word
                    and freeing.front is self._front
                ):
                    return new, freeing
        except BaseException:
            if new is not None:
                self._regret(new)
                if block.has_handle:
                    self.note_handle(block, block.word)  # again
            raise

    def _take_over(self, block: Block, size: int) -> None:
        """Have a block of another session be this one's, so that one store of its word frees it. Args: size (its own).

        Leaving that to the daemon, for some later call, would let who else has a handle free it or move it once more.
        """
        try:
            self.session.call(ask.HeapResize(self.id, block.address, block.generation, size, True))
        except NotABlockError:
            raise freed_elsewhere(block) from None
        self.note_growth(block.extent)

    def _prepare_free(self, block: Block) -> Freeing | None:
        """All of a free but what needs no call; None if the block is another session's in a heap that frees orphans."""
        with self._enter():
            word, front = self.word_of(block), self._front_end()
            self.away.forget(block.slot)
            if not self._is_ours_to_cache(word, block):
                return None
            if front is None or (self.releases_large and block.extent >= MIB) or get_ident() in working:
                self.note_growth(-block.extent)
                form = self.mapping.shape.word_format(block.slot)
                generation = form.next_generation(form.generation(word))
                freed = form.cached(self.session.number, generation)
                return Freeing(front, word, freed, self.session.strays, (self.id, block.address, -generation))
            return front.prepare_free(block, word)


def _keep_from_reopening(block: Block) -> None:
    """Its views are of another size than when it was opened: it is not to be opened again as it is."""
    if isinstance(block, Visitor):
        block._base = 0
