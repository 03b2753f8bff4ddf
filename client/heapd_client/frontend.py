"""The front end of one heap in one session: blocks leased in batches, allocated and freed without asking anybody.

Blocks freed here go to this process's bins (bins.py), whoever allocated them. What a bin may hold, and how many blocks
it leases at once, follows from what went through it; a heap that allocates one block leases one.

The hot path is hotpath.py; here is what it leaves to us. Every method runs in one thread at a time, which has taken
the heap's gate (heapcore.py), and the mutex of a serialized heap before that.

A block that falls out of the lists when a signal handler raises is lost to us, but not to the daemon: its word says
CACHED, and giving everything back finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from operator import attrgetter
from sys import getrefcount
from threading import active_count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from heapd.errors import BlockTooLargeError, DaemonError, DoubleFreeError, HeapFullError, StaleHandleError
from heapd.layout import BUSY, H_COMMITTED, MAX_BLOCK_SIZE, RUN_WORD, WordFormat
from heapd.units import KIB, MIB
from heapd.wire import messages as ask

from .bins import LARGE, MAX_LEASE, Bin, key_of
from .block import Block
from .hotpath import Lock, is_unseen, make_alloc, make_block_type, make_locked_alloc, make_locked_block_type
from .stream import Stream

if TYPE_CHECKING:
    from .heap import Heap

__all__ = ["Freeing", "FrontEnd"]

# All arbitrary, chosen by scripts/bench alloc, frames and trace: more caches cost memory, less cost round trips.
_SLACK_FLOOR: Final = 128 * KIB  # what is cached may add this much to the most that was in use at once ...
_SLACK_PART: Final = 22  # ... or this part of it (ARCHITECTURE.md has what less would cost); while less is in use,
_LASTING: Final = 2 * MIB  # so much of the difference is remembered,
_FADE: Final = 1  # and of the rest one half is forgotten at each lease
_CACHE_FLOOR: Final = 1 * MIB  # frees may fill the bins of size classes with this much, if that is more
_LARGE_CACHE: Final = 64 * MIB  # the bins of runs of more than 64 KiB together may hold this much
_TICKET: Final = 3  # a bin may take this part of the room that is left, before it must ask again;
_CLAIM_PART: Final = 4  # one of large runs this part, or one block
_NEIGHBOURS: Final = 2  # so many larger bins are looked in before a lease: each costs 1/8 of a block, a lease 100 us
_PATIENCE: Final = 4  # slow calls before a bin gets a spare block, or another one
_LEASE_PART: Final = 8  # one lease may take this part of what may still be leased,
_OTHERS_PART: Final = 2  # and this part for one block each of the bins that are empty, too
_MAX_SIZES: Final = 1 << 16  # sizes that the hot path knows, about 100 bytes each; beyond, the slow path finds the bin
_MAX_BINS: Final = 512  # about 5 KB each, and each is looked at when another one wants to hold more

_HOT: Final = 2  # blocks in a bin that the hot path needs to take one
_COLLECTED: Final = 3  # references to a block that came home: a list's, a local name's, getrefcount's

_address: Final = attrgetter("address")


class Freeing(NamedTuple):
    """A free that is two stores away: of `freed` in the block's slot, then `shelf += (entry,)`. CPython looks for
    signals, and changes threads, after calls, and these are none; so whoever does them has done all or nothing.

    Fields: front, word (what the heap's front end, and the slot, must be until then), freed, shelf (a bin's stack, or
    the session's strays), entry (what that takes).
    """

    front: FrontEnd | None
    word: int
    freed: int
    shelf: Any
    entry: Any


class FrontEnd:
    """Bins of one heap. Good for one session and one value of the heap's live word; then another one is made.

    Fields: alloc (the hot function), session (its number), live (the value), held (bytes: what was leased less what was
    given back, so in use or cached; what wandered off to other processes is still in it).
    """

    def __init__(self, heap: Heap, session: int, live: int, lock: Lock | None, held: int = 0) -> None:
        self._heap = heap
        self.session = session
        self.live = live
        self._words = heap.mapping.words
        self._hot_lock = lock
        self._bins: dict[int, Bin] = {}
        self._stack_of: dict[int, Any] = {}
        self._larger_of: dict[int, Any] = {}
        self._take_count: Callable[[], int] = lambda: 0
        self.held = held
        self._peak = held  # of what was in use
        arguments = (self._words, heap.live_slot, live, self._stack_of, self._larger_of, heap.alloc_slow)
        if lock is None:
            self.alloc = make_alloc(*arguments)
        else:
            self.alloc, self._take_count = make_locked_alloc(*arguments, lock)

    # -- bins --------------------------------------------------------------------------------------------------------
    def _bin_for(self, size: int) -> Bin:
        """The bin that blocks of `size` bytes come from. Raises: BlockTooLargeError."""
        if size > MAX_BLOCK_SIZE:
            raise BlockTooLargeError(f"{size} bytes requested; a block has at most {MAX_BLOCK_SIZE}")
        key = key_of(size)
        found = self._bins.get(key) or self._add_bin(key)
        if size > 0 and len(self._stack_of) < _MAX_SIZES:
            self._stack_of[size + 15 >> 4] = found.stream or found.stack
            larger = self._bins.get(key + 1)
            if larger is not None and larger.may_replace(found):
                self._larger_of[size + 15 >> 4] = larger.stack
        return found

    def _bin_of(self, extent: int) -> Bin:
        """The bin of blocks that occupy `extent` bytes."""
        key = key_of(extent)
        return self._bins.get(key) or self._add_bin(key)

    def _add_bin(self, key: int) -> Bin:
        if len(self._bins) >= _MAX_BINS:
            self._drop_bins()
        new = Bin(key)
        arguments = (self._words, self._heap.live_slot, self.live, new.stack, self._heap.free)
        if self._hot_lock is None:
            new.block_type, new.set_limit = make_block_type(*arguments)
        else:
            new.block_type, new.set_limit, new.take_count = make_locked_block_type(*arguments, self._hot_lock)
        if new.form is RUN_WORD:
            new.block_type.handle = self._heap.away.handle_property(key, RUN_WORD.cached(self.session, 0))  # type: ignore[method-assign, assignment]
        if new.is_large:
            self._expect_stream(new)
        self._bins[key] = new
        self._set_limit(new, self._room(new))
        return new

    def _expect_stream(self, bin_: Bin) -> None:
        """Have the hot path look for runs that come home to the bin, and use a single one again and again. Costs those
        a little who have many in the stack."""
        if bin_.stream is None:
            bin_.stream = Stream(self._words, bin_.stack, self._heap.away.of(bin_.key), is_large=bin_.is_large)

    def _drop_bins(self) -> None:
        """Forget the bins of large runs. Those that are allocated will come back as strangers."""
        doomed = [bin_ for bin_ in self if bin_.is_large]
        self._heap.count_acquisitions(self.take_count())
        self._stack_of.clear()
        self._larger_of.clear()
        for bin_ in doomed:
            bin_.block_type.stop_views()  # type: ignore[attr-defined]
            del self._bins[bin_.key]
        self._give_back([block for bin_ in doomed for block in bin_.stack])

    def _room(self, bin_: Bin) -> int:
        """Bytes that the bins of this one's kind may still take together; negative if they hold too much."""
        if bin_.is_large:  # few blocks exceed what all may hold: what a bin was promised counts
            others = sum(other.claimed for other in self if other.is_large and other is not bin_)
            return _LARGE_CACHE - bin_.cached - others
        # Not all of the peak: it is forgotten at leases, and there may be none while less and less is in use.
        allowed = min(self._peak - self.used_bytes(), _LASTING) + max(_SLACK_FLOOR, self._peak // _SLACK_PART)
        return max(allowed, _CACHE_FLOOR) - sum([len(each.stack) * each.extent for each in self if each.key < LARGE])

    def _slack(self, more: int) -> int:
        """Bytes that may be leased besides the `more` that are about to be used; negative if too much is held.

        What is cached on top of the most that was in use makes the heap grow. What is cached while less is in use
        than before does not, and a program that did it once may do it again; but others could use the memory, so it
        is given back over the next leases; all but what a small heap, whose use goes up and down by much, needs again.
        """
        used = self.used_bytes() + more
        self._peak = max(used, self._peak - (max(self._peak - used - _LASTING, 0) >> _FADE))
        allowed = self._peak + max(_SLACK_FLOOR, self._peak // _SLACK_PART)
        # Who holds more than there is has handed blocks to others for good, and will again: lease many at once.
        wandered = min(max(self.held - self._words[H_COMMITTED], 0), _LARGE_CACHE)
        return allowed + wandered - used - self.cached_bytes()

    def _set_limit(self, bin_: Bin, room: int) -> None:
        """Let free push so many blocks more, of the `room` left, before it asks again."""
        if not bin_.is_large:
            bin_.set(max(len(bin_.stack) + max(room // _TICKET // bin_.extent, 1), 2))
        elif self._heap.releases_large and bin_.extent >= MIB:
            bin_.set(0)
        else:
            blocks = max(room // bin_.extent, 0)
            bin_.set(len(bin_.stack) + max(blocks // _CLAIM_PART, min(blocks, 1)))

    # -- alloc -------------------------------------------------------------------------------------------------------
    def allocate(self, size: int, zero: bool, popped: Block | None) -> Block:
        """A block for `size` bytes, from its bin or leased. `popped`: a cached block that somebody still refers to.

        Raises: as Heap.alloc.
        """
        bin_ = self._bin_for(size)
        block = None
        if popped is not None and type(popped) is bin_.block_type:  # else it was given back since
            block = self._fresh(bin_, popped, popped._base)
        if bin_.form is RUN_WORD and len(bin_.stack) < _HOT:
            self._collect(bin_)
        block = block or self._pop(bin_)
        has_leased = block is None
        block = block or self._lease(bin_, size)
        try:
            if not (has_leased or bin_.stack or bin_.is_large):
                self._add_spare(bin_, size)
            if zero:
                self._heap.mapping.zero(block.address, size)
            word = block._base + (size or bin_.form.size_mask)
        except BaseException:
            bin_.stack.append(block)
            raise
        block._word = word
        self._words[block.slot] = word
        return block

    def allocate_cached(self, size: int) -> Block | None:
        """A block for `size` bytes from its bin; None if that is empty."""
        bin_ = self._bin_for(size)
        if bin_.form is RUN_WORD and not bin_.stack:
            self._collect(bin_)
        block = self._pop(bin_) if bin_.stack else None
        if block is not None:
            block._word = word = block._base + (size or bin_.form.size_mask)
            self._words[block.slot] = word
        return block

    def _pop(self, bin_: Bin) -> Block | None:
        """A cached block of the bin, or of a little larger one: that saves a round trip."""
        for key in range(bin_.key, bin_.key + 1 + _NEIGHBOURS):
            candidate = self._bins.get(key)
            if candidate is not None and candidate.may_replace(bin_):
                try:
                    block: Block = candidate.stack.pop()
                except IndexError:
                    continue  # empty, or another thread was faster
                return block if getrefcount(block) == 2 else self._fresh(candidate, block, block._base)
        return None

    def _add_spare(self, bin_: Bin, size: int) -> None:
        """Lease one block more, once a bin was emptied by `_PATIENCE` calls: one that is allocated and freed in turn is
        always in the way of itself, and the hot path needs two; threads that do so need one more each. What was spare
        may have been allocated for good since: then another one, each after twice as many calls as the one before."""
        bin_.emptied += 1
        if bin_.emptied >= _PATIENCE << max(bin_.spares + 1 - active_count(), 0):
            bin_.emptied = 0
            bin_.spares += 1
            with suppress(HeapFullError):
                bin_.stack.append(self._grant(bin_, self._ask(size, 1)[0]))

    def _fresh(self, bin_: Bin, block: Block, word: int) -> Block:
        """A new object, of a new generation, for the memory of a block that others may refer to or name.

        Args: word (its state word, BUSY or CACHED).
        """
        return self._make(bin_, block.slot, block.address, bin_.form.next_generation(bin_.form.generation(word)))

    def _make(self, bin_: Bin, slot: int, address: int, generation: int) -> Block:
        block = bin_.block_type(self._heap, slot, address, bin_.extent, 0)
        block._base = bin_.form.cached(self.session, generation)
        return block

    def _lease(self, bin_: Bin, size: int) -> Block:
        """Lease a batch; one block of it, the others are in the bin. Raises: as Heap.alloc."""
        slack = self._slack(bin_.extent)
        surplus = self._take_surplus(-slack) if slack < 0 else []
        slack += _size_of(surplus)
        count = min(bin_.next_batch(), max(slack // _LEASE_PART // bin_.extent, 0) + 1)
        others = self._empty_bins(slack // _OTHERS_PART, bin_) if not bin_.is_large else []
        try:
            try:
                grants = self._ask(size, count, [other.extent for other in others])
            finally:
                self._give_back(surplus)  # after: it takes the daemon longer
        except HeapFullError as shortage:
            self._heap.session.reclaim(shortage, self._heap.id)
            grants = self._ask(size, 1)
        bin_.batch = count
        first, *blocks = [self._grant(bin_, grant) for grant in grants[:count]]
        # The hot path takes the last but one: with the highest address on top, blocks come in the order of addresses.
        bin_.stack += [*blocks[-2::-1], *blocks[-1:]]
        for other, grant in zip(others, grants[count:], strict=False):
            other.stack.append(self._grant(other, grant))
        self._set_limit(bin_, self._room(bin_))
        return first

    def _empty_bins(self, size: int, but: Bin) -> list[Bin]:
        """Other bins of size classes that are empty, of `size` bytes together: a block of each comes along."""
        found: list[Bin] = []
        for bin_ in self:
            if not (bin_.stack or bin_.is_large or bin_ is but) and bin_.leased >= _PATIENCE:
                size -= bin_.extent
                if size >= 0:
                    found.append(bin_)
        return found

    def note_away(self, block: Block) -> None:
        """A handle was made of a run of this session's: another one may free it, and then it comes home."""
        bin_ = self._bin_of(block.extent)
        if type(block) is not bin_.block_type:  # the bin wants one of its own back
            block = bin_.block_type(self._heap, block.slot, block.address, block.extent, -block.word)
        self._heap.away.note(bin_.key, block, RUN_WORD.cached(self.session, 0))

    def _collect(self, bin_: Bin) -> None:
        """Put runs in their bin that other sessions have freed to this one."""
        found = self._heap.away.collect(bin_.key)
        if found:
            self._expect_stream(bin_)
        for block in found:
            if type(block) is not bin_.block_type or getrefcount(block) > _COLLECTED or not is_unseen(block):
                block = self._make(bin_, block.slot, block.address, bin_.form.generation(block._base))
            block._word = 0
            bin_.stack.append(block)
        if bin_.is_large and self._room(bin_) < 0:
            self._make_room(bin_)

    def _grant(self, bin_: Bin, grant: Any) -> Block:
        slot, address, generation, extent, _ = grant
        self._heap.away.forget(slot)
        bin_.leased += 1
        self.held += bin_.extent
        mapping, executable = self._heap.mapping, self._heap.is_executable
        if executable or mapping.has_executable_pages:
            mapping.protect(address, extent, executable=executable)
        return self._make(bin_, slot, address, generation)

    def _ask(self, size: int, count: int, others: list[int] | None = None) -> list[Any]:
        heap = self._heap
        if size > MAX_LEASE:
            return [heap.ask_for_block(size)]
        grants: list[Any] = heap.session.call(ask.HeapLease(heap.id, size, count, others or []))
        return grants

    # -- free --------------------------------------------------------------------------------------------------------
    def take_back(self, block: Block, word: int) -> None:
        """Put an allocated block, of whatever origin, in its bin. `word`: its state word; its views are released."""
        bin_ = self._bin_with_room(block, word)
        if type(block) is bin_.block_type:
            cached, generation = block, bin_.form.generation(word)
            if block._word != word:  # a handle was made: others may name this block
                generation = bin_.form.next_generation(generation)
            cached.extent, cached._base = bin_.extent, bin_.form.cached(self.session, generation)
        else:  # it came by a handle, or by a fork
            cached = self._fresh(bin_, block, word)
        block._word = 0
        self._words[block.slot] = cached._base
        bin_.stack.append(cached)
        if bin_.extent > _LARGE_CACHE:
            self._give_back([bin_.stack.pop()])

    def prepare_free(self, block: Block, word: int) -> Freeing:
        """All of `take_back` but what needs no call."""
        bin_ = self._bin_with_room(block, word)
        cached = self._fresh(bin_, block, word)
        return Freeing(self, word, cached._base, bin_.stack, cached)

    def _bin_with_room(self, block: Block, word: int) -> Bin:
        """The bin of an allocated block that is about to be freed, with room for it. Args: word (its state word)."""
        bin_ = self._bin_of(self._heap.extent_of(block, word))
        if len(bin_.stack) >= bin_.limit:
            self._make_room(bin_)
        if bin_.form.session(word) != self.session:
            self.held += bin_.extent
        return bin_

    def _make_room(self, bin_: Bin) -> None:
        """Let a full bin hold more, or, where there is no room, give back the oldest of what the fullest bins hold."""
        kin = [other for other in self if other.is_large == bin_.is_large]
        if bin_.is_large and self._room(bin_) <= bin_.extent:
            for other in kin:
                other.set(0)
        room = self._room(bin_)
        if room <= bin_.extent:
            surplus = self._take_surplus(bin_.extent - room, kin)
            room += _size_of(surplus)
            self._give_back(surplus)
        self._set_limit(bin_, room)

    def _take_surplus(self, size: int, bins: Iterable[Bin] | None = None) -> list[Block]:
        """Take `size` bytes at least out of the bins, and a quarter of what is cached, if there is so much: of what the
        fullest hold the blocks at the highest addresses, so that slabs get empty. Runs first: a block of a slab that is
        given back frees no page until the whole slab is empty."""
        bins = [bin_ for bin_ in bins or self if bin_.stack]
        bins.sort(key=lambda bin_: (bin_.form is RUN_WORD, bin_.cached), reverse=True)
        goal, done = size + sum(bin_.cached for bin_ in bins) // 4, 0
        doomed: list[Block] = []
        for bin_ in bins:
            count = (len(bin_.stack) + 1) // 2
            bin_.stack.sort(key=_address, reverse=True)
            doomed += bin_.stack[:count]
            del bin_.stack[:count]
            done += count * bin_.extent
            if done >= goal:
                break
        return doomed

    def _give_back(self, doomed: list[Block]) -> None:
        """Give blocks back that are in no bin any more. Until there is an answer nobody knows whose they are: they stay
        out of the bins, and giving everything back finds them, should they still be ours.

        It is waited for where the mutex is held: who gets that next must see nothing change."""
        self.held -= _size_of(doomed)
        with suppress(DaemonError):
            self._heap.tell_given_back(list(map(_name, doomed)), waits=self._hot_lock is not None)

    # -- all of it ---------------------------------------------------------------------------------------------------
    def stop_frees(self) -> None:
        """Have every free take the slow path from now on."""
        for bin_ in self:
            bin_.set(0)

    def empty(self) -> list[tuple[int, int]]:
        """Have every call take the slow path from now on. Returns: addresses and generations of what was cached."""
        self.stop_frees()
        self._stack_of.clear()
        self._larger_of.clear()
        blocks: list[tuple[int, int]] = []
        for bin_ in self:
            blocks += map(_name, bin_.stack)
            bin_.stack.clear()
        return blocks

    def end(self) -> list[tuple[int, int]]:
        """As `empty`, for good: the views of blocks that are allocated take the slow path, too."""
        for bin_ in self:
            bin_.block_type.stop_views()  # type: ignore[attr-defined]
        return self.empty()

    def inherit(self, old: FrontEnd) -> None:
        """Take over what another front end of this session caches, whose frees stop. The blocks that it gave
        out are not this one's own: when they are freed, their memory gets another generation."""
        old.stop_frees()
        self.held, self._peak = old.held, old._peak
        for bin_ in old:
            new = self._bins.get(bin_.key) or self._add_bin(bin_.key)
            new.batch, new.leased = bin_.batch, bin_.leased
            generation = bin_.form.generation
            blocks, bin_.stack[:] = bin_.stack[:], []
            new.stack += [self._make(new, block.slot, block.address, generation(block._base)) for block in blocks]
            self._set_limit(new, self._room(new))
        old.end()

    def used_bytes(self) -> int:
        """Bytes that are in use, as far as this front end knows: what others freed since is still among them."""
        return max(min(self.held, self._words[H_COMMITTED]) - self.cached_bytes(), 0)

    def take_count(self) -> int:
        """Acquisitions of the mutex by the hot path since the last call."""
        return self._take_count() + sum(bin_.take_count() for bin_ in self)

    def cached_bytes(self) -> int:
        return sum([len(bin_.stack) * bin_.extent for bin_ in self])

    def __iter__(self) -> Iterator[Bin]:
        return iter(list(self._bins.values()))


def _size_of(blocks: list[Block]) -> int:
    """Bytes that blocks occupy."""
    return sum([block.extent for block in blocks])


def _name(block: Any) -> tuple[int, int]:
    """Address and generation of a cached block."""
    return block.address, block._form.generation(block._base)


def check_busy(word: int, block: Block, form: WordFormat) -> int:
    """`word`, if it is that of the allocated block. Raises: DoubleFreeError, StaleHandleError."""
    if form.state(word) != BUSY:
        raise DoubleFreeError(f"the block at {block.address:#x} is free already", address=block.address)
    if form.generation(word) != form.generation(block.word):
        raise StaleHandleError(
            f"the block at {block.address:#x} was freed, and its memory given out again", address=block.address
        )
    return word
