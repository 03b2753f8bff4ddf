"""One heap: blocks of any size over its space. Sizes up to 64 KiB round to a class, and come from slabs (slabpool.py);
larger ones are runs of pages.

A block is given out in two steps that a kill cannot come between for a client: the private record (`lent`, `runs`)
first, then one store of its state word. It is taken back in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

from heapd.arena import Arena
from heapd.errors import (
    BlockTooLargeError,
    CannotResizeInPlaceError,
    DoubleFreeError,
    HeapDestroyedError,
    HeapFullError,
    InvalidArgumentError,
    NotABlockError,
    StaleHandleError,
)
from heapd.heap.holdings import Holdings
from heapd.heap.slab import Slab
from heapd.heap.slabpool import SlabPool
from heapd.heap.space import BIG_PAGES, Space
from heapd.journal import NO_RUN, RUN
from heapd.layout import BUSY, CACHED, MAX_BLOCK_SIZE, RUN_WORD, SLAB_WORD, WordFormat
from heapd.records import Grant
from heapd.sizeclass import MAX_CLASS_SIZE, SizeClass, class_of
from heapd.units import GRANULE_PAGES, MIB, PAGE_SHIFT, PAGE_SIZE, align_up, format_size, pages_for

__all__ = ["Heap", "SLICE_BYTES"]

SLICE_BYTES = 16 * MIB  # 4 to 10 ms of commit; a larger block takes `alloc_in_slices`
SLICE_PAGES = SLICE_BYTES // PAGE_SIZE
_new_grant: Callable[..., Grant] = tuple.__new__  # without the Python function that the class calls
_SLAB_GENERATION = SLAB_WORD.generation_shift
_SLAB_GENERATIONS = SLAB_WORD.generation_mask
_FIRST_REGION_EXTRA = 64 * 1024  # a growable heap's first region: initial size and this (Win32 H-CREATE-09)


class Heap:
    """Blocks in the regions of one heap.

    Fields: index (of its control block), maximum (bytes, 0: growable), max_block (bytes, 0: none of its own),
    space, pool (of slabs), slabs (first page -> Slab: those of the pool), runs (first page -> page count),
    borrowers (first page of a run -> session it was lent to), held (bytes, by session), allocations and releases
    (totals).
    """

    def __init__(
        self, arena: Arena, index: int, *, initial: int = 0, maximum: int = 0, reserve: int = 0, max_block: int = 0
    ) -> None:
        """Args: initial, maximum, reserve (of a growable heap's first region; 0: initial + 64 KiB), max_block: bytes.

        Raises: InvalidArgumentError if initial exceeds maximum or the arena; HeapFullError. Nothing is reserved then.
        """
        if maximum and initial > maximum:
            raise InvalidArgumentError(
                f"the initial size ({format_size(initial)}) exceeds the maximum ({format_size(maximum)})"
            )
        if max(initial, maximum, reserve) > arena.shape.size:
            raise InvalidArgumentError(
                f"{format_size(max(initial, maximum, reserve))} is more than the whole arena"
                f" ({format_size(arena.shape.size)}); start the daemon with a larger --reserve"
            )
        self._set_up(arena, index, maximum, max_block)
        growable = align_up(pages_for(reserve or initial + _FIRST_REGION_EXTRA), GRANULE_PAGES)
        pages = pages_for(maximum) if maximum else growable
        self.space.open(pages, min(max(pages_for(initial), 1), pages))

    def _set_up(self, arena: Arena, index: int, maximum: int, max_block: int) -> None:
        self.arena = arena
        self.index = index
        self.maximum = maximum
        self.max_block = max_block
        self._note = arena.journal.note
        self._store = arena.journal.store
        self._largest = max_block or maximum or min(MAX_BLOCK_SIZE, arena.shape.size)
        self.space = Space(arena, index, maximum=maximum)
        self.pool = SlabPool(arena, index, self.space)
        self.slabs = self.pool.slabs
        self._lend, self._take_back = self.pool.lend, self.pool.take_back
        self.runs: dict[int, int] = {}
        self.borrowers: dict[int, int] = {}
        self.held = Holdings()
        self.unfinished: set[int] = set()  # first pages of runs whose commit goes on: nobody was given them yet
        self.allocations = 0
        self.releases = 0

    # -- alloc -------------------------------------------------------------------------------------------------------
    def alloc(self, size: int, session: int) -> Grant:
        """Give out a block of `size` bytes as allocated by `session`.

        Raises: BlockTooLargeError, HeapFullError; nothing has changed.
        """
        if size > self._largest:
            self.check_size(size)
        if size <= MAX_CLASS_SIZE:
            kind = class_of(size)
            if not kind.is_run:
                return self._alloc_small(kind, size, session)
            return self._alloc_run(kind.page_count, size, session)
        return self._alloc_run(pages_for(size), size, session)

    def alloc_in_slices(self, size: int, session: int) -> Generator[None, None, Grant]:
        """As alloc, for blocks over SLICE_BYTES: yields between slices of its commit.

        Raises: as alloc; HeapDestroyedError if the heap was closed meanwhile. Nothing has changed, nor when the job is
        dropped. Until it ends no free, resize or reap reaches the block: its pages are not all committed.
        """
        self.check_size(size)
        page_count = pages_for(size)
        first = self._take_run(page_count)
        fresh = self.arena.committed_in(first, page_count) == 0
        self.unfinished.add(first)
        try:
            self.arena.pages.map_edges(first, page_count)
            grant = self._finish_run(first, page_count, size, session, fresh=fresh)
            for at in range(first, first + page_count, SLICE_PAGES):
                count = min(SLICE_PAGES, first + page_count - at)
                self.space.commit(at, count)
                self.space.describe_run(first, count, at)
                yield
                if self.space.is_closed:
                    raise HeapDestroyedError("the heap was destroyed while the block was committed")
            self._note((RUN, self.index, first, page_count, 1))
        except (HeapFullError, GeneratorExit):
            if not self.space.is_closed:
                if first in self.runs:
                    self._forget_run(first)
                    self.releases += 1
                    self._note((NO_RUN, self.index, first))
                    self._store(grant.slot, RUN_WORD.free(grant.generation))
                self._give_run(first, page_count)
            raise
        finally:
            self.unfinished.discard(first)
        return grant

    def lease(self, size: int, count: int, session: int, others: Sequence[int] = ()) -> list[Grant]:
        """Lend up to `count` blocks for `size` bytes each, and one for each size of `others`: as alloc, but their
        words say CACHED.

        Returns: in that order; at least one, and as many as there is memory for.
        Raises:  as alloc, if there is not even one.
        """
        grants: list[Grant] = []
        words = self.arena.words
        try:
            for wanted in (*[size] * count, *others):
                grant = self.alloc(wanted, session)
                form = self.arena.shape.word_format(grant.slot)
                words[grant.slot] = form.cached(session, grant.generation)
                grants.append(grant)
        except (HeapFullError, BlockTooLargeError):
            if not grants:
                raise
        return grants

    def give_back(
        self,
        address: int,
        session: int,
        is_live: Callable[[int], bool] = lambda number: True,
        generation: int | None = None,
    ) -> bool:
        """Take back a block that `session` caches, or one that is not alive; False, and no change, if it is none, or
        has another generation."""
        try:
            slab, index, slot = self.locate(address)
        except ValueError:
            return False
        word, form = self.arena.words[slot], self.arena.shape.word_format(slot)
        owner = form.session(word)
        if form.state(word) != CACHED or (owner != session and is_live(owner)):
            return False
        if generation is not None and form.generation(word) != generation:
            return False
        self.take_back(slab, index, slot)
        return True

    def check_size(self, size: int) -> None:
        """Raises: BlockTooLargeError if no block of `size` bytes can ever come from this heap."""
        if size > self._largest:
            raise BlockTooLargeError(
                f"{format_size(size)} requested; a block of this heap has at most {format_size(self._largest)}",
                limit=self._largest,
            )

    def _alloc_small(self, kind: SizeClass, size: int, session: int) -> Grant:
        slab, index = self._lend(kind, session)
        extent = slab.kind.extent
        self.held.charge(session, extent)
        self.allocations += 1
        slot = slab.slot + index
        words = self.arena.words
        generation = (words[slot] >> _SLAB_GENERATION) + 1 & _SLAB_GENERATIONS or 1
        words[slot] = SLAB_WORD.busy(session, generation, size)
        return _new_grant(Grant, (slot, slab.base + index * extent, generation, extent, False))

    def _alloc_run(self, page_count: int, size: int, session: int) -> Grant:
        first = self._take_run(page_count)
        try:
            fresh = self.space.commit(first, page_count)
        except HeapFullError:
            self._give_run(first, page_count)
            raise
        return self._finish_run(first, page_count, size, session, fresh=fresh)

    def _take_run(self, page_count: int) -> int:
        if page_count >= BIG_PAGES and not self.maximum:
            return self.space.take_big(page_count)
        return self.pool.take_pages(page_count)

    def _give_run(self, first: int, page_count: int) -> None:
        if self.space.is_big(first):
            self.space.give_big(first)
        else:
            self.space.give(first, page_count)

    def _finish_run(self, first: int, page_count: int, size: int, session: int, *, fresh: bool) -> Grant:
        self.space.describe_run(first, page_count, first)
        self.runs[first] = page_count
        self.borrowers[first] = session
        self.held.charge(session, page_count << PAGE_SHIFT)
        self._note((RUN, self.index, first, page_count, int(first not in self.unfinished)))
        self.allocations += 1
        slot = self.arena.shape.run_slot(first)
        words = self.arena.words
        generation = RUN_WORD.next_generation(RUN_WORD.generation(words[slot]))
        words[slot] = RUN_WORD.busy(session, generation, size)
        return Grant(slot, first << PAGE_SHIFT, generation, page_count << PAGE_SHIFT, fresh)

    # -- free --------------------------------------------------------------------------------------------------------
    def free(self, address: int, generation: int) -> None:
        """Take back the allocated block that begins at `address`.

        Raises: NotABlockError, DoubleFreeError, StaleHandleError; nothing has changed.
        """
        self.take_back(*self.check_free(address, generation))

    def check_free(self, address: int, generation: int) -> tuple[Slab | None, int, int]:
        """Raise what `free` would, and change nothing. Returns: what `take_back` needs to free it."""
        slab, index, slot = self.locate(address)
        self._check_busy(slot, generation, address)
        return slab, index, slot

    def take_back(self, slab: Slab | None, index: int, slot: int) -> None:
        """Take back a block that `locate` found, whatever its word says."""
        form = RUN_WORD if slab is None else SLAB_WORD
        self._store(slot, form.free(form.generation(self.arena.words[slot])))
        self.releases += 1
        if slab is None:
            page_count = self._forget_run(index)
            self._note((NO_RUN, self.index, index))
            self._give_run(index, page_count)
        else:
            self.held.charge(self._take_back(slab, index), -slab.kind.extent)

    def _forget_run(self, first: int) -> int:
        """A run is lent no longer; its pages."""
        page_count = self.runs.pop(first)
        self.held.charge(self.borrowers.pop(first), -page_count << PAGE_SHIFT)
        return page_count

    def tidy(self) -> None:
        """For who looks at the heap: with nothing lent it is as a heap just made, without parked slabs."""
        if self.allocations == self.releases:
            self.pool.drop_empty()

    def locate(self, address: int) -> tuple[Slab | None, int, int]:
        """The lent block that begins at `address`: (slab or None for a run, index or first page, slot).

        Raises: NotABlockError; DoubleFreeError if it is a block that was taken back.
        """
        page = address >> PAGE_SHIFT
        slab = self.pool.at(page)
        if slab is not None:
            index = slab.index_of(address)
            if index is None or index >= slab.carved:
                raise NotABlockError(f"no block begins at address {address:#x}")
            if not slab.lent[index]:
                raise DoubleFreeError(f"the block at {address:#x} is free already")
            return slab, index, slab.slot + index
        if address & (PAGE_SIZE - 1) or page not in self.runs or page in self.unfinished:
            if self._was_run(address, page):
                raise DoubleFreeError(f"the block at {address:#x} is free already")
            raise NotABlockError(f"no block begins at address {address:#x}")
        return None, page, self.arena.shape.run_slot(page)

    def _was_run(self, address: int, page: int) -> bool:
        """True if the last run that began at `page` was freed and its pages are spare since."""
        region = self.space.find_region(page)
        if region is None or address & (PAGE_SIZE - 1) or region.is_big:
            return False
        if not any(start <= page < start + count for start, count in self.space.spare):
            return False
        return RUN_WORD.generation(self._run_word(page)) > 0

    def _run_word(self, page: int) -> int:
        word: int = self.arena.words[self.arena.shape.run_slot(page)] if self.arena.pages.is_mapped(page >> 9) else 0
        return word

    def _check_busy(self, slot: int, generation: int, address: int) -> int:
        """The state word at `slot`, if it is of a busy block of that generation."""
        word: int = self.arena.words[slot]
        form = self.arena.shape.word_format(slot)
        if form.state(word) != BUSY:
            raise DoubleFreeError(f"the block at {address:#x} is free already")
        if form.generation(word) != generation:
            raise StaleHandleError(
                f"the block at {address:#x} was freed and given out again: the handle is of generation {generation},"
                f" the block of {form.generation(word)}"
            )
        return word

    # -- resize ------------------------------------------------------------------------------------------------------
    def resize(self, address: int, generation: int, size: int, *, in_place_only: bool, session: int = 0) -> Grant:
        """Change a block's size where it is; its generation stays, and its session unless another one is to have it.

        Unless `in_place_only`, a shrink of a slab block to less than half of its extent is refused, too: moving it
        saves more than the copy costs.

        Raises: as free; CannotResizeInPlaceError, BlockTooLargeError, HeapFullError; the block is as it was.
        """
        self.check_size(size)
        slab, index, slot = self.locate(address)
        word = self._check_busy(slot, generation, address)
        if slab is None:
            extent = self._resize_run(index, size) << PAGE_SHIFT
            form: WordFormat = RUN_WORD
        else:
            extent = slab.kind.extent
            form = SLAB_WORD
            if size > extent or (not in_place_only and class_of(size).extent * 2 < extent):
                raise CannotResizeInPlaceError(
                    f"the block at {address:#x} has room for {format_size(extent)}, not for {format_size(size)}"
                )
        self.arena.journal.restate(slot, form.busy(session or form.session(word), generation, size))
        return Grant(slot, address, generation, extent, False)

    def _resize_run(self, first: int, size: int) -> int:
        """Make a run the right number of pages for `size`; that number."""
        have, need = self.runs[first], max(pages_for(size), 1)
        is_big = self.space.is_big(first)
        if need < have:
            self.arena.pages.map_edges(first + need, have - need)
            self.runs[first] = need
            self._note((RUN, self.index, first, need, 1))
            if is_big:
                self.space.trim_big(first, need)
            else:
                self.space.give(first + need, have - need)
        elif need > have:
            if need - have > SLICE_PAGES:
                raise CannotResizeInPlaceError(
                    f"a block grows in place by at most {format_size(SLICE_BYTES)} at once; more would stall everybody"
                )
            grown = self.space.extend_big(first, need) if is_big else self.space.take_at(first + have, need - have)
            if not grown:
                raise CannotResizeInPlaceError(
                    f"the block at {first << PAGE_SHIFT:#x} cannot grow: what follows it is taken"
                )
            try:
                self.space.commit(first + have, need - have)
            except HeapFullError:
                if is_big:
                    self.space.trim_big(first, have)
                else:
                    self.space.give(first + have, need - have)
                raise
            self.runs[first] = need
            self._note((RUN, self.index, first, need, 1))
            self.space.describe_run(first, need, first)
        self.held.charge(self.borrowers[first], need - have << PAGE_SHIFT)
        return need

    # -- whole heap --------------------------------------------------------------------------------------------------
    def owns(self, address: int) -> bool:
        """True if `address` lies in a region of this heap."""
        return self.space.find_region(address >> PAGE_SHIFT) is not None

    def compact(self) -> Generator[None, None, int]:
        """Decommit what is free, yielding between slices; returns bytes of the largest committed free extent before.

        Free pages are coalesced already when they are given back; nothing moves.
        """
        self.pool.drop_empty()
        largest = max(self.space.largest_committed() << PAGE_SHIFT, self.pool.largest_free)
        while self.space.decommit_spare():
            yield
        return largest

    def lent_slots(self) -> Iterator[tuple[int, int]]:
        """(slot, address) of every block given out; blocks may be taken back meanwhile."""
        for slab in list(self.slabs.values()):
            extent, base, slot = slab.kind.extent, slab.base, slab.slot
            for index in range(slab.carved):
                if slab.lent[index] and self.slabs.get(slab.first_page) is slab:
                    yield slot + index, base + index * extent
        for first in list(self.runs):
            if first in self.runs and first not in self.unfinished:
                yield self.arena.shape.run_slot(first), first << PAGE_SHIFT

    def close(self) -> None:
        """Give every page back, whatever is allocated."""
        self.space.close()
        self.pool.clear()
        self.runs.clear()
        self.borrowers.clear()
        self.held.clear()
