"""Nodes of one kind side by side: in a heap of their own, a walk touches fewer pages than in a heap they share.

heapd keeps sizes apart by itself: blocks of one size class lie together. Kinds of one size, though, lie in the order in
which they were allocated. A page that was touched costs a page fault the first time, and a place in the processor's
caches of addresses each time. The kernel counts them: /proc/self/clear_refs forgets what was touched, and the line
"Referenced" of /proc/self/smaps tells what was touched since.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from ctypes import c_int64, c_uint8
from pathlib import Path

import click
from _stage import example

import heapd_client as hc
from heapd_client.structs import Record, Ref

PAGE_SIZE = 4096


class Node(Record):
    """64 bytes of a list."""

    _fields_ = [("value", c_int64), ("next", Ref("Node")), ("payload", c_uint8 * 48)]


class Other(Record):
    """64 bytes of something else."""

    _fields_ = [("bytes", c_uint8 * 64)]


def build(nodes_in: hc.Heap, others_in: hc.Heap, count: int, others: int) -> Node:
    """A list of `count` nodes, `others` blocks of another kind allocated between two. Returns: its first node."""
    head = Node.alloc(nodes_in)
    for value in range(1, count):
        for _ in range(others):
            Other.alloc(others_in)
        head = Node.alloc(nodes_in, value=value, next=head)
    return head


def nodes_from(node: Node | None) -> Iterator[Node]:
    while node is not None:
        yield node
        node = node.next


def pages_of(head: Node) -> int:
    """Pages that the list's nodes lie in."""
    return len({node.address // PAGE_SIZE for node in nodes_from(head)})


def pages_touched(head: Node) -> int | None:
    """Pages of the arena that a walk over the list touched, the heap's own words included; None if the kernel does not
    tell."""
    with suppress(OSError):
        for what in ("1", "4"):  # forget what was touched; 4 flushes the processor's caches, which remember it, too
            Path("/proc/self/clear_refs").write_text(what)
        total = sum(node.value for node in nodes_from(head))
        assert total > 0
        smaps = Path("/proc/self/smaps").read_text().partition(f"/dev/shm/{head.arena.name}\n")[2]
        return int(smaps.partition("Referenced:")[2].split()[0]) * 1024 // PAGE_SIZE
    return None


@example
@click.option("--nodes", type=click.IntRange(min=2), default=3000, show_default=True)
@click.option("--others", type=click.IntRange(min=0), default=7, show_default=True, help="Other blocks for each node.")
def main(session: hc.Session, nodes: int, others: int) -> None:
    """Walk the same list twice: mixed with blocks of another kind, and in a heap of its own."""
    mixed = session.create_heap()
    own, rest = session.create_heap(), session.create_heap()
    print(f"{nodes} nodes of {Node.sizeof} bytes, {others} other blocks of that size allocated between two")
    for name, head in (
        ("one heap for all:", build(mixed, mixed, nodes, others)),
        ("a heap of their own:", build(own, rest, nodes, others)),
    ):
        touched = pages_touched(head)
        told = "" if touched is None else f"; a walk touches {touched} pages, by the kernel's count"
        print(f"{name:<21} nodes lie in {pages_of(head):>4} pages{told}")


if __name__ == "__main__":
    main()
