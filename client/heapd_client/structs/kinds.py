"""What a field of a record can be: how many bytes it has, how they are read and written.

Values are checked before any byte is written, and a write that fails has written nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from struct import Struct
from struct import error as StructError
from typing import TYPE_CHECKING, Any, Final, overload

from heapd.errors import InvalidArgumentError
from heapd.layout import MAX_BLOCK_SIZE
from heapd_client.arguments import shown

if TYPE_CHECKING:
    from heapd_client.mapping import Mapping

    from .record import Record

__all__ = ["Array", "Bytes", "Kind", "Number", "Text"]

Memory = memoryview | bytearray

# ctypes' letters of what has no pointer in it; struct's native mode knows the same ones by the same sizes.
_NUMBERS: Final = frozenset("?bBhHiIlLqQfdc")


class Kind:
    """What a field holds. `kind * n` is an array of it.

    Fields: ctype (the ctypes type that lays it out), size (bytes).
    """

    def __init__(self, ctype: Any) -> None:
        self.ctype = ctype
        self.size = ctypes.sizeof(ctype)

    def __mul__(self, count: int) -> ArrayKind:
        return ArrayKind(self, count)

    def bound(self, owner: type[Record]) -> Kind:
        """The kind as a field of `owner`, whose module says what names of records mean."""
        return self

    def read(self, record: Record, offset: int) -> Any:
        """The value at `offset` (bytes) of a record. Raises: as `Record.locate`."""
        raise NotImplementedError

    def write(self, memory: Memory, at: int, value: Any, arena: Mapping) -> None:
        """Store a value at index `at` of `memory`, which is that arena or will be copied to it.

        Raises: InvalidArgumentError if it is none for this kind; nothing is stored then.
        """
        raise NotImplementedError

    def show(self, record: Record, offset: int) -> str:
        """The value as `repr(record)` shows it."""
        return repr(self.read(record, offset))


class Number(Kind):
    """A number, truth value or single byte of ctypes, in the machine's own byte order."""

    def __init__(self, ctype: Any) -> None:
        super().__init__(ctype)
        # Native sizes; but only the other mode knows that a number is too large for a float.
        self._struct = Struct("=f" if ctype._type_ == "f" else f"@{ctype._type_}")

    @staticmethod
    def is_one(ctype: Any) -> bool:
        """True for a ctypes type that has no pointer and no foreign byte order."""
        letter = getattr(ctype, "_type_", None)
        return isinstance(letter, str) and letter in _NUMBERS and getattr(ctype, "__ctype_le__", ctype) is ctype

    def read(self, record: Record, offset: int) -> Any:
        return self._struct.unpack_from(record.arena.base, record.locate() + offset)[0]

    def write(self, memory: Memory, at: int, value: Any, arena: Mapping) -> None:
        try:
            if self.ctype._type_ == "?" and not isinstance(value, (bool, int)):
                raise TypeError
            memory[at : at + self.size] = self._struct.pack(value)  # one store; pack_into would zero the bytes first
        except (StructError, TypeError, OverflowError):
            raise InvalidArgumentError(f"{shown(value)} is no {self.ctype.__name__}") from None


class Bytes(Kind):
    """Bytes up to the first NUL, `size` at most; declared `c_char * size`."""

    def __init__(self, size: int) -> None:
        super().__init__(ctypes.c_char * _checked_count(size, 1))

    def read(self, record: Record, offset: int) -> Any:
        at = record.locate() + offset
        return bytes(record.arena.base[at : at + self.size]).partition(b"\0")[0]

    def write(self, memory: Memory, at: int, value: Any, arena: Mapping) -> None:
        if not isinstance(value, bytes):
            raise InvalidArgumentError(f"{shown(value)} is not bytes")
        self._store(memory, at, value)

    def _store(self, memory: Memory, at: int, data: bytes) -> None:
        if len(data) > self.size:
            raise InvalidArgumentError(f"{len(data)} bytes are more than the {self.size} of the field")
        if b"\0" in data:
            raise InvalidArgumentError("a NUL would end it early")
        memory[at : at + self.size] = data.ljust(self.size, b"\0")


