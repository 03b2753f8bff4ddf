"""One heap: blocks of any size over its space. Sizes up to 64 KiB round to a class; larger ones are runs of pages.

A block is given out in two steps that a kill cannot come between for a client: the private record (`lent`, `runs`)
first, then one store of its state word. It is taken back in the opposite order.
"""

from __future__ import annotations

from bisect import insort
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
from heapd.heap.space import BIG_PAGES, Space
from heapd.journal import BLOCK_SHIFT, NO_RUN, NO_SLAB, RUN, SLAB, SLAB_CUT
from heapd.layout import BUSY, CACHED, KIND_SLAB, MAX_BLOCK_SIZE, RUN_WORD, SLAB_WORD, WordFormat
from heapd.records import Grant
from heapd.sizeclass import CLASSES, HOLLOW_EXTENT, MAX_CLASS_SIZE, SizeClass, class_of
from heapd.units import GRANULE_PAGES, MIB, PAGE_SHIFT, PAGE_SIZE, align_up, format_size, pages_for

__all__ = ["Heap", "SLICE_BYTES"]

SLICE_BYTES = 16 * MIB  # 4 to 10 ms of commit; a larger block takes `alloc_in_slices`
SLICE_PAGES = SLICE_BYTES // PAGE_SIZE
_new_grant: Callable[..., Grant] = tuple.__new__  # without the Python function that the class calls
_SLAB_GENERATION = SLAB_WORD.generation_shift
_SLAB_GENERATIONS = SLAB_WORD.generation_mask
_LONG_SLAB = 4  # pages; making a slab this long for one block costs more than a block of the next class
_MAX_STRETCH = 2  # where memory is short, a block may have room for so many times what was asked for
_PARKED_PAGES = 4  # arbitrary: what an empty slab may keep committed
_FIRST_REGION_EXTRA = 64 * 1024  # a growable heap's first region: initial size and this (Win32 H-CREATE-09)


