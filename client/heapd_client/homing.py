"""Large blocks that come home: who frees one gives it back to the session that allocated it, through its state word.

A producer that hands frames to a consumer would otherwise have to lease ever new ones, while the consumer's cache
fills with frames that it has no use for. So a run that another living session allocated is freed by storing its word
as CACHED by that session: one store, no message. The owner has kept the blocks of which handles were made, and looks
at their words when a bin is empty.

Who frees bounds what it sends, in bytes that the owner has not come for: then its own cache takes the block. A session
word tells whether the owner lives. It is read before the store, and after it: the daemon clears it before it takes
back what a dead session caches, so that either the daemon sees the block or we see that nobody will.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from sys import getrefcount
from typing import TYPE_CHECKING, Any, Final

from heapd.errors import DaemonError
from heapd.layout import H_SESSIONS_READY, RUN_WORD, SESSION_MASK, Handle, HandleFormatError, unpack_handle
from heapd.units import MIB, PAGE_SHIFT, pages_for

from .block import Block, Visitor
from .hotpath import make_guest_type

if TYPE_CHECKING:
    from .heap import Heap
    from .mapping import Mapping

__all__ = ["Away", "Guests", "Homes"]

_MAX_SENT: Final = 64 * MIB  # arbitrary, as a front end's own cache of large runs
_LOOKS: Final = 64  # blocks that one look for returned ones reads the words of
_MAX_GUESTS: Final = 256  # arbitrary: objects kept for blocks that come again
_GENERATION: Final = RUN_WORD.generation_shift
_GENERATIONS: Final = RUN_WORD.generation_mask
_STEP: Final = 1 << _GENERATION  # from a word to the same with the next generation, but for the last one
_SESSION: Final = RUN_WORD.cached(SESSION_MASK, 0)
_new: Final[Callable[..., Any]] = tuple.__new__  # a named tuple without the Python function that its class calls
_any_handle: Final[Callable[[Block], Handle]] = Block.handle.fget  # type: ignore[attr-defined]
_ALONE: Final = 3  # references to an object in a dict, in a local name, and as getrefcount's argument


def _following(generation: int) -> int:
    """The next generation, where it stands in a run's word: as RUN_WORD has it, in one call."""
    return (generation + 1 & _GENERATIONS or 1) << _GENERATION


class Away:
    """The runs that this session allocated in one heap and made handles of, until they come back or are others'.

    They outlive a front end: what is out when that goes comes home to the next one.
    """

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._words = mapping.words
        self._by_bin: dict[int, dict[int, Any]] = {}  # by bin, then slot; longest away first
        self._by_slot: dict[int, dict[int, Any]] = {}  # which of them a slot was put in last

    def of(self, key: int) -> dict[int, Any]:
        """Blocks of the bin `key` by slot."""
        return self._by_bin.setdefault(key, {})

    def handle_property(self, key: int, own: int) -> property:
        """`Block.handle` for the runs of a bin: it notes that the block may be freed elsewhere, and come home.

        Args: key (of the bin), own (the word of a cached run of this session, but for the generation).
        """
        away, by_slot, tail, instance = self.of(key), self._by_slot, self._tail, self._mapping.instance
        slabs = self._mapping.shape.first_slab_slot

        def handle(self: Any) -> Handle:
            word, slot = self._word, self.slot
            if word > 0:
                generation = word >> _GENERATION
                if self._tail is None or generation == _GENERATIONS:
                    self._tail = tail(self)
                    self._base = _following(generation) | own
                else:
                    self._base += _STEP
                self._word = -word
                by_slot[slot] = away
                away[slot] = self
            elif slot >= slabs:  # the object stands for a small block since it was resized
                return _any_handle(self)
            else:
                generation = -word >> _GENERATION
            return _new(Handle, (instance, slot, self.address, generation))  # type: ignore[no-any-return]

        return property(handle, doc=Block.handle.__doc__)

    def note(self, key: int, block: Block, own: int) -> None:
        """A handle of a block of a bin was made past its `handle`. Args: as `handle_property`."""
        if block._tail is None:
            block._tail = self._tail(block)
        block._base = _following(block.word >> _GENERATION) | own
        self._by_slot[block.slot] = away = self.of(key)
        away[block.slot] = block

    def forget(self, slot: int) -> None:
        """The block at the slot was freed here, or is another one now."""
        away = self._by_slot.pop(slot, None)
        if away is not None:
            away.pop(slot, None)

    def clear(self) -> None:
        for blocks in self._by_bin.values():  # which block types and streams refer to, too
            blocks.clear()
        self._by_slot.clear()

    def collect(self, key: int) -> list[Any]:
        """Blocks of a bin that came back. Reads the words of those longest away, and moves them to the end."""
        away, words = self.of(key), self._words
        found = []
        for slot in list(islice(away, _LOOKS)):
            block = away.pop(slot, None)
            if block is None:
                continue
            word = words[slot]
            if word == -block._word:
                away[slot] = block
            elif word == block._base and block._word < 0 and block._tail == self._tail(block):
                found.append(block)
        return found

    def _tail(self, block: Block) -> tuple[int, int]:
        """The slot that tells what a run's last page is, and what it says: another process may shorten the run."""
        slot = self._mapping.page_slots((block.address + block.extent >> PAGE_SHIFT) - 1)[1]
        return slot, self._words[slot]


