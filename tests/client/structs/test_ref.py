"""Links between records: addresses that lead to the record they were made for, or are found out."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from ctypes import c_int64
from multiprocessing import get_context
from typing import Any

import pytest

import heapd_client as hc
from heapd_client.errors import InvalidArgumentError, StaleHandleError
from heapd_client.structs import Record, Ref


class Node(Record):
    _fields_ = [("key", c_int64), ("next", Ref("Node")), ("branches", Ref("Node") * 2)]


class Leaf(Node):
    _fields_ = []


class Basket(Record):
    _fields_ = [("node", Ref(Node)), ("later", Ref("Later")), ("never", Ref("Never"))]


class Later(Record):
    _fields_ = [("basket", Ref(Basket))]


def chain(heap: hc.Heap, keys: range) -> Any:
    """A list of nodes with these keys."""
    node = None
    for key in reversed(keys):
        node = Node.alloc(heap, key=key, next=node)
    return node


def keys_of(node: Any) -> list[int]:
    """The keys of a list, by following its links."""
    keys = []
    while node is not None:
        keys.append(node.key)
        node = node.next
    return keys


def test_a_link_leads_to_the_record(heap: hc.Heap) -> None:
    """By attribute or in an array; None is None."""
    head = chain(heap, range(5))
    assert keys_of(head) == [0, 1, 2, 3, 4]
    head.branches = [head.next, None]
    head.branches[1] = head
    assert [node and node.key for node in head.branches] == [1, 0]
    head.next = None
    assert (head.next, keys_of(head)) == (None, [0])


def test_a_link_is_the_address_and_the_low_bits_of_the_generation(heap: hc.Heap) -> None:
    """8 bytes: whoever masks the 17 high bits away has the arena address."""
    head = chain(heap, range(2))
    view = head.block.view[Node.next.offset :].cast("Q")
    assert view[0] & (1 << 47) - 1 == head.next.address
    assert view[0] >> 47 == head.next.block.generation & (1 << 17) - 1
    assert f"next={head.next.address:#x}" in repr(head)


def test_another_process_follows_the_links(heap: hc.Heap) -> None:
    """A spawned process gets the first record and walks to the last, in heaps that it has never opened."""
    far = Node.alloc(heap.session.create_heap(), key=99)
    head = chain(heap, range(50))
    head.next.branches[0] = far
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(keys_of, head).result(30) == list(range(50))
        assert pool.submit(keys_of, head.next.branches[0]).result(30) == [99]


def test_a_link_of_another_type_is_refused(heap: hc.Heap, session: hc.Session) -> None:
    """Another record type, a number, part of a record, a freed record; a derived type is fine. Nothing changes."""
    basket = Basket.alloc(heap, node=Leaf.alloc(heap, key=3))
    freed = Node.alloc(heap)
    freed.free()
    for wrong, why in ((basket, "no Node, nor None"), (basket.address, "no Node"), ("x", "no Node")):
        with pytest.raises(InvalidArgumentError, match=rf"Basket\.node: .*{why}"):
            basket.node = wrong
    with pytest.raises(ValueError, match="was freed"):
        basket.node = freed
    assert (type(basket.node), basket.node.key) == (Node, 3)


def test_a_link_to_a_part_or_into_another_arena_is_refused(heap: hc.Heap, start_daemon: Any) -> None:
    """An address means something in one arena alone, and a part's is no block's."""

    class Whole(Record):
        _fields_ = [("node", Node)]

    head = Node.alloc(heap)
    with pytest.raises(InvalidArgumentError, match="part of another record"):
        head.next = Whole.alloc(heap).node
    with hc.connect(start_daemon().endpoint) as other, pytest.raises(InvalidArgumentError, match="another arena"):
        head.next = Node.alloc(other.create_heap())


def test_types_may_refer_to_each_other(heap: hc.Heap) -> None:
    """By name, where one is declared before the other; a name of nothing is told when it is used."""
    later = Later.alloc(heap)
    later.basket = Basket.alloc(heap, later=later)
    assert later.basket.later == later
    with pytest.raises(InvalidArgumentError, match="no Record type 'Never'"):
        later.basket.never = later
    with pytest.raises(InvalidArgumentError, match="a Record type or its name"):
        Ref(5)  # type: ignore[arg-type]


def test_an_address_told_elsewhere_is_as_good_as_a_link(session: hc.Session) -> None:
    """A record found by its bare address in another session, and linked there, is found out when its owner frees it."""
    heap = session.create_heap("told", serialize=False)
    node = Node.alloc(heap, key=1)
    with hc.connect(session.endpoint, autostart=False) as other:
        there = other.open_heap("told")
        head = Node.alloc(there, next=Node.at(there, node.address))
        place = node.address
        node.free()
        del node  # nothing in its own process tells of it any more
        again = [Node.alloc(heap, key=2) for _ in range(20)]
        assert place in {each.address for each in again}
        with pytest.raises(StaleHandleError):
            print(head.next)


def follow(head: Any, rounds: int) -> set[int | None]:
    """In another process: what a link leads to, again and again."""
    seen: set[int | None] = set()
    for _ in range(rounds):
        node = head.next
        seen.add(None if node is None else node.key)
    return seen


def test_a_link_changes_by_one_store(heap: hc.Heap, session: hc.Session) -> None:
    """While it is changed over and over, another process sees the one or the other record, nothing between."""
    far = session.create_heap(maximum=1 << 20)  # so that the two addresses differ in more than one byte
    near, distant = Node.alloc(heap, key=1), Node.alloc(far, key=2)
    head = Node.alloc(heap, next=near)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(follow, head, 20_000)
        while not found.done():
            head.next = distant
            head.next = near
        assert found.result(30) == {1, 2}


@pytest.mark.parametrize("is_serialized", [True, False])
def test_a_link_to_a_freed_record_is_found_out(session: hc.Session, is_serialized: bool) -> None:
    """Before its memory is used again, and after: by a record of the same type, too, over and over."""
    heap = session.create_heap(serialize=is_serialized)
    head = chain(heap, range(2))
    first = head.next.address
    head.next.free()
    for _ in range(5):
        with pytest.raises(StaleHandleError, match=f"the Node at {first:#x} that the link led to was freed"):
            print(head.next)
        again = Node.alloc(heap, key=7)
        if again.address == first:
            with pytest.raises(StaleHandleError):
                print(head.next)
        head.branches[0] = again
        assert head.branches[0].key == 7
        again.free()
    assert "next=0x" in repr(head)


def test_a_link_into_a_destroyed_heap_is_found_out(session: hc.Session, heap: hc.Heap) -> None:
    """Its pages are nobody's, or another heap's by now."""
    other = session.create_heap()
    head = Node.alloc(heap, next=Node.alloc(other, key=1))
    other.destroy()
    for _ in range(2):
        with pytest.raises(StaleHandleError):
            print(head.next)
        chain(session.create_heap(), range(100))


def test_scribbled_links_never_lead_out_of_the_arena(heap: hc.Heap) -> None:
    """Whatever a wild write leaves in a link, following it is an error or a node, never a fault."""
    head = chain(heap, range(3))
    word = head.block.view[Node.next.offset :].cast("Q")
    good = word[0]
    for bits in range(64):
        word[0] = good ^ 1 << bits
        try:
            assert head.next.key in range(3)
        except (StaleHandleError, InvalidArgumentError):
            continue
    word[0] = good
    assert keys_of(head) == [0, 1, 2]
