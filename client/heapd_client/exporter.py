"""What the views of a block are cut from: a memoryview of the block's bytes that cannot be released under them.

A memoryview of a memoryview shares its buffer, and the first one would not notice. One of a `PickleBuffer` has a
buffer of its own and refers to the exporter: as long as any view is alive, the exporter has a reference more.

Python 3.11, and 3.12 before 3.12.7, crash when the garbage collector breaks a cycle with such an exporter in it
(CPython's issue 77894): an exception's traceback with a view in some frame will do. There an exporter has a reference
that the collector cannot follow, so that it is never part of what is to be broken, until nothing else refers to it.
"""

from __future__ import annotations

import gc
import sys
from pickle import PickleBuffer
from sys import getrefcount
from typing import Any, Final

__all__ = ["IDLE", "make_exporter", "release_exporter"]

_IS_PINNED: Final = sys.version_info < (3, 12, 7)

IDLE: Final = 3 + _IS_PINNED  # references if no view is alive: the block's, the buffer's, getrefcount's; and the pin

_pins: Final[dict[int, memoryview]] = {}  # by id()
_UNUSED: Final = 3  # references to one that nobody needs: the pin, a local name, getrefcount's
_SOME: Final = 1000  # arbitrary: pins that are not worth a look
_look_at = _SOME


def make_exporter(base: memoryview, start: int, size: int) -> tuple[memoryview, PickleBuffer]:
    """Args: base (of the mapping), start, size (bytes). Returns: the exporter; what to make views of."""
    exporter = base[start : start + size]
    if _IS_PINNED:
        _pins[id(exporter)] = exporter
        if len(_pins) > _look_at:
            _drop_unused()
    return exporter, PickleBuffer(exporter)


def release_exporter(exporter: memoryview) -> None:
    """The block is done with it; no view is alive."""
    _pins.pop(id(exporter), None)
    exporter.release()


def _drop_unused() -> None:
    """Drop the pins of blocks that were dropped; the next look is when there are twice as many as are left."""
    global _look_at
    for key in list(_pins):
        exporter = _pins.get(key)
        if exporter is not None and getrefcount(exporter) <= _UNUSED:
            _pins.pop(key, None)
    _look_at = max(2 * len(_pins), _SOME)


def _after_collection(phase: str, info: dict[str, Any]) -> None:
    """The collector has looked at everything: blocks may have gone, and their mapping may go."""
    if phase == "stop" and info["generation"] == 2 and _pins:
        _drop_unused()


if _IS_PINNED:
    gc.callbacks.append(_after_collection)
