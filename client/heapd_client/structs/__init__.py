"""Typed records in blocks: declared as ctypes structures are, linked by arena addresses, the same in every process.

    from ctypes import c_int64
    from heapd_client.structs import Record, Ref, Text

    class Node(Record):
        _fields_ = [("key", c_int64), ("name", Text(24)), ("next", Ref("Node"))]

    last = Node.alloc(heap, key=2, name="two")
    first = Node.alloc(heap, key=1, next=last)      # a block of Node.sizeof bytes, laid out by ctypes
    first.next.key                                  # 2, read where it lies; here or in another process:
    heap.publish("list", first.block)               # Node(heap.lookup("list")).next.name

Fields: the numbers of ctypes, c_bool and c_char; `c_char * n` (bytes); Text(n) (str); Ref (to a record, or None); a
Record within the record; and arrays of all these, `c_double * 3`, `Ref("Node") * 2`, `Point * 8`.

A record object is a view of a block, made anew each time a link is followed. Every access looks at the block's state
first, so that a record which was freed, here or by another process, is refused and never read. What processes change
together wants the heap's lock; a number or a link of its own changes at once.
"""

from .declaration import Field
from .kinds import Array, Kind, Text
from .record import Record
from .ref import Ref

__all__ = ["Array", "Field", "Kind", "Record", "Ref", "Text"]
