"""What callers pass: checked, and turned into the one type that the rest of the client works with."""

from __future__ import annotations

from operator import index
from typing import Any, Final

from heapd.errors import InvalidArgumentError

__all__ = ["as_count", "as_patience", "as_pid", "as_size", "as_timeout", "shown"]

_FOR_EVER_S: Final = 1e9


def shown(value: object) -> str:
    """A value in an error message: not longer than a line."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def as_size(size: Any) -> int:
    """Bytes, of whatever counts as an int, such as numpy's. Raises: InvalidArgumentError."""
    try:
        value = index(size)
    except TypeError:
        raise InvalidArgumentError(f"a size is a count of bytes, not {type(size).__name__}") from None
    if not 0 <= value < 1 << 64:
        raise InvalidArgumentError("a size is a count of bytes, 0 to 2**64 - 1")
    return value


def as_count(count: Any, most: int) -> int:
    """How many blocks. Raises: InvalidArgumentError if that is no number, negative or more than `most`."""
    try:
        value = index(count)
    except TypeError:
        raise InvalidArgumentError(f"a count of blocks is an int, not {type(count).__name__}") from None
    if not 0 <= value <= most:
        raise InvalidArgumentError(f"a count of blocks is 0 to {most}, not {shown(count)}")
    return value


def as_timeout(timeout: Any) -> float | None:
    """Seconds, or None for no limit. Raises: InvalidArgumentError for what is neither."""
    if timeout is None:
        return None
    if not _is_number(timeout) or not timeout >= 0:
        raise InvalidArgumentError(f"a timeout is seconds, 0 or more, or None; not {shown(timeout)}")
    return min(float(timeout), _FOR_EVER_S)


def as_patience(timeout: Any) -> float:
    """As `as_timeout`, of what cannot be done without waiting a little, and must end."""
    if not _is_number(timeout) or not timeout > 0:
        raise InvalidArgumentError(f"this timeout is seconds, more than 0; not {shown(timeout)}")
    return min(float(timeout), _FOR_EVER_S)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_pid(pid: Any) -> int:
    """A process id, 0 for None. Raises: InvalidArgumentError."""
    if pid is None:
        return 0
    if not isinstance(pid, int) or not 0 < pid < 1 << 31:
        raise InvalidArgumentError(f"a process id is an int from 1, not {shown(pid)}")
    return pid
