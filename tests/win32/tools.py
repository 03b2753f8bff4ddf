"""What the checks of the Win32 functions share."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from heapd_client import win32

KIB, MIB = 1 << 10, 1 << 20
SENTINEL = 0x5E17  # a last error that no function sets
BEYOND = 1 << 50  # an address beyond any arena, and no handle of an object
NO_BLOCK = 0x1230  # an address in the arena, where no block is


@contextmanager
def new_heap(options: int = 0, initial: int = 0, maximum: int = 0) -> Iterator[int]:
    """A heap of its own."""
    heap = win32.HeapCreate(options, initial, maximum)
    assert heap, win32.GetLastError()
    try:
        yield heap
    finally:
        win32.HeapDestroy(heap)


def expect(result: Any, error: int | None, function: Callable[..., Any], *arguments: Any) -> None:
    """The call gives `result` and sets the last error; None: it keeps it."""
    win32.SetLastError(SENTINEL)
    found = function(*arguments)
    assert found == result, f"{function.__name__}{arguments}: {found!r}, not {result!r}"
    code = win32.GetLastError()
    wanted = SENTINEL if error is None else error
    assert code == wanted, f"{function.__name__}{arguments}: last error {code}, not {wanted}"


def raised_by(function: Callable[..., Any], *arguments: Any) -> int:
    """The code of the structured exception that the call raises."""
    try:
        found = function(*arguments)
    except win32.StructuredException as error:
        return error.code
    raise AssertionError(f"{function.__name__}{arguments} returned {found!r}")


def write(address: int, text: bytes) -> None:
    win32.memory(address, len(text))[:] = text


def read(address: int, size: int) -> bytes:
    return bytes(win32.memory(address, size))


def walk(heap: int) -> list[win32.PROCESS_HEAP_ENTRY]:
    """Every element of the heap, as HeapWalk fills it in."""
    found, entry = [], win32.PROCESS_HEAP_ENTRY()
    while win32.HeapWalk(heap, entry):
        found.append(win32.PROCESS_HEAP_ENTRY.from_buffer_copy(entry))
    assert win32.GetLastError() == win32.ERROR_NO_MORE_ITEMS
    return found


def raw(entries: list[win32.PROCESS_HEAP_ENTRY]) -> list[bytes]:
    """Byte by byte."""
    return [bytes(entry) for entry in entries]


def busy(heap: int) -> list[tuple[int, int]]:
    """(address, size) of the blocks of a walk."""
    flag = int(win32.PROCESS_HEAP_ENTRY_BUSY)
    return [(entry.lpData, entry.cbData) for entry in walk(heap) if entry.wFlags & flag]


def summary(heap: int) -> win32.HEAP_SUMMARY:
    found = win32.HEAP_SUMMARY(cb=ctypes.sizeof(win32.HEAP_SUMMARY))
    assert win32.HeapSummary(heap, 0, found)
    return found


def compatibility(heap: int) -> int:
    value = ctypes.c_uint32(99)
    assert win32.HeapQueryInformation(heap, win32.HeapCompatibilityInformation, value, 4, None)
    return value.value


def set_compatibility(heap: int, value: int) -> bool:
    return win32.HeapSetInformation(heap, win32.HeapCompatibilityInformation, ctypes.c_uint32(value), 4)


class Elsewhere(threading.Thread):
    """A call in another thread: `result` once `is_done`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self._call = function, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        function, arguments = self._call
        try:
            self.result = function(*arguments)
        except BaseException as error:
            self.error = error

    def is_waiting(self, for_s: float = 0.15) -> bool:
        """Whether it is not done in that time."""
        self.join(for_s)
        return self.is_alive()

    def get(self, deadline_s: float = 10.0) -> Any:
        self.join(deadline_s)
        assert not self.is_alive(), f"{self._call[0].__name__} did not return within {deadline_s:g} s"
        if self.error is not None:
            raise self.error
        return self.result
