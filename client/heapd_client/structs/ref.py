"""Links between records.

A link is one word of 8 bytes, written by one store: 0 for None, else

    bits 0-46   the record's address in the arena
    bits 47-63  the low bits of its block's generation

The generation tells a record from another one that was allocated at its place since, so that a link left behind by
`free` is found out when it is followed (all but one time in 2**17, should as many records have come and gone there; one
in 2**14 for those of a page and more). To link to a block marks it, as making a handle does: only then does freeing it
count its generation up.
"""

from __future__ import annotations

import sys
from ctypes import c_uint64
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from heapd.errors import InvalidArgumentError, NotABlockError, StaleHandleError
from heapd_client.arguments import shown

from .declaration import RecordType
from .kinds import Kind, Memory

if TYPE_CHECKING:
    from heapd_client.mapping import Mapping

    from .record import Record

__all__ = ["Ref"]

_ADDRESS_BITS: Final = 47  # what a process may map on x86-64
_ADDRESS_MASK: Final = (1 << _ADDRESS_BITS) - 1
_GENERATION_MASK: Final = (1 << 64 - _ADDRESS_BITS) - 1
_WORD: Final = Struct("@Q")


class Ref(Kind):
    """A link to a record of one type, or None.

    Args: target (a Record type; or its name, which may be that of the type being declared or of one declared later in
    the same module).
    """

    def __init__(self, target: type[Record] | str) -> None:
        super().__init__(c_uint64)
        self._target: Any = target
        self._owner: type[Record] | None = None
        if not isinstance(self._target, (RecordType, str)):
            raise InvalidArgumentError(f"a Ref is to a Record type or its name, not to {shown(target)}")

    def bound(self, owner: type[Record]) -> Kind:
        ref = Ref(self._target)
        ref._owner = owner
        return ref

    @property
    def target(self) -> type[Record]:
        """The type it leads to. Raises: InvalidArgumentError if there is none of that name."""
        if isinstance(self._target, str):
            self._target = self._find(self._target)
        found: type[Record] = self._target
        return found

    def _find(self, name: str) -> Any:
        owner = self._owner
        assert owner is not None, "a Ref that is a field is bound"
        found = owner if name == owner.__name__ else getattr(sys.modules[owner.__module__], name, None)
        if not isinstance(found, RecordType):
            raise InvalidArgumentError(f"there is no Record type {name!r} in the module {owner.__module__}")
        return found

    def read(self, record: Record, offset: int) -> Any:
        word = self._word(record, offset)
        if not word:
            return None
        address = word & _ADDRESS_MASK
        try:
            block = record.block.heap.session.block_at(address)
        except (NotABlockError, StaleHandleError):
            raise self._dangling(address) from None
        if block.generation & _GENERATION_MASK != word >> _ADDRESS_BITS:
            raise self._dangling(address)
        return self.target(block)

    def write(self, memory: Memory, at: int, value: Any, arena: Mapping) -> None:
        word = 0
        if value is not None:
            if not isinstance(value, self.target):
                raise InvalidArgumentError(f"{shown(value)} is no {self.target.__name__}, nor None")
            if value.is_part:
                raise InvalidArgumentError(f"{shown(value)} is part of another record; a link leads to a whole one")
            if value.arena.instance != arena.instance:
                raise InvalidArgumentError(f"{shown(value)} is in another arena")
            word = value.locate() | (value.block.generation & _GENERATION_MASK) << _ADDRESS_BITS
        memory[at : at + self.size] = _WORD.pack(word)  # one store; pack_into would zero the bytes first

    def show(self, record: Record, offset: int) -> str:
        word = self._word(record, offset)
        return f"{word & _ADDRESS_MASK:#x}" if word else "None"

    def _word(self, record: Record, offset: int) -> int:
        word: int = _WORD.unpack_from(record.arena.base, record.locate() + offset)[0]
        return word

    def _dangling(self, address: int) -> StaleHandleError:
        return StaleHandleError(
            f"the {self.target.__name__} at {address:#x} that the link led to was freed", address=address
        )
