"""A whole structure freed at once: destroy its heap instead of walking it.

To free a tree node by node, each node must be found first, by reading its links, and then given back. Its heap knows
nothing of trees: it gives back its pages, whatever is allocated in them.
"""

from __future__ import annotations

import time
from ctypes import c_int64

import click
from _stage import example

import heapd_client as hc
from heapd_client.structs import Record, Ref


class Node(Record):
    _fields_ = [("key", c_int64), ("left", Ref("Node")), ("right", Ref("Node"))]


def grow(heap: hc.Heap, depth: int) -> Node:
    """A full binary tree of 2**depth - 1 nodes."""
    branches = {name: grow(heap, depth - 1) for name in ("left", "right")} if depth > 1 else {}
    return Node.alloc(heap, key=depth, **branches)


def free_tree(node: Node | None) -> int:
    """Free a tree, children first. Returns: nodes freed."""
    if node is None:
        return 0
    count = free_tree(node.left) + free_tree(node.right) + 1
    node.free()
    return count


@example
@click.option("--depth", type=click.IntRange(1, 18), default=13, show_default=True)
def main(session: hc.Session, depth: int) -> None:
    """Free one tree node by node, and its twin by destroying the heap that it lives in."""
    first, second = session.create_heap(), session.create_heap()
    root, twin = grow(first, depth), grow(second, depth)
    used = second.statistics()
    print(f"two trees of {used.busy_blocks} nodes, each in {used.committed >> 10} KiB of a heap of its own")

    started = time.perf_counter()
    count = free_tree(root)
    one_by_one = time.perf_counter() - started
    print(f"node by node:     {one_by_one * 1e3:9.2f} ms, {one_by_one / count * 1e6:.1f} us a node")

    started = time.perf_counter()
    second.destroy()
    at_once = time.perf_counter() - started
    print(f"heap destroyed:   {at_once * 1e3:9.2f} ms, {one_by_one / at_once:.0f} times as fast")
    try:
        print(twin.key)
    except hc.HeapDestroyedError as error:
        print(f"the twin's root is refused: {error}")


if __name__ == "__main__":
    main()