class _Home:
    """What was sent to one session, as far as it has not come for it.

    Fields: slot, live (its session word, and what that is while it lives), room (bytes that may yet be sent), kept (of
    what may not: bytes that `Guests` has objects of, sent or not), sent (slot, word and extent of each other block),
    block_type (for blocks of its, made at the first need).
    """

    __slots__ = ("block_type", "kept", "live", "room", "sent", "slot", "words")

    def __init__(self, words: memoryview, slot: int, live: int) -> None:
        self.words = words
        self.slot = slot
        self.live = live
        self.room = _MAX_SENT
        self.kept = 0
        self.sent: deque[tuple[int, int, int]] = deque()
        self.block_type: type[Block] | None = None

    def has_room(self, size: int) -> bool:
        """Whether so many bytes may be sent; counted anew if need be: blocks whose word is no longer what was stored
        were fetched."""
        if self.room < size:
            waiting = [entry for entry in self.sent if self.words[entry[0]] == entry[1]]
            self.sent.clear()
            self.sent.extend(waiting)
            self.room = _MAX_SENT - self.kept - sum(extent for _, _, extent in waiting)
        return self.room >= size

    def count(self, slot: int, word: int, extent: int) -> None:
        """A block is sent. Args: word (that it has until it is fetched), extent (bytes)."""
        self.room -= extent
        self.sent.append((slot, word, extent))

    def keep(self, extent: int) -> None:
        """A block of so many bytes may be sent, fetched, opened and sent again, uncounted."""
        self.room -= extent
        self.kept += extent

    def drop(self, block: Any) -> None:
        """A block is not kept any more."""
        extent = max(pages_for(block._stem), 1) << PAGE_SHIFT  # when it was kept: it may have been resized since
        self.room += extent
        self.kept -= extent
        if block._base and self.words[block.slot] == block._base:  # else its slot may be of a slab that has gone
            self.count(block.slot, block._base, block.extent)

    def end(self) -> None:
        """Have the views of its blocks take the slow path from now on."""
        if self.block_type is not None:
            self.block_type.stop_views()  # type: ignore[attr-defined]


