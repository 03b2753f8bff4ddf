"""A bin and its hot functions over words of their own, with a hook after each call that they make."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from heapd.layout import SLAB_WORD
from heapd_client.block import Block
from heapd_client.exporter import make_exporter
from heapd_client.hotpath import Lock, make_alloc, make_block_type, make_locked_alloc, make_locked_block_type
from tests.interrupts import Interrupt

LIVE_SLOT, LIVE, SESSION, SIZE = 0, 3, 5, 64
LARGER = 80  # the extent of the next larger bin
CACHED_WORD = SLAB_WORD.cached(SESSION, 9)


class Stack(list[Any]):
    """A bin's list; `after` runs when pop or append has done its work, `before` before a pop; each once."""

    after: Callable[[], None] | None = None
    before: Callable[[], None] | None = None

    def pop(self, index: Any = -1) -> Any:
        before, self.before = self.before, None
        if before is not None:
            before()
        block = super().pop(index)
        self.run()
        return block

    def append(self, block: Any) -> None:
        super().append(block)
        self.run()

    def run(self) -> None:
        after, self.after = self.after, None
        if after is not None:
            after()


class Odd(int):
    """An int that finds the bin, and then is not to be added to a word."""

    def __radd__(self, other: int) -> Any:
        raise OverflowError("as numpy's do")


class Rig:
    """A bin, the next larger one, and their hot functions.

    Fields: words, stack, larger (the larger bin's stack; at first empty), slow (calls of the slow path: what was
    passed), depth (of a make-believe mutex), `at` (what runs after trylock or unlock, once, by name).
    """

    def __init__(self, *, locked: bool, blocks: int = 4) -> None:
        self.words = memoryview(bytearray(8 * 64)).cast("Q")
        self.words[LIVE_SLOT] = LIVE
        self.stack, self.larger = Stack(), Stack()
        self.stack_of: dict[int, Any] = {SIZE + 15 >> 4: self.stack}
        self.larger_of: dict[int, list[Any]] = {SIZE + 15 >> 4: self.larger}
        self.slow: list[Any] = []
        self.depth = 0
        self.at: dict[str, Callable[[], None]] = {}
        self.busy_for_now = False
        self.lock = Lock(self.trylock, self.unlock, self.settle, self.undo) if locked else None
        self.take_counts: list[Callable[[], int]] = []
        arguments = (self.words, LIVE_SLOT, LIVE, self.stack_of, self.larger_of, self.slow_alloc)
        if self.lock is None:
            self.alloc = make_alloc(*arguments)
        else:
            self.alloc, count = make_locked_alloc(*arguments, self.lock)
            self.take_counts.append(count)
        self.kind, self.set_limit = self.make_kind(self.stack)
        self.larger_kind, _ = self.make_kind(self.larger)
        for number in range(blocks):
            list.append(self.stack, self.make_block(self.kind, number, SIZE))

    def make_kind(self, stack: list[Any]) -> tuple[type[Block], Callable[[int], None]]:
        """The Block type of a bin that may hold ten blocks, and what sets another limit."""
        arguments = (self.words, LIVE_SLOT, LIVE, stack, self.slow_free)
        if self.lock is None:
            kind, set_limit = make_block_type(*arguments)
        else:
            kind, set_limit, count = make_locked_block_type(*arguments, self.lock)
            self.take_counts.append(count)
        set_limit(10)
        return kind, set_limit

    def make_block(self, kind: type[Block], number: int, extent: int) -> Block:
        """A cached block; its state word is that of the slot 8 + `number`."""
        block = kind(None, 8 + number, 4096 * number, extent, 0)  # type: ignore[arg-type]
        block._base = self.words[block.slot] = CACHED_WORD
        return block

    def fill_larger(self, blocks: int) -> None:
        """Have blocks in the larger bin, and none in the own one."""
        self.stack.clear()
        for number in range(blocks):
            list.append(self.larger, self.make_block(self.larger_kind, 16 + number, LARGER))

    def run(self, name: str) -> None:
        action = self.at.pop(name, None)
        if action is not None:
            action()

    def trylock(self) -> int:
        if self.busy_for_now:
            self.busy_for_now = False
            return 16
        self.depth += 1
        self.run("trylock")
        return 0

    def unlock(self) -> int:
        self.depth -= 1
        self.run("unlock")
        return 0

    def settle(self, status: int) -> None:
        self.depth += 1
        self.run("settle")

    def undo(self, status: int | None) -> None:
        if status is None or status >= 0:
            self.depth = 0

    def slow_alloc(self, size: int, zero: bool, popped: Any) -> Any:
        self.slow.append((size, zero, popped))

    def slow_free(self, block: Any) -> None:
        self.slow.append(block)

    def state(self, block: Block) -> int:
        return SLAB_WORD.state(self.words[block.slot])


def interrupt() -> None:
    raise Interrupt


def at_getrefcount(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Actions, one each for the next calls that a module makes of getrefcount, which run when it has counted."""
    actions: list[Callable[[], None]] = []
    count = module.getrefcount

    def counting(thing: object) -> int:
        result: int = count(thing) - 1  # less this function's own
        if actions:
            actions.pop(0)()
        return result

    monkeypatch.setattr(module, "getrefcount", counting)
    return actions


def give_view(block: Block) -> memoryview:
    """What `Block.view` makes, without a mapping."""
    block._exporter, block._buffer = make_exporter(memoryview(bytearray(SIZE)), 0, SIZE)
    block._seen = block._word
    block._view = memoryview(block._buffer)
    return block._view
