"""The two functions that an allocation costs nothing but: alloc pops a block, free pushes it, one store each.

What runs when they are not enough (no block cached, a view alive, a new epoch, the heap gone) is frontend.py. These
are closures, not methods, and every trick is here for its nanoseconds (CPython 3.11, scripts/bench alloc):

- A closure's variables are loads from cells; the same through `self` would be attribute loads, twice as slow.
- One Block type for each bin: `stack` and `limit` need not be looked up from the block.
- `stack_of` maps the very size asked for to its bin's stack: no rounding, no range check, no type check; whatever is
  no key yet (too large, negative, not an int, a new size) is the slow path's.
- The state word counts its generation up by one addition (layout.py); the store of one that ran over raises.
- A block whose view was taken has its word negated in `_word`: the one comparison of `free` sees that, too.
- `pop(-2)`: not the block freed last, which the caller's variable mostly still refers to. A Block object is handed
  out again only when nobody refers to it, so that a stale reference never comes back to life.

Exactness under signals (3.11 looks for them after a call): in alloc nothing is called after the store; in free the
word is stored first and the push is the last thing, so that a block whose free was interrupted is in the stack.
Serialized ones give the mutex up as the last call; if a signal's exception comes out of that, they undo.
"""

from __future__ import annotations

from collections.abc import Callable
from sys import getrefcount
from typing import Any

from .block import Block

__all__ = ["AllocFunction", "make_alloc", "make_block_type", "make_serialized_alloc", "make_serialized_block_type"]

AllocFunction = Callable[..., Block]


def make_alloc(
    words: memoryview, live_slot: int, live: int, stack_of: dict[int, list[Block]], step: int, slow: AllocFunction
) -> AllocFunction:
    """The alloc of an unserialized heap, good as long as the heap's live word is `live`. `step` is one generation."""

    def alloc(size: int, zero: bool = False) -> Block:
        if words[live_slot] != live or zero:
            return slow(size, zero)
        try:
            block = stack_of[size].pop(-2)
            if getrefcount(block) != 2:
                return slow(size, zero, block)
            block._base = base = block._base + block._step
            block._word = word = base + size
            words[block.slot] = word
            return block
        except (LookupError, ValueError):
            return slow(size, zero)

    return alloc