class Homes:
    """The sessions whose runs this one frees, in one heap."""

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._words = heap.mapping.words
        self._homes: dict[int, _Home] = {}

    def _home(self, number: int) -> _Home | None:
        """Of a session, None if it is not alive."""
        home = self._homes.get(number)
        if home is None or self._words[home.slot] != home.live:
            slot = self._heap.mapping.shape.session_slot(number)
            live = self._words[slot] if number < self._words[H_SESSIONS_READY] else 0
            if home is not None:
                self._homes.pop(number, None)
                home.end()
            if not live:
                return None
            home = self._homes[number] = _Home(self._words, slot, live)
        return home

    def send(self, block: Block, word: int, extent: int) -> bool:
        """Free another session's run to that session; False if that is dead, or has enough it did not come for.

        Args: word (its state word), extent (bytes).
        """
        number = RUN_WORD.session(word)
        home = self._home(number)
        if home is None:
            return False
        if not home.has_room(extent):
            return False
        cached = _following(word >> _GENERATION) | RUN_WORD.cached(number, 0)
        home.count(block.slot, cached, extent)
        block.forget()
        self._words[block.slot] = cached
        if self._words[home.slot] != home.live:
            self.save(block)
        return True

    def save(self, block: Block) -> None:
        """The session died while a block was freed to it: have the daemon take the block, if it has not."""
        with suppress(DaemonError):
            self._heap.tell_given_back([(block.address, RUN_WORD.generation(self._words[block.slot]))])

    def guest_type(self, number: int, live: int) -> type[Block] | None:
        """The Block type for runs of another session, while the heap's live word is `live`; None if it is dead."""
        home = self._home(number)
        if home is None:
            return None
        if home.block_type is None or home.block_type._live != live:  # type: ignore[attr-defined]
            home.block_type = make_guest_type(
                self._words,
                self._heap.live_slot,
                live,
                home.slot,
                home.live,
                self._heap.free,
                self.save,
                home,
            )
        return home.block_type

    def clear(self) -> None:
        for home in list(self._homes.values()):
            home.end()
        self._homes.clear()


class Guests:
    """Objects of runs that other sessions allocated and this one frees: the same ones come again, in a stream.

    To open a block by its handle is to check a page word, a state word and a slab or run, and to make an object and a
    view. Where all but the generation is as before, the object of before will do. It is sent home, fetched and opened
    again before it can be sent once more: so what is sent of these objects is never more than what they are of.
    """

    def __init__(self, arena: Mapping) -> None:
        self._arena = arena
        self._instance = arena.instance
        self._words = arena.words
        self._blocks: dict[int, Any] = {}  # by slot

    def keep(self, block: Any, word: int) -> None:
        """Remember a run that was opened, if as much may be sent to its owner. Args: word (its state word)."""
        if type(block) is Visitor:
            return
        former = self._blocks.pop(block.slot, None)
        if former is not None:
            self._drop(former)
        if len(self._blocks) >= _MAX_GUESTS or not block._home_of.has_room(block.extent):
            while self._blocks:
                self._drop(self._blocks.popitem()[1])
            if not block._home_of.has_room(block.extent):
                return
        generation = word >> _GENERATION
        block._base = _following(generation) | word & _SESSION
        block._turn = generation + 1  # beyond the last one: then a handle never has it
        block._stem = RUN_WORD.size(word)
        directory, mapped = self._arena.page_slots(block.address >> PAGE_SHIFT)
        block._place = directory, self._words[directory], mapped, self._words[mapped]
        block._home_of.keep(block.extent)
        self._blocks[block.slot] = block

    def _drop(self, block: Any) -> None:
        block._home_of.drop(block)
        block._base = 0  # whoever has it frees it the slow way, which counts

    def make_open(self, look_up: Callable[[Any], Block]) -> Callable[[Any], Block]:
        """What opens a handle, or its bytes: the block's object of before if nobody has it, else what `look_up` says.

        A closure, as those of hotpath.py are and for the same reason."""
        blocks, words, here = self._blocks, self._words, self._instance

        def reopen(handle: Any) -> Block:
            try:
                instance, slot, address, generation = unpack_handle(handle) if type(handle) is bytes else handle
                block = blocks[slot]
            except (LookupError, TypeError, ValueError, HandleFormatError):
                return look_up(handle)
            if getrefcount(block) == _ALONE and not block._word and block._base:
                word, stored = words[slot], block._base
                directory, entry, mapped, page = block._place
                if (
                    word == stored + block._stem  # allocated again by its owner, with the same size
                    and generation == block._turn
                    and block.address == address
                    and instance == here
                    and words[directory] == entry
                    and words[mapped] == page
                    and words[block._live_slot] == block._live
                ):
                    block._turn = generation + 1
                    block._base = stored + _STEP if generation < _GENERATIONS else 0
                    block._word = word = -word
                    block._seen = word if block._buffer is not None else None
                    return block  # type: ignore[no-any-return]
            return look_up(handle)

        return reopen

    def clear(self, heap: Heap | None = None) -> None:
        """Keep none, or none of a heap: it was closed here, and so are the blocks that somebody still has."""
        for slot, block in list(self._blocks.items()):
            if heap is None or block.heap is heap:
                del self._blocks[slot]
                self._drop(block)
