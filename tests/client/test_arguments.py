"""Every argument of every public function, with values that it cannot take: an error of heapd says so, and no other."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from ctypes import c_int64
from typing import Any

import pytest

import heapd_client as hc
from heapd_client import errors
from heapd_client.structs import Record, Ref, Text
from tests.harness import Daemon

ODD: list[Any] = [
    None, 5, -1, 2**70, -(2**70), 1.5, math.nan, math.inf, True, "a", "", "\0", "x" * 5000, "\ud800", b"a", b"", (),
    (1,), (1, 2, 3, 4), [1], [-1], [2**70], [None], {}, {1}, range(3), object(), int, len, 1j, bytearray(b"x"),
    memoryview(b"x" * 40), b"x" * 40, hc.Handle(b"x" * 16, 1, 1, 1), hc.Handle(b"x", -1, 2**70, 0), ("\ud800", c_int64),
]  # fmt: skip


class Node(Record):
    _fields_ = [("key", c_int64), ("name", Text(4)), ("next", Ref("Node")), ("row", c_int64 * 2)]


class Stage:
    """What the calls below work with."""

    def __init__(self, endpoint: str, session: hc.Session) -> None:
        self.endpoint = endpoint
        self.session = session
        self.heap = session.create_heap()
        self.block = self.heap.alloc(100)
        self.node = Node.alloc(self.heap)
        self.heap.publish("there", self.block)

    def close_a_session(self, patience: Any) -> None:
        with hc.connect(self.endpoint) as session:
            session.close(patience_s=patience)


Call = Callable[[Stage, Any], Any]

FLAGS = ["serialize", "executable", "generate_exceptions", "persistent"]
CREATE = {
    f"create_heap {name}": lambda on, value, name=name: on.session.create_heap(**{name: value}).destroy()
    for name in ["name", "initial", "maximum", "orphans", "max_block", "session_quota", *FLAGS]
}
CALLS: dict[str, Call] = {
    **CREATE,
    "connect endpoint": lambda on, value: hc.connect(value, autostart=False, timeout=1).close(),
    "connect timeout": lambda on, value: hc.connect(on.endpoint, autostart=False, timeout=value).close(),
    "daemon_status endpoint": lambda on, value: hc.daemon_status(value, timeout=1),
    "daemon_status timeout": lambda on, value: hc.daemon_status(on.endpoint, timeout=value),
    "stop_daemon timeout": lambda on, value: hc.stop_daemon("nobody", timeout=value),
    "session.close": lambda on, value: on.close_a_session(value),
    "open_heap": lambda on, value: on.session.open_heap(value),
    "open_heap_id": lambda on, value: on.session.open_heap_id(value),
    "open_default_heap reserve": lambda on, value: on.session.open_default_heap(value),
    "open_default_heap commit": lambda on, value: on.session.open_default_heap(0, value),
    "heaps": lambda on, value: on.session.heaps(value),
    "sessions": lambda on, value: on.session.sessions(value),
    "walk": lambda on, value: list(on.session.walk(value)),
    "open": lambda on, value: on.session.open(value),
    "block_at": lambda on, value: on.session.block_at(value),
    "alloc": lambda on, value: on.heap.alloc(value).free(),
    "alloc zero": lambda on, value: on.heap.alloc(8, zero=value).free(),
    "alloc_many sizes": lambda on, value: on.heap.free_many(on.heap.alloc_many(value)),
    "alloc_many size": lambda on, value: on.heap.free_many(on.heap.alloc_many(value, 2)),
    "alloc_many count": lambda on, value: on.heap.free_many(on.heap.alloc_many(8, value)),
    "free": lambda on, value: on.heap.free(value),
    "free_many": lambda on, value: on.heap.free_many(value),
    "free_many of one": lambda on, value: on.heap.free_many([value]),
    "validate": lambda on, value: on.heap.validate(value),
    "lock": lambda on, value: on.heap.lock(value).__exit__(None, None, None),
    "publish name": lambda on, value: on.heap.publish(value, on.block),
    "publish block": lambda on, value: on.heap.publish("name", value),
    "lookup name": lambda on, value: on.heap.lookup(value),
    "lookup timeout": lambda on, value: on.heap.lookup("there", value),
    "unpublish": lambda on, value: on.heap.unpublish(value),
    "heap.realloc block": lambda on, value: on.heap.realloc(value, 10),
    "realloc": lambda on, value: on.block.realloc(value),
    "realloc zero": lambda on, value: on.block.realloc(50, zero=value),
    "realloc in_place_only": lambda on, value: on.block.realloc(50, in_place_only=value),
    "Handle.decode": lambda on, value: hc.Handle.decode(value),
    "Handle.encode instance": lambda on, value: hc.Handle(value, 1, 1, 1).encode(),
    "Handle.encode slot": lambda on, value: hc.Handle(b"", value, 1, 1).encode(),
    "Record()": lambda on, value: Node(value),
    "Record.alloc heap": lambda on, value: Node.alloc(value),
    "Record.at heap": lambda on, value: Node.at(value, on.node.address),
    "Record.at address": lambda on, value: Node.at(on.heap, value),
    "field of int": lambda on, value: setattr(on.node, "key", value),
    "field of text": lambda on, value: setattr(on.node, "name", value),
    "field of link": lambda on, value: setattr(on.node, "next", value),
    "field of array": lambda on, value: setattr(on.node, "row", value),
    "Text": lambda on, value: Text(value),
    "Ref": lambda on, value: Ref(value),
    "array length": lambda on, value: Text(4) * value,
    "_fields_": lambda on, value: type("Odd", (Record,), {"_fields_": value}),
    "_fields_ item": lambda on, value: type("Odd", (Record,), {"_fields_": [value]}),
    "_fields_ type": lambda on, value: type("Odd", (Record,), {"_fields_": [("odd", value)]}),
    "_fields_ name": lambda on, value: type("Odd", (Record,), {"_fields_": [(value, c_int64)]}),
}


@pytest.fixture
def stage(shared_daemon: Daemon, session: hc.Session) -> Stage:
    return Stage(shared_daemon.endpoint, session)


@pytest.mark.parametrize("what", CALLS)
def test_what_an_argument_cannot_be_is_an_error_of_heapd(stage: Stage, what: str) -> None:
    """Whatever its type and value, the call does it or raises HeapdError, in one line; and the heap is as sound as it
    was."""
    told = []
    for value in ODD:
        try:
            CALLS[what](stage, value)
        except errors.HeapdError as error:
            told.append(str(error))
    assert all(0 < len(text) < 400 and "\n" not in text for text in told), told
    assert stage.heap.validate() == []
    stage.heap.alloc(64).free()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:heapd_client")
@pytest.mark.parametrize("what", ["shape", "dtype"])
def test_what_an_array_cannot_be_is_an_error_of_heapd(stage: Stage, what: str) -> None:
    """Also what numpy itself would raise."""
    pytest.importorskip("numpy")
    for value in [*ODD, "zz", ["a"], "i4,i4", ("i4", 3), "S0", (1,) * 70, (0, 2**70)]:
        with contextlib.suppress(errors.InvalidArgumentError):
            stage.block.ndarray(*((value,) if what == "shape" else (1, value)))


@pytest.mark.parametrize("timeout", [0, -1, None, "a", math.nan, True])
def test_there_is_one_rule_for_the_timeout_of_connect(shared_daemon: Daemon, timeout: Any) -> None:
    """More than 0 seconds; what it says is the same for whatever is not."""
    with pytest.raises(errors.InvalidArgumentError, match=r"more than 0; not "):
        hc.connect(shared_daemon.endpoint, timeout=timeout)


@pytest.mark.parametrize("size", [-1, 2**64, 1.5])
def test_a_batch_of_one_size_is_checked_as_one_block_is(heap: hc.Heap, size: Any) -> None:
    """Nothing is allocated, in the caches neither."""
    heap.free_many(heap.alloc_many(16, 8))
    with pytest.raises(errors.InvalidArgumentError, match="a size is a count of bytes"):
        heap.alloc_many(size, 2)
    assert heap.statistics().busy_blocks == 0
