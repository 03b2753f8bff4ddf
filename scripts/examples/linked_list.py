"""A linked list in a heap: built by one process, read and changed by another, by following its links.

Each node is a block of its own. A link is the arena address of the next node, and an arena address means the same in
every process; so nothing is copied or translated when another process walks the list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from ctypes import c_int64

import click
from _stage import example, other_process

import heapd_client as hc
from heapd_client.structs import Record, Ref


class Node(Record):
    """16 bytes: the value at offset 0, the link at offset 8."""

    _fields_ = [("value", c_int64), ("next", Ref("Node"))]


def build(heap: hc.Heap, count: int) -> Node:
    """A list of the numbers from 0 to `count` - 1. Returns: its first node."""
    head = Node.alloc(heap, value=count - 1)
    for value in reversed(range(count - 1)):
        head = Node.alloc(heap, value=value, next=head)
    return head


def nodes_from(node: Node | None) -> Iterator[Node]:
    """A node and all after it."""
    while node is not None:
        yield node
        node = node.next


def describe(head: Node) -> str:
    """The list's length, sum, and first nodes with their addresses."""
    nodes = list(nodes_from(head))
    first = " -> ".join(f"{node.value} at {node.address:#x}" for node in nodes[:3])
    return f"process {os.getpid()}: {len(nodes)} nodes, sum {sum(node.value for node in nodes)}: {first} -> ..."


def remove_odd_values(heap: hc.Heap) -> None:
    """What the other process does: it is given the heap, finds the list in it by name, and takes nodes out."""
    head = Node(heap.lookup("numbers"))
    print(describe(head), flush=True)
    with heap.lock():  # nobody sees the list half changed
        for node in nodes_from(head):
            while (following := node.next) is not None and following.value % 2:
                node.next = following.next
                following.free()


@example
@click.option("--nodes", type=click.IntRange(min=3), default=1000, show_default=True)
def main(session: hc.Session, nodes: int) -> None:
    """Build a linked list; another process reads it and frees every second node; look at it again."""
    heap = session.create_heap()
    head = build(heap, nodes)
    heap.publish("numbers", head.block)
    second = head.next
    print(describe(head), flush=True)

    with other_process(remove_odd_values, heap):
        pass  # until it has ended

    print(describe(head))
    print(f"{heap.statistics().busy_blocks} blocks are allocated; {len(heap.validate())} invariants are broken")
    try:
        print(second.value)
    except hc.StaleHandleError as error:
        print(f"the node that was second is refused: {error}")


if __name__ == "__main__":
    main()
