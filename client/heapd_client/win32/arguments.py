"""Arguments as C takes them: integers of a fixed width, NULL in its forms, a structure by value, byref or pointer.

A wrong Python type is a TypeError; a wrong value is for the function to judge.
"""

from __future__ import annotations

import ctypes
from operator import index
from typing import Any, Final, TypeVar

from .constants import DWORD_MAX, SIZE_T_MAX

__all__ = ["address", "buffer_of", "dword", "handles_buffer", "instance_of", "size_t"]

_T = TypeVar("_T", bound=ctypes.Structure)
_ARRAY: Final = ctypes.Array
_BYREF: Final = type(ctypes.byref(ctypes.c_int()))
_SIMPLE: Final = ctypes.c_int.__mro__[1]  # ctypes._SimpleCData
_POINTER: Final = ctypes.POINTER(ctypes.c_int).__mro__[1]  # ctypes._Pointer


def _integer(value: Any, what: str) -> int:
    try:
        return int(index(value))  # int(): arithmetic with an IntFlag is slow, and gives an IntFlag
    except TypeError:
        raise TypeError(f"{what} is an int, not {type(value).__name__}") from None


def dword(value: Any) -> int:
    """A DWORD, modulo 2**32."""
    return _integer(value, "a DWORD") & DWORD_MAX


def size_t(value: Any) -> int:
    """A SIZE_T, modulo 2**64."""
    return _integer(value, "a SIZE_T") & SIZE_T_MAX


def address(value: Any) -> int:
    """A handle or an address, modulo 2**64; None and 0 are NULL."""
    return 0 if value is None else _integer(value, "a handle or an address") & SIZE_T_MAX


def _target(value: Any) -> Any:
    """The ctypes object that an argument stands for; None for NULL."""
    if value is None or (type(value) is int and value == 0):
        return None
    if isinstance(value, _BYREF):
        return value._obj  # type: ignore[attr-defined]
    if isinstance(value, _POINTER):
        return value.contents if value else None  # type: ignore[attr-defined]
    return value


def instance_of(value: Any, kind: type[_T]) -> _T | None:
    """The structure that an argument stands for: the instance, byref or a pointer; None for NULL."""
    found = _target(value)
    if found is not None and not isinstance(found, kind):
        raise TypeError(f"a {kind.__name__} is needed, its byref or a pointer to it, not {type(found).__name__}")
    return found


def buffer_of(value: Any) -> ctypes.Structure | Any | None:
    """Any ctypes object to be read or written as bytes: the instance, byref or a pointer; None for NULL."""
    found = _target(value)
    if found is not None and not isinstance(found, (_SIMPLE, _ARRAY, ctypes.Structure, ctypes.Union)):
        raise TypeError(f"a ctypes object is needed, its byref or a pointer to it, not {type(found).__name__}")
    return found


def handles_buffer(value: Any) -> Any:
    """A list, or a ctypes array of integers as wide as a handle; None for NULL."""
    found = value if isinstance(value, list) else _target(value)
    if found is None or isinstance(found, list):
        return found
    if isinstance(found, _ARRAY) and ctypes.sizeof(found._type_) == ctypes.sizeof(ctypes.c_void_p):
        return found
    raise TypeError(f"a list or a ctypes array of c_size_t is needed for handles, not {type(found).__name__}")
