"""The moveable objects of a process: which handle stands for what, and where its data is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from .constants import ERROR_INVALID_HANDLE, ERROR_NOT_ENOUGH_MEMORY
from .last_error import Failure

__all__ = ["MAX_LOCKS", "Moveable", "Table", "is_handle"]

MAX_LOCKS: Final = 255
_FIRST_HANDLE: Final = 1 << 56 | 8  # beyond any arena
_STEP: Final = 16
_MAX_OBJECTS: Final = 65_536


def is_handle(mem: int) -> bool:
    """Whether a number may be an object's handle; if not it is an address. One bit tells them apart."""
    return mem % _STEP == _FIRST_HANDLE % _STEP


@dataclass(slots=True)
class Moveable:
    """A moveable object: address (0: discarded), locks, is_discardable, is_shared (DDESHARE was asked for)."""

    address: int
    is_discardable: bool = False
    is_shared: bool = False
    locks: int = 0


class Table:
    """The moveable objects of a process, by handle and by address."""

    def __init__(self) -> None:
        self._objects: dict[int, Moveable] = {}
        self._handles: dict[int, int] = {}
        self._unused: deque[int] = deque()  # freed handles, oldest first: a stale one is known for as long as possible
        self._next = _FIRST_HANDLE

    def add(self, found: Moveable) -> int:
        """A handle for an object. Raises: Failure(ERROR_NOT_ENOUGH_MEMORY) if there are 65,536."""
        if len(self._objects) >= _MAX_OBJECTS:
            raise Failure(ERROR_NOT_ENOUGH_MEMORY, f"there are {_MAX_OBJECTS} moveable objects")
        if self._next < _FIRST_HANDLE + _MAX_OBJECTS * _STEP:
            handle = self._next
            self._next += _STEP
        else:
            handle = self._unused.popleft()
        self._objects[handle] = found
        self.place(handle, found.address)
        return handle

    def place(self, handle: int, address: int) -> None:
        """Say where a handle's object is now; 0: discarded."""
        found = self._objects[handle]
        old, found.address = found.address, address
        self.note_move(handle, old)

    def note_move(self, handle: int, old: int) -> None:
        """A handle's object has another address than `old` now."""
        self._handles.pop(old, None)
        address = self._objects[handle].address
        if address:
            self._handles[address] = handle

    def remove(self, handle: int) -> None:
        self._handles.pop(self._objects.pop(handle).address, None)
        self._unused.append(handle)

    def find(self, handle: int) -> Moveable:
        """Raises: Failure(ERROR_INVALID_HANDLE) for a freed handle, or one that never was."""
        found = self._objects.get(handle)
        if found is None:
            raise Failure(ERROR_INVALID_HANDLE, f"{handle:#x} is no object's handle")
        return found

    def handle_at(self, address: int) -> int:
        """The handle of the object at an address; 0 if there is none."""
        return self._handles.get(address, 0)
