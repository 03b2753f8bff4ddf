"""A binary search tree in a heap: one process inserts, another one searches it at the same time, without a lock.

A node is complete before the one store that links it in, so a reader sees each insertion entirely or not at all. (To
take nodes out under a reader's feet would need the heap's lock; the reader would be refused a freed node, not misled.)
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from ctypes import c_int64

import click
from _stage import example, other_process

import heapd_client as hc
from heapd_client.structs import Record, Ref


class Node(Record):
    """24 bytes: a key, and the roots of the trees of smaller and of larger keys."""

    _fields_ = [("key", c_int64), ("smaller", Ref("Node")), ("larger", Ref("Node"))]


def insert(root: Node, key: int) -> None:
    """Add a key that is not there yet."""
    node = root
    while True:
        branch = "smaller" if key < node.key else "larger"
        child = getattr(node, branch)
        if child is None:
            setattr(node, branch, Node.alloc(root.block.heap, key=key))
            return
        node = child


def find(root: Node, key: int) -> tuple[Node | None, int]:
    """The node with that key, None if there is none; and how many nodes it took to find out."""
    node, steps = root, 1
    while node is not None and node.key != key:
        node, steps = (node.smaller if key < node.key else node.larger), steps + 1
    return node, steps


def keys_in_order(node: Node | None) -> Iterator[int]:
    """All keys, by walking the tree."""
    if node is not None:
        yield from keys_in_order(node.smaller)
        yield node.key
        yield from keys_in_order(node.larger)


def watch(root: Node, last: int) -> None:
    """What the other process does: walk the growing tree again and again, until it finds the key inserted last."""
    print(f"process {os.getpid()} walks the tree while it grows", flush=True)
    root.block.heap.publish("watched", root.block)
    sizes = []
    while find(root, last)[0] is None:
        keys = list(keys_in_order(root))
        assert keys == sorted(keys), "a reader saw a tree out of order"
        sizes.append(len(keys))
    seen = sorted(set(sizes))
    shown = ", ".join(map(str, seen[:: len(seen) // 12 + 1]))
    print(f"it saw the tree {len(sizes)} times, always sorted, with {shown} keys", flush=True)


@example
@click.option("--nodes", type=click.IntRange(min=10), default=2000, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of the order in which keys are inserted.")
def main(session: hc.Session, nodes: int, seed: int) -> None:
    """Grow a binary search tree of random keys, while another process searches it."""
    keys = list(range(nodes))
    random.Random(seed).shuffle(keys)
    heap = session.create_heap()
    root = Node.alloc(heap, key=keys[0])
    with other_process(watch, root, keys[-1]):
        heap.lookup("watched", timeout=30)  # it is at work
        started = time.perf_counter()
        for key in keys[1:]:
            insert(root, key)
        print(f"inserted {nodes} keys in {time.perf_counter() - started:.2f} s", flush=True)

    node, steps = find(root, nodes // 2)
    assert node is not None
    print(f"key {node.key} lies at {node.address:#x}, found in {steps} steps; no such key: {find(root, -1)[0]}")
    used = heap.statistics()
    print(f"{used.busy_blocks} nodes of {Node.sizeof} bytes in {used.committed >> 12} pages of {used.slabs} slabs")


if __name__ == "__main__":
    main()
