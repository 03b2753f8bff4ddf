"""Runs in a stream: one is freed, here or by who received it, and the next of that size is allocated.

A stack's `pop(-2)` has nothing for a stream. Either each run is away when the next is asked for, and comes home by its
state word alone (homing.py), in no list; or there is one run, which went back to the stack just before, and to which
the caller's variable still refers. A bin of runs where that happens has the hot path ask a `Stream` instead of the
stack. It stands beside the stack, because its call costs what a stack's does not.
"""

from __future__ import annotations

from sys import getrefcount
from typing import Any, Final

from .block import Block
from .hotpath import is_unseen

__all__ = ["Stream"]

_LOOKS: Final = 16  # arbitrary: more frames are seldom in flight
_ALONE: Final = 2  # references to a block that nobody has: a local name's, getrefcount's


class Stream:
    """What the hot path takes a bin's runs from, in place of its stack.

    Args: words (of the arena), stack (of the bin), away (its runs that were handed out, by slot, the one that is out
    longest first), is_large (time is better spent on which of them to take).
    """

    __slots__ = ("_away", "_is_large", "_stack", "_words")

    def __init__(self, words: memoryview, stack: list[Any], away: dict[int, Any], *, is_large: bool = False) -> None:
        self._words = words
        self._stack = stack
        self._away = away
        self._is_large = is_large

    def _newest_at_home(self) -> list[int]:
        """The slot of the run at home that was handed out last: few go round then, and what was written to one is still
        in the processor's caches. If there is none, of the one that is out longest."""
        away, slots = self._away, list(self._away)  # other threads may change it
        for slot in slots[: -_LOOKS - 1 : -1]:
            if self._words[slot] == away[slot]._base:
                return [slot]
        return slots[:1]

    def pop(self, place: int) -> Any:
        """A cached block that nobody refers to: from the stack, or that came home, or the stack's last in a new object.

        Args:   place (as of the stack's pop).
        Raises: IndexError or KeyError if there is none, or another thread was faster.
        """
        stack, away = self._stack, self._away
        if stack and len(stack) > 1:
            return stack.pop(place)
        for slot in self._newest_at_home() if self._is_large else away:  # once: the one that is out longest
            block = away.pop(slot)
            try:
                tail, page = block._tail
                if (
                    self._words[slot] == block._base
                    and self._words[tail] == page
                    and getrefcount(block) == _ALONE
                    and (block._view is None or is_unseen(block))
                ):
                    exporter = block._exporter
                    block._seen = None if exporter is None else block._base + exporter.nbytes
                    return block
            except BaseException:
                away[slot] = block
                raise
            away[slot] = block  # the next one may be faster
            break
        block = stack.pop()
        try:
            return block if getrefcount(block) == _ALONE else _renewed(block)
        except BaseException:
            stack.append(block)
            raise


def _renewed(block: Any) -> Block:
    """Another object for the memory of a cached block to which somebody refers, with what views are made of.

    A freed block has no view: the buffers are nobody's else."""
    new = type(block)(block.heap, block.slot, block.address, block.extent, 0)
    new._base = block._base
    exporter = block._exporter
    if exporter is not None:
        new._exporter, new._buffer, new._seen = exporter, block._buffer, block._base + exporter.nbytes
        block._exporter = block._buffer = block._seen = None
    return new  # type: ignore[no-any-return]