class Heap:
    """Blocks in the regions of one heap.

    Fields: index (of its control block), maximum (bytes, 0: growable), max_block (bytes, 0: none of its own), space,
    slabs (first page -> Slab), runs (first page -> page count), borrowers (first page of a run -> session it was lent
    to), held (bytes, by session), allocations and releases (totals).
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
        # A class's slabs with a block to give, lowest address first: so blocks gather in few slabs and others empty.
        self.partial: list[list[Slab]] = [[] for _ in CLASSES]
        self.slabs: dict[int, Slab] = {}
        self.runs: dict[int, int] = {}
        self.borrowers: dict[int, int] = {}
        self.held = Holdings()
        self.unfinished: set[int] = set()  # first pages of runs whose commit goes on: nobody was given them yet
        self.allocations = 0
        self.releases = 0
        self._slab_of_page: dict[int, Slab] = {}
        self._parked: dict[int, Slab] = {}  # class index -> a slab that was left empty, and may be in use again

    # -- alloc -------------------------------------------------------------------------------------------------------
    def alloc(self, size: int, session: int) -> Grant:
        """Give out a block of `size` bytes as allocated by `session`.

        Raises: BlockTooLargeError, HeapFullError; nothing has changed.
        """
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
        partial = self.partial[kind.index]
        slab = partial[0] if partial and partial[0].free else self._slab_with_room(kind)
        kind = slab.kind
        index = slab.lend(session)
        if slab.lent_count == slab.block_count:
            self.partial[kind.index].remove(slab)
        self.held.charge(session, kind.extent)
        self.allocations += 1
        self._note(slab.first_page << BLOCK_SHIFT | index)
        slot = slab.slot + index
        words = self.arena.words
        generation = (words[slot] >> _SLAB_GENERATION) + 1 & _SLAB_GENERATIONS or 1
        words[slot] = SLAB_WORD.busy(session, generation, size)
        return _new_grant(Grant, (slot, slab.base + index * kind.extent, generation, kind.extent, False))

    def _slab_with_room(self, kind: SizeClass) -> Slab:
        """A slab that can give a block for the class: one with a free block, or a hollow one, whose pages are committed
        now; else with pages to carve, else one of the next larger class with a free block, else a new one; where there
        is no memory for that, one of any larger class whose blocks are not too large. Raises: HeapFullError."""
        partial = self.partial[kind.index]
        if not partial and kind.page_count >= _LONG_SLAB:
            larger = self.partial[kind.index + 1]
            if larger and larger[0].free:
                return larger[0]
        try:
            slab = partial[0] if partial else self._new_slab(kind)
            if slab.hollow and not slab.free:
                self._fill(slab)
            if not slab.free:
                # Of the slabs with room at most one or two still have pages to carve.
                if len(partial) > 1 and partial[1].free:
                    return partial[1]
                touched, needed = slab.pages_touched if slab.carved else 1, slab.pages_until(slab.carved + 1)
                if needed > touched:
                    self._commit_slab(slab, touched, needed)
        except HeapFullError:
            other = self._ready_slab(kind)
            if other is None:
                raise
            return other
        return slab

    def _ready_slab(self, kind: SizeClass) -> Slab | None:
        """A slab that needs no memory to give a block for the class, or for one up to twice as large."""
        for larger in CLASSES[kind.index :]:
            if larger.extent > _MAX_STRETCH * kind.extent:
                return None
            for slab in self.partial[larger.index]:
                if slab.is_ready:
                    return slab
        return None

    def _commit_slab(self, slab: Slab, touched: int, needed: int) -> None:
        first = slab.first_page + touched
        try:
            self.space.commit(first, needed - touched)
        except HeapFullError:
            if not slab.lent_count:
                self._drop_slab(slab)
            raise
        self.arena.describe(first, needed - touched, KIND_SLAB, self.index, slab.first_page)

    def _hollow_out(self, slab: Slab) -> None:
        """Decommit the pages that the block taken back last had to itself."""
        self.space.decommit_in_slab(*slab.own_pages(slab.free[-1]), slab.first_page)
        slab.hollow.append(slab.free.pop())

    def _fill(self, slab: Slab) -> None:
        """Commit the pages of a hollow block, so that it can be given out. Raises: HeapFullError, nothing changed."""
        first, page_count = slab.own_pages(slab.hollow[-1])
        self.space.commit(first, page_count)
        self.arena.describe(first, page_count, KIND_SLAB, self.index, slab.first_page)
        slab.free.append(slab.hollow.pop())

    def _new_slab(self, kind: SizeClass) -> Slab:
        first, page_count = self._take_slab(kind)
        slab = Slab(kind, first, page_count)
        try:
            self.space.commit(first, 1)
        except HeapFullError:
            self.space.give(first, page_count)
            raise
        # A slab that was dropped to make room for this one may have lain here.
        self.arena.journal.withdraw(slab.slot - 1, slab.slot + kind.block_count)
        slab.write_head(self.arena.words, self.arena.next_seed())
        # Pages that were committed before stay so; the page map tells which.
        self.arena.describe(first, page_count, KIND_SLAB, self.index, first)
        self._note((SLAB, self.index, first, page_count, kind.index, 0, b""))
        self.slabs[first] = slab
        self._slab_of_page.update(dict.fromkeys(range(first, first + page_count), slab))
        insort(self.partial[kind.index], slab)
        return slab

    def _take_slab(self, kind: SizeClass) -> tuple[int, int]:
        """Spare pages for a slab, as (first, count): as many as its class's have, or what there is of them that holds
        a block. Raises: HeapFullError."""
        try:
            return self._take_pages(kind.page_count), kind.page_count
        except HeapFullError:
            block_count = kind.blocks_in(self.space.spare.largest)
            if not block_count:
                raise
            page_count = kind.pages_of(block_count)
            return self.space.take(page_count), page_count

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
        return self._take_pages(page_count)

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
            if slab.is_full:
                insort(self.partial[slab.kind.index], slab)
            self.held.charge(slab.take_back(index), -slab.kind.extent)
            self._note(~(slab.first_page << BLOCK_SHIFT | index))
            if not slab.lent_count:
                self._park(slab)
            elif slab.kind.extent >= HOLLOW_EXTENT:
                self._hollow_out(slab)

    def _forget_run(self, first: int) -> int:
        """A run is lent no longer; its pages."""
        page_count = self.runs.pop(first)
        self.held.charge(self.borrowers.pop(first), -page_count << PAGE_SHIFT)
        return page_count

    def _park(self, slab: Slab) -> None:
        """Keep an empty slab if it is a small one and its class's only slab with room, else drop it. Making one costs
        as much as five allocations, and a program that allocates and frees in turn would make one each time."""
        if len(self.partial[slab.kind.index]) == 1 and slab.pages_touched <= _PARKED_PAGES:
            self._parked[slab.kind.index] = slab
        else:
            self._drop_slab(slab)

    def tidy(self) -> None:
        """For who looks at the heap: with nothing lent it is as a heap just made, without parked slabs."""
        if self.allocations == self.releases:
            self.drop_empty_slabs()

    def drop_empty_slabs(self) -> bool:
        """Give the pages of slabs without any block back; False if there was none."""
        parked = [slab for slab in self._parked.values() if not slab.lent_count]
        self._parked.clear()
        for slab in parked:
            if self.slabs.get(slab.first_page) is slab:
                self._drop_slab(slab)
        return bool(parked)

    def _take_pages(self, page_count: int) -> int:
        """Spare pages, if need be also those that slabs have and do not use. Raises: HeapFullError."""
        try:
            return self.space.take(page_count)
        except HeapFullError:
            if not self.drop_empty_slabs() | self._cut_slabs():
                raise
            return self.space.take(page_count)

    def _cut_slabs(self) -> bool:
        """Give back the pages of slabs that carving has not reached; False if there were none."""
        found = [slab for slabs in self.partial for slab in slabs if slab.pages_touched < slab.page_count]
        for slab in found:
            first, page_count = slab.first_page + slab.pages_touched, slab.page_count - slab.pages_touched
            slab.cut(slab.pages_touched)
            if slab.is_full:
                self.partial[slab.kind.index].remove(slab)
            self._note((SLAB_CUT, slab.first_page, slab.page_count))
            self._give_slab_pages(first, page_count)
        return bool(found)

    def _drop_slab(self, slab: Slab) -> None:
        """Give an empty slab's pages back."""
        self.partial[slab.kind.index].remove(slab)
        del self.slabs[slab.first_page]
        self._note((NO_SLAB, slab.first_page))
        self.arena.words[slab.slot - 1] = 0  # at once: these pages may be taken again before the journal commits
        self._give_slab_pages(slab.first_page, slab.page_count)

    def _give_slab_pages(self, first: int, page_count: int) -> None:
        for page in range(first, first + page_count):
            del self._slab_of_page[page]
        self.space.give(first, page_count)

    def locate(self, address: int) -> tuple[Slab | None, int, int]:
        """The lent block that begins at `address`: (slab or None for a run, index or first page, slot).

        Raises: NotABlockError; DoubleFreeError if it is a block that was taken back.
        """
        page = address >> PAGE_SHIFT
        slab = self._slab_of_page.get(page)
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
    def resize(self, address: int, generation: int, size: int, *, in_place_only: bool) -> Grant:
        """Change a block's size where it is; its generation stays.

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
        self.arena.journal.restate(slot, form.busy(form.session(word), generation, size))
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
    def slab_at(self, page: int) -> Slab | None:
        """The slab that `page` is part of."""
        return self._slab_of_page.get(page)

    def owns(self, address: int) -> bool:
        """True if `address` lies in a region of this heap."""
        return self.space.find_region(address >> PAGE_SHIFT) is not None

    def compact(self) -> Generator[None, None, int]:
        """Decommit what is free, yielding between slices; returns bytes of the largest committed free extent before.

        Free pages are coalesced already when they are given back; nothing moves.
        """
        self.drop_empty_slabs()
        largest = max(self.space.largest_committed() << PAGE_SHIFT, self._largest_free_block())
        while self.space.decommit_spare():
            yield
        return largest

    def _largest_free_block(self) -> int:
        return max((slab.kind.extent for slabs in self.partial for slab in slabs if slab.free), default=0)

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
        self.slabs.clear()
        self.runs.clear()
        self.borrowers.clear()
        self.held.clear()
        self._slab_of_page.clear()
        self.partial.clear()
