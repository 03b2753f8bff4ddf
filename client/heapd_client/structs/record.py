"""A record: a block of a type, whose fields are looked up only after seeing that the block is still there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from heapd.errors import ClosedError, DoubleFreeError, InvalidArgumentError, StaleHandleError, WrongHeapError
from heapd_client.arguments import shown
from heapd_client.block import Block
from heapd_client.heap import Heap

from .declaration import RecordType

if TYPE_CHECKING:
    from heapd_client.mapping import Mapping

__all__ = ["Record"]


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
        def __setattr__(self, name: str, value: Any) -> None: ...

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


def _check_heap(heap: Any) -> None:
    if not isinstance(heap, Heap):
        raise InvalidArgumentError(f"a record lies in a Heap, not in {shown(heap)}")
