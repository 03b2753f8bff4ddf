"""How a Win32 function fails: the calling thread's last error, and the exceptions of HEAP_GENERATE_EXCEPTIONS.

Inside the package a function that cannot go on raises Failure, and `fails_with` makes of it what its caller gets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

from heapd.errors import (
    BlockInUseError,
    ClosedError,
    DoubleFreeError,
    ExecuteError,
    HeapdError,
    HeapDestroyedError,
    LimitError,
    LockNotHeldError,
    LockTimeoutError,
    NoSuchHeapError,
    NotABlockError,
    NotPermittedError,
    StaleHandleError,
    WrongHeapError,
)

from .arguments import dword
from .constants import (
    ERROR_ACCESS_DENIED,
    ERROR_INVALID_HANDLE,
    ERROR_INVALID_PARAMETER,
    ERROR_NOT_ENOUGH_MEMORY,
    ERROR_NOT_LOCKED,
    STATUS_ACCESS_VIOLATION,
    STATUS_NO_MEMORY,
)

__all__ = [
    "Failure",
    "GetLastError",
    "SetLastError",
    "StructuredException",
    "attempt",
    "failure_of",
    "fails_with",
    "patiently",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Thread(threading.local):
    last_error = 0


_thread: Final = _Thread()


def GetLastError() -> int:
    """Why the calling thread's last failing function failed (ERROR_*). A function that succeeds leaves it alone."""
    return _thread.last_error


def SetLastError(dwErrCode: int) -> None:
    """Set the calling thread's last error."""
    _thread.last_error = dword(dwErrCode)


class StructuredException(Exception):
    """What HEAP_GENERATE_EXCEPTIONS raises. `code`: STATUS_NO_MEMORY or STATUS_ACCESS_VIOLATION."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        name = {STATUS_NO_MEMORY: "STATUS_NO_MEMORY", STATUS_ACCESS_VIOLATION: "STATUS_ACCESS_VIOLATION"}.get(self.code)
        return f"{name or 'exception'} ({self.code:#010x}){': ' if self.reason else ''}{self.reason}"


class Failure(Exception):
    """The function fails with that last error; None: the last error is kept."""

    def __init__(self, code: int | None, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def set(self, result: _T) -> _T:
        """Set the last error; `result` is what the function returns."""
        if self.code is not None:
            _thread.last_error = self.code
        return result

    def throw(self) -> NoReturn:
        """As the exception that the caller asked for."""
        code = STATUS_NO_MEMORY if self.code == ERROR_NOT_ENOUGH_MEMORY else STATUS_ACCESS_VIOLATION
        raise StructuredException(code, self.reason) from None


# Everything else, such as a daemon that does not answer, has no Win32 code and stays the exception it is.
_CODES: Final[tuple[tuple[tuple[type[HeapdError], ...] | type[MemoryError], int], ...]] = (
    (MemoryError, ERROR_NOT_ENOUGH_MEMORY),
    ((LimitError,), ERROR_NOT_ENOUGH_MEMORY),
    ((HeapDestroyedError, NoSuchHeapError, ClosedError), ERROR_INVALID_HANDLE),
    ((NotPermittedError, ExecuteError, BlockInUseError), ERROR_ACCESS_DENIED),
    ((LockNotHeldError,), ERROR_NOT_LOCKED),
    ((DoubleFreeError, StaleHandleError, NotABlockError, WrongHeapError), ERROR_INVALID_PARAMETER),
)


def failure_of(error: HeapdError) -> Exception:
    """The Failure that an error is; the error itself if Windows has no code for it."""
    for kinds, code in _CODES:
        if isinstance(error, kinds):
            return Failure(code, str(error))
    return error


def patiently(function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
    """Call a function of a heap; wait for the heap's mutex without limit. Raises: Failure."""
    while True:
        try:
            return function(*arguments, **options)
        except LockTimeoutError:
            continue
        except HeapdError as error:
            raise failure_of(error) from None


def attempt(result: Any, function: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
    """Call a function; on Failure set the last error and return `result`."""
    try:
        return patiently(function, *arguments, **options)
    except Failure as failure:
        return failure.set(result)  # type: ignore[no-any-return]


def fails_with(result: Any) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """A decorator: `attempt` with this result."""

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @wraps(function)
        def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
            return attempt(result, function, *arguments, **options)

        return call

    return decorate
