"""How the class statement of a record becomes a layout: `_fields_` to ctypes' offsets and to descriptors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from heapd.errors import InvalidArgumentError
from heapd_client.arguments import shown

from .kinds import Bytes, Kind, Memory, Number

if TYPE_CHECKING:
    from heapd_client.mapping import Mapping

    from .record import Record

__all__ = ["Field", "RecordType"]

# What ctypes knows and records do not: better refused than silently not done.
_NOT_HERE: Final = ("_pack_", "_align_", "_anonymous_", "_layout_", "_swappedbytes_")


class Field:
    """A field of a record: `Node.key`. On a record it reads and writes the value.

    Fields: name; kind; offset, size (bytes, as ctypes lays them out).
    """

    __slots__ = ("_owner", "kind", "name", "offset", "size")

    def __init__(self, owner: RecordType, name: str, kind: Kind, offset: int) -> None:
        self._owner = owner.__name__
        self.name = name
        self.kind = kind
        self.offset = offset
        self.size = kind.size

    def __repr__(self) -> str:
        return f"<Field {self._owner}.{self.name} offset={self.offset} size={self.size}>"

    def __get__(self, record: Record | None, owner: type) -> Any:
        return self if record is None else self.kind.read(record, self.offset)

    def __set__(self, record: Record, value: Any) -> None:
        self.store(record.arena.base, record.locate(), value, record.arena)

    def store(self, memory: Memory, start: int, value: Any, arena: Mapping) -> None:
        """Write the field of a record that begins at index `start`. Raises: InvalidArgumentError."""
        try:
            self.kind.write(memory, start + self.offset, value, arena)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{self._owner}.{self.name}: {error}") from None


class RecordType(type):
    """The type of record types: reads `_fields_` as ctypes does. `Point * 3` is an array of records.

    Fields, of each record type: ctype (a ctypes structure of the same layout, links as c_uint64); fields (by name,
    those of a base first); sizeof (bytes).
    """

    ctype: type[ctypes.Structure]
    fields: dict[str, Field]

    if TYPE_CHECKING:  # a field that type checkers cannot know of

        def __getattr__(cls, name: str) -> Field: ...

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> RecordType:
        for wrong in _NOT_HERE:
            if wrong in namespace:
                raise InvalidArgumentError(f"{name}: records know no {wrong}; they have the machine's own layout")
        namespace.setdefault("__slots__", ())  # a mistyped field is an AttributeError
        cls = super().__new__(mcs, name, bases, namespace)
        base = next((base for base in bases if isinstance(base, RecordType)), None)
        if sum(isinstance(base, RecordType) for base in bases) > 1:
            raise InvalidArgumentError(f"{name}: a record has one base record, whose fields come first")
        cls._lay_out(base, namespace.get("_fields_", ()))
        return cls

    def _lay_out(cls, base: RecordType | None, declared: Any) -> None:
        kinds = dict(_declared(cls, declared))
        parent = ctypes.Structure if base is None else base.ctype
        members = [(name, kind.ctype) for name, kind in kinds.items()]
        ctype = type(cls.__name__, (parent,), {"_fields_": members})
        fields = {name: Field(cls, name, kind, getattr(ctype, name).offset) for name, kind in kinds.items()}
        for name, field in fields.items():
            type.__setattr__(cls, name, field)
        type.__setattr__(cls, "ctype", ctype)
        type.__setattr__(cls, "fields", {**(base.fields if base else {}), **fields})

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "_fields_" or name in cls.fields:
            raise InvalidArgumentError(
                f"{cls.__name__}.{name} is final; a record refers to its own type by name, as in Ref({cls.__name__!r})"
            )
        super().__setattr__(name, value)

    def __mul__(cls, count: int) -> Kind:
        return Part(cls) * count

    @property
    def sizeof(cls) -> int:
        """Bytes of a record."""
        return ctypes.sizeof(cls.ctype)

    def pack(cls, values: dict[str, Any], arena: Mapping) -> bytearray:
        """The bytes of a record with these values by field name, zero where none is given.

        Raises: InvalidArgumentError if a name is no field's or a value does not fit.
        """
        scratch = bytearray(cls.sizeof)
        for name, value in values.items():
            field = cls.fields.get(name)
            if field is None:
                known = ", ".join(cls.fields) or "none"
                raise InvalidArgumentError(f"{cls.__name__} has no field {shown(name)}; its fields: {known}")
            field.store(scratch, 0, value, arena)
        return scratch


def _declared(cls: RecordType, declared: Any) -> Iterator[tuple[str, Kind]]:
    """The fields that a class statement declares, checked."""
    if not isinstance(declared, Iterable):
        raise InvalidArgumentError(f"{cls.__name__}: _fields_ is a list of (name, type), not {shown(declared)}")
    seen = set()
    for item in declared:
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise InvalidArgumentError(f"{cls.__name__}: a field is (name, type), not {shown(item)}")
        name, spec = item
        if not name.isidentifier() or name in seen or hasattr(cls, name):
            raise InvalidArgumentError(f"{cls.__name__}: {name!r} cannot name a field: it is no name, or taken")
        seen.add(name)
        try:
            yield name, kind_of(spec).bound(cls)  # type: ignore[arg-type]
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{cls.__name__}.{name}: {error}") from None


class Part(Kind):
    """A record within a record; written from another one of its type, or from a dict of values."""

    def __init__(self, record_type: Any) -> None:
        super().__init__(record_type.ctype)
        self.record_type: type[Record] = record_type

    def read(self, record: Record, offset: int) -> Any:
        record.locate()
        return self.record_type.within(record, offset)

    def write(self, memory: Memory, at: int, value: Any, arena: Mapping) -> None:
        if isinstance(value, dict):
            content: Any = self.record_type.pack(value, arena)
        elif isinstance(value, self.record_type) and value.arena.instance == arena.instance:
            start = value.locate()
            content = bytes(value.arena.base[start : start + self.size])
        else:
            raise InvalidArgumentError(
                f"{shown(value)} is no {self.record_type.__name__} of this arena, nor a dict of its fields"
            )
        memory[at : at + self.size] = content


def kind_of(spec: Any) -> Kind:
    """The kind that a declaration's second half stands for. Raises: InvalidArgumentError if it is for none."""
    if isinstance(spec, Kind):
        return spec
    if isinstance(spec, RecordType):
        return Part(spec)
    if Number.is_one(spec):
        return Number(spec)
    if isinstance(spec, type) and issubclass(spec, ctypes.Array):
        array: Any = spec
        return Bytes(array._length_) if array._type_ is ctypes.c_char else kind_of(array._type_) * array._length_
    if isinstance(spec, type) and issubclass(spec, (ctypes.Structure, ctypes.Union)):
        raise InvalidArgumentError(f"{spec.__name__} is of ctypes; declare it as a Record")
    raise InvalidArgumentError(
        f"{shown(spec)} is no type of a field: a number of ctypes, c_char * n, Text(n), Ref, a Record, or an array of "
        f"these (a pointer is one process's own: use Ref)"
    )
