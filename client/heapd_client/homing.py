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
from heapd.units import MIB, PAGE_SHIFT

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
_SESSION_AND_SIZE: Final = (1 << _GENERATION) - 1
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
            word = self._word
            if word > 0:
                if self._tail is None:
                    self._tail = tail(self)
                self._word = -word
                self._base = (((word >> _GENERATION) + 1 & _GENERATIONS) or 1) << _GENERATION | own  # `_following`
                by_slot[self.slot] = away
                away[self.slot] = self
            elif self.slot >= slabs:  # the object stands for a small block since it was resized
                return _any_handle(self)
            return _new(Handle, (instance, self.slot, self.address, abs(word) >> _GENERATION))  # type: ignore[no-any-return]

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
        self._by_bin.clear()
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

    Fields: slot, live (its session word, and what that is while it lives), room (one item: bytes that may yet be sent),
    sent (slot, word and extent of each), block_type (for blocks of its, made at the first need).
    """

    __slots__ = ("block_type", "live", "room", "sent", "slot")

    def __init__(self, slot: int, live: int) -> None:
        self.slot = slot
        self.live = live
        self.room = [_MAX_SENT]
        self.sent: deque[tuple[int, int, int]] = deque()
        self.block_type: type[Block] | None = None

    def recount(self, words: memoryview) -> None:
        """Make room: blocks whose word is no longer what was stored were fetched."""
        waiting = [entry for entry in self.sent if words[entry[0]] == entry[1]]
        self.sent.clear()
        self.sent.extend(waiting)
        self.room[0] = _MAX_SENT - sum(extent for _, _, extent in waiting)


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
            if not live:
                self._homes.pop(number, None)
                return None
            home = self._homes[number] = _Home(slot, live)
        return home

    def send(self, block: Block, word: int, extent: int) -> bool:
        """Free another session's run to that session; False if that is dead, or has enough it did not come for.

        Args: word (its state word), extent (bytes).
        """
        number = RUN_WORD.session(word)
        home = self._home(number)
        if home is None:
            return False
        if home.room[0] < extent:
            home.recount(self._words)
            if home.room[0] < extent:
                return False
        cached = _following(word >> _GENERATION) | RUN_WORD.cached(number, 0)
        home.room[0] -= extent
        home.sent.append((block.slot, cached, extent))
        block.forget()
        self._words[block.slot] = cached
        if self._words[home.slot] != home.live:
            self.save(block)
        return True

    def save(self, block: Block) -> None:
        """The session died while a block was freed to it: have the daemon take the block, if it has not."""
        with suppress(DaemonError):
            self._heap.tell_given_back([block.address])

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
                home.room,
                home.sent,
                self._heap.free,
                self.save,
            )
        return home.block_type

    def clear(self) -> None:
        self._homes.clear()


class Guests:
    """Objects of runs that other sessions allocated and this one has freed: the same ones come again, in a stream.

    To open a block by its handle is to check a page word, a state word and a slab or run, and to make an object and a
    view. Where all but the generation is as before, the object of before will do.
    """

    def __init__(self, arena: Mapping) -> None:
        self._arena = arena
        self._instance = arena.instance
        self._words = arena.words
        self._blocks: dict[int, Any] = {}  # by slot

    def keep(self, block: Any, word: int) -> None:
        """Remember a run that was opened. Args: word (its state word)."""
        if type(block) is Visitor:
            return
        block._base = _following(word >> _GENERATION) | word & _SESSION
        block._stem = word & _SESSION_AND_SIZE
        directory, mapped = self._arena.page_slots(block.address >> PAGE_SHIFT)
        block._place = directory, self._words[directory], mapped, self._words[mapped]
        if len(self._blocks) >= _MAX_GUESTS:
            self._blocks.clear()
        self._blocks[block.slot] = block

    def reopen(self, handle: Any) -> Block | None:
        """The block of a handle, or of its bytes, if it was here before and nobody has its object. None: look it up."""
        try:
            if type(handle) is bytes:
                handle = unpack_handle(handle)
            instance, slot, address, generation = handle
            block = self._blocks[slot]
        except (LookupError, TypeError, ValueError, HandleFormatError):
            return None
        if getrefcount(block) != _ALONE or block._word or not block._base:
            return None
        words = self._words
        word = words[slot]
        directory, entry, mapped, page = block._place
        if (
            word & _SESSION_AND_SIZE != block._stem
            or word >> _GENERATION != generation
            or block.address != address
            or instance != self._instance
            or words[directory] != entry
            or words[mapped] != page
            or words[block._live_slot] != block._live
        ):
            return None
        block._base = _following(generation) | word & _SESSION
        block._seen = -word if block._buffer is not None else None
        block._word = -word
        return block  # type: ignore[no-any-return]

    def clear(self) -> None:
        self._blocks.clear()
