"""The structures of the heap functions, with the field names and layouts of the 64-bit Windows headers.

Pointers and handles are plain integers (0 is NULL), so that a structure is filled and read without casts.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from typing import ClassVar

__all__ = [
    "HEAPENTRY32",
    "HEAPLIST32",
    "HEAP_OPTIMIZE_RESOURCES_INFORMATION",
    "HEAP_SUMMARY",
    "PROCESS_HEAP_ENTRY",
]


class _Fields(Structure):
    """A structure that prints its fields."""

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name):#x}" for name, kind, *_ in self._fields_ if kind in _INTEGERS)
        return f"{type(self).__name__}({fields})"


_INTEGERS = (c_uint8, c_uint16, c_uint32, c_uint64, c_size_t)


class _Block(_Fields):
    _fields_: ClassVar = [("hMem", c_uint64), ("dwReserved", c_uint32 * 3)]


class _Region(_Fields):
    _fields_: ClassVar = [
        ("dwCommittedSize", c_uint32),
        ("dwUnCommittedSize", c_uint32),
        ("lpFirstBlock", c_uint64),
        ("lpLastBlock", c_uint64),
    ]


class _BlockOrRegion(Union):
    _fields_: ClassVar = [("Block", _Block), ("Region", _Region)]


class PROCESS_HEAP_ENTRY(_Fields):
    """One element of HeapWalk, and all there is of the walk's state.

    Fields: lpData (address), cbData (bytes, at most 2**32 - 1), cbOverhead (bytes, at most 255), iRegionIndex (64: in
    none), wFlags (PROCESS_HEAP_*), Block (of a moveable block; never used), Region (of a REGION: dwCommittedSize and
    dwUnCommittedSize in bytes, at most 2**32 - 1, lpFirstBlock, lpLastBlock).
    """

    _anonymous_ = ("u",)
    _fields_: ClassVar = [
        ("lpData", c_uint64),
        ("cbData", c_uint32),
        ("cbOverhead", c_uint8),
        ("iRegionIndex", c_uint8),
        ("wFlags", c_uint16),
        ("u", _BlockOrRegion),
    ]


class HEAPLIST32(_Fields):
    """A heap of a Toolhelp snapshot.

    Fields: dwSize (bytes of the structure, set by the caller), th32ProcessID, th32HeapID (the heap's handle), dwFlags
    (HF32_*).
    """

    _fields_: ClassVar = [
        ("dwSize", c_size_t),
        ("th32ProcessID", c_uint32),
        ("th32HeapID", c_uint64),
        ("dwFlags", c_uint32),
    ]


class HEAPENTRY32(_Fields):
    """A block as Toolhelp tells of it.

    Fields: dwSize (bytes of the structure, set by the caller), hHandle (the heap's handle), dwAddress, dwBlockSize
    (bytes), dwFlags (LF32_*), dwLockCount (0), dwResvd (how many came before it), th32ProcessID, th32HeapID.
    """

    _fields_: ClassVar = [
        ("dwSize", c_size_t),
        ("hHandle", c_uint64),
        ("dwAddress", c_uint64),
        ("dwBlockSize", c_size_t),
        ("dwFlags", c_uint32),
        ("dwLockCount", c_uint32),
        ("dwResvd", c_uint32),
        ("th32ProcessID", c_uint32),
        ("th32HeapID", c_uint64),
    ]


class HEAP_SUMMARY(_Fields):
    """Sums of HeapSummary, in bytes; `cb` is the structure's own size, set by the caller."""

    _fields_: ClassVar = [
        ("cb", c_uint32),
        ("cbAllocated", c_size_t),
        ("cbCommitted", c_size_t),
        ("cbReserved", c_size_t),
        ("cbMaxReserve", c_size_t),
    ]


class HEAP_OPTIMIZE_RESOURCES_INFORMATION(_Fields):
    """For HeapSetInformation(HeapOptimizeResources): Version (1), Flags (0)."""

    _fields_: ClassVar = [("Version", c_uint32), ("Flags", c_uint32)]


assert [sizeof(kind) for kind in (PROCESS_HEAP_ENTRY, HEAPLIST32, HEAPENTRY32, HEAP_SUMMARY)] == [40, 32, 56, 40]
