"""Records: how a class statement becomes a layout, and how a record finds its bytes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from heapd.errors import (
    ClosedError,
    DoubleFreeError,
    InvalidArgumentError,
    StaleHandleError,
    WrongHeapError,
)
from heapd_client.block import Block
from heapd_client.heap import Heap

from .kinds import Bytes, Kind, Memory, Number, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from heapd_client.mapping import Mapping

__all__ = ["Field", "Record", "RecordType"]

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
        kinds = dict(_declared(cls, declared, base))
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


def _declared(cls: RecordType, declared: Any, base: RecordType | None) -> Iterable[tuple[str, Kind]]:
    """The fields that a class statement declares, checked."""
    seen = set(base.fields) if base else set()
    for item in declared:
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise InvalidArgumentError(f"{cls.__name__}: a field is (name, type), not {shown(item)}")
        name, spec = item
        if not name.isidentifier() or name in seen or hasattr(Record, name):
            raise InvalidArgumentError(f"{cls.__name__}: {name!r} cannot name a field: it is no name, or taken")
        seen.add(name)
        try:
            yield name, kind_of(spec).bound(cls)  # type: ignore[arg-type]
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{cls.__name__}.{name}: {error}") from None


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


class Record(metaclass=RecordType):
    """A typed view of a block. Subclass it with `_fields_`, then `alloc`.

    `Node(block)` is the record in a block that exists, say of `heap.lookup`; it may be larger than the record.
    Raises (all access to fields): ClosedError if the record was freed through this object; StaleHandleError if it was
    freed otherwise, here or in another process; HeapDestroyedError; InvalidArgumentError for a value that does not fit
    its field. Nothing has changed then.
    """

    __slots__ = ("_block", "_outer", "_start", "_word")
    _fields_: ClassVar[Any] = ()

    if TYPE_CHECKING:  # the fields; as ctypes' stubs have it

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, block: Block) -> None:
        """Raises: InvalidArgumentError if the block is none, or too small; as for fields if it was freed."""
        if not isinstance(block, Block):
            raise InvalidArgumentError(f"{type(self).__name__} lies in a Block, not in {shown(block)}")
        self._block = block
        self._outer: Record | None = None
        self._start = 0  # bytes from the outer record's start
        self._word = 0  # the block's state word when it was last looked at
        self.locate()

    @classmethod
    def alloc(cls, heap: Heap, /, **values: Any) -> Self:
        """Allocate a block for a record; fields without a value are zero, None or empty.

        Raises: InvalidArgumentError, and as Heap.alloc; nothing is allocated then.
        """
        _check_heap(heap)
        content = cls.pack(values, heap.mapping)
        block = heap.alloc(len(content))
        try:
            heap.mapping.base[block.address : block.address + len(content)] = content
            return cls(block)
        except BaseException:  # of a signal handler: nobody would ever hear of the block
            block.free()
            raise

    @classmethod
    def at(cls, heap: Heap, address: int) -> Self:
        """The record in the block of `heap` that begins at `address`, whoever allocated it.

        Raises: NotABlockError, WrongHeapError; InvalidArgumentError if the block is too small for this type.
        """
        _check_heap(heap)
        block = heap.session.block_at(address)
        if block.heap.id != heap.id:
            raise WrongHeapError(f"the block at {address:#x} is of another heap", address=address)
        return cls(block)

    @classmethod
    def within(cls, outer: Record, start: int) -> Self:
        """For the library: the record that lies `start` bytes into another one."""
        part = cls.__new__(cls)
        part._block, part._outer, part._start, part._word = outer.block, outer, start, 0
        return part

    @property
    def block(self) -> Block:
        """The block it lies in: to publish, to send elsewhere."""
        return self._block

    @property
    def arena(self) -> Mapping:
        """The mapping it lies in."""
        return self._block.heap.mapping

    @property
    def address(self) -> int:
        """Where it begins: bytes from the arena's base, the same in every process. To ask marks the block, as making a
        handle does: somebody may come by that address, and is told then when the record was freed."""
        self._block.generation  # noqa: B018
        return self._start + (self._block.address if self._outer is None else self._outer.address)

    @property
    def is_part(self) -> bool:
        """It lies within another record, and lives and dies with that."""
        return self._outer is not None

    def free(self) -> None:
        """Free the block. Links to it stay where they are; who follows one is refused. Raises: as Block.free."""
        if self.is_part:
            raise InvalidArgumentError(f"this {type(self).__name__} is part of another record; free that one")
        self._block.free()

    def locate(self) -> int:
        """Its address, after seeing that it is there; what every access to a field begins with. Raises: see Record."""
        if self._outer is not None:
            return self._outer.locate() + self._start
        block = self._block
        if block.is_free:
            raise ClosedError(f"the {type(self).__name__} at {block.address:#x} was freed", address=block.address)
        block.heap.check()
        try:
            word = block.heap.word_of(block)
        except (DoubleFreeError, StaleHandleError):
            text = f"the {type(self).__name__} at {block.address:#x} was freed by somebody else"
            raise StaleHandleError(text, address=block.address) from None
        if word != self._word:
            self._check_size(block.heap.mapping.shape.word_format(block.slot).size(word))
            self._word = word
        return block.address

    def _check_size(self, size: int) -> None:
        """Args: size (bytes of the block, which is new to us or was resized)."""
        if size < type(self).sizeof:
            raise InvalidArgumentError(
                f"the block at {self._block.address:#x} has {size} bytes; {type(self).__name__} takes "
                f"{type(self).sizeof}"
            )

    def __eq__(self, other: object) -> bool:
        """The same type at the same place, in the same life of the block."""
        if not isinstance(other, Record):
            return NotImplemented
        return (type(self), self.address, self.arena.instance, self._life) == (
            type(other), other.address, other.arena.instance, other._life
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((type(self), self.address))

    @property
    def _life(self) -> int:
        if self._outer is not None:
            return self._outer._life
        return self.arena.shape.word_format(self._block.slot).generation(self._word)

    def __repr__(self) -> str:
        name = f"{type(self).__name__} at {self.address:#x}"
        try:
            values = [f"{field.name}={field.kind.show(self, field.offset)}" for field in type(self).fields.values()]
        except (LookupError, ValueError) as error:
            return f"<{name}: {error}>"
        return f"<{' '.join([name, *values])}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._outer is not None:
            return type(self).within, (self._outer, self._start)
        return type(self), (self._block,)


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


def _check_heap(heap: Any) -> None:
    if not isinstance(heap, Heap):
        raise InvalidArgumentError(f"a record lies in a Heap, not in {shown(heap)}")