class Text(Bytes):
    """A string of at most `size` bytes of UTF-8."""

    def read(self, record: Record, offset: int) -> Any:
        data = super().read(record, offset)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise InvalidArgumentError(f"the bytes at {record.address + offset:#x} are no UTF-8") from None

    def write(self, memory: Memory, at: int, value: Any, arena: Mapping) -> None:
        if not isinstance(value, str):
            raise InvalidArgumentError(f"{shown(value)} is no str")
        try:
            self._store(memory, at, value.encode())
        except UnicodeEncodeError:
            raise InvalidArgumentError(f"{shown(value)} cannot be encoded as UTF-8") from None


class ArrayKind(Kind):
    """A fixed number of elements of one kind; read as an Array, written from as many values."""

    def __init__(self, element: Kind, count: int) -> None:
        super().__init__(element.ctype * _checked_count(count, element.size))
        self.element = element
        self.count = count

    def bound(self, owner: type[Record]) -> Kind:
        return ArrayKind(self.element.bound(owner), self.count)

    def read(self, record: Record, offset: int) -> Any:
        record.locate()
        return Array(record, self.element, offset, self.count)

    def write(self, memory: Memory, at: int, value: Any, arena: Mapping) -> None:
        try:
            values = list(value)
        except TypeError:
            raise InvalidArgumentError(f"{shown(value)} is no sequence of {self.count} values") from None
        if len(values) != self.count:
            raise InvalidArgumentError(f"{len(values)} values are given; the array has {self.count}")
        scratch = bytearray(self.size)
        for index, each in enumerate(values):
            try:
                self.element.write(scratch, index * self.element.size, each, arena)
            except InvalidArgumentError as error:
                raise InvalidArgumentError(f"element {index}: {error}") from None
        memory[at : at + self.size] = scratch


class Array(Sequence[Any]):
    """An array within a record, read and written where it lies; good for as long as the record is."""

    __slots__ = ("_count", "_element", "_offset", "_record")

    def __init__(self, record: Record, element: Kind, offset: int, count: int) -> None:
        """For the library alone."""
        self._record = record
        self._element = element
        self._offset = offset
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """An element, or a list of some of them. Raises: IndexError, TypeError; as `Record.locate`."""
        if isinstance(index, slice):
            return [self._element.read(self._record, self._place(each)) for each in range(self._count)[index]]
        return self._element.read(self._record, self._find(index))

    def __setitem__(self, index: int | slice, value: Any) -> None:
        """Store one element; assign to the record's field to store all.

        Raises: IndexError, TypeError, InvalidArgumentError; as `Record.locate`. Nothing has changed then.
        """
        if isinstance(index, slice):
            raise TypeError("elements are stored one by one, or all of them by assigning to the record's field")
        record, place = self._record, self._find(index)
        try:
            self._element.write(record.arena.base, record.locate() + place, value, record.arena)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"element {index} of an array: {error}") from None

    def _find(self, index: Any) -> int:
        """Where an element is that a user named. Raises: IndexError, TypeError."""
        try:
            return self._place(range(self._count)[index])
        except TypeError:
            raise TypeError(f"an array's index is an int or a slice, not {type(index).__name__}") from None
        except IndexError:
            raise IndexError(
                f"there is no element {shown(index)} in the array at {self._record.locate() + self._offset:#x}, part of"
                f" a {type(self._record).__name__}: it has {self._count}, so use 0 to {self._count - 1}, or -1 to"
                f" {-self._count} from its end"
            ) from None

    def _place(self, index: int) -> int:
        return self._offset + index * self._element.size

    def __repr__(self) -> str:
        places = map(self._place, range(self._count))
        return f"[{', '.join(self._element.show(self._record, place) for place in places)}]"


def _checked_count(count: Any, size: int) -> int:
    """Args: size (bytes of each of so many)."""
    if not isinstance(count, int) or count < 1:
        raise InvalidArgumentError(f"a field has a size of 1 or more, not {shown(count)}")
    if count * size > MAX_BLOCK_SIZE:
        raise InvalidArgumentError(f"a field of {count} times {size} bytes fits no block")
    return count
