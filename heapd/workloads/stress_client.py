"""One stress client: random operations on shared heaps until the time is up, every block checked by who holds it last.

What it does follows from (seed, number) alone; when it does it, and what the others have done by then, does not.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import heapd_client as hc
from heapd.errors import BlockTooLargeError, CannotResizeInPlaceError, HeapdError, HeapFullError, StaleHandleError
from heapd.layout import Handle
from heapd.units import KIB
from heapd.workloads.board import LANES, Board, Phase, Row, neighbours
from heapd.workloads.checked import (
    HEADER_SIZE,
    MAX_SIZE,
    CheckError,
    Stamp,
    check,
    check_prefix,
    check_zero,
    fill,
    read_stamp,
)
from heapd.workloads.latency import Histogram

__all__ = ["CONTROL_HEAP", "PATIENCE_S", "Held", "Plan", "Report", "StressClient", "heap_name", "result_name",
           "run_client"]  # fmt: skip

CONTROL_HEAP = "stress"
_MOST_ERRORS = 10  # then a client stops: what follows a broken heap says nothing new
_MOST_LIVE = 64  # blocks a client holds
PATIENCE_S = 120.0  # for the others, at start and end
DEADLINE = struct.Struct("<d")  # what the parent publishes as "go": when the run ends, by the monotonic clock
_LARGE_SHARE = 0.02  # of blocks over 64 KiB
_POLLS_A_SECOND = 2000  # of all waiting clients together: hundreds that look often leave the others no time


@dataclass(frozen=True, slots=True)
class Plan:
    """What a stress run is.

    Fields: endpoint, clients, seconds, seed, heaps (work heaps), most_bytes (that one client holds at most).
    """

    endpoint: str
    clients: int
    seconds: float
    seed: int
    heaps: int
    most_bytes: int


@dataclass(slots=True)
class Report:
    """What a client did: latencies by operation (ns), counts of what was refused or exchanged, errors (sentences)."""

    latencies: dict[str, Histogram] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def count(self, what: str, by: int = 1) -> None:
        """Count something."""
        self.counts[what] = self.counts.get(what, 0) + by

    def merge(self, other: Report) -> None:
        """Add what another client did."""
        for kind, histogram in other.latencies.items():
            self.latencies.setdefault(kind, Histogram()).merge(histogram)
        for what, count in other.counts.items():
            self.count(what, count)
        self.errors += other.errors

    def to_json(self) -> bytes:
        """As bytes for a block."""
        plain = {kind: histogram.to_plain() for kind, histogram in self.latencies.items()}
        return json.dumps([plain, self.counts, self.errors]).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Report:
        """The inverse of `to_json`."""
        plain, counts, errors = json.loads(data)
        return cls({kind: Histogram.from_plain(values) for kind, values in plain.items()}, counts, errors)


def heap_name(number: int) -> str:
    """The name of a work heap."""
    return f"stress-{number}"


def result_name(number: int) -> str:
    """The name under which a client leaves its report."""
    return f"result/{number}"


@dataclass(slots=True, eq=False)
class Held:
    """A block that a client holds, what it wrote into it last, and the number of its heap."""

    block: hc.Block
    stamp: Stamp
    heap: int


class StressClient:
    """The state of one client. `step` does one operation; the rest is coming and going.

    A block in `held` is as its stamp says, except between `_unsettle` and `_settle`; a client that must be able to
    account for its blocks overrides these two.
    """

    def __init__(self, plan: Plan, number: int, session: hc.Session, control: hc.Heap) -> None:
        self.plan = plan
        self.number = number
        self.report = Report()
        self._session = session
        self._heaps = [session.open_heap(heap_name(heap)) for heap in range(plan.heaps)]
        self._board = Board(control.lookup("board").view, plan.clients, plan.heaps)
        self._random = random.Random(f"{plan.seed}/{number}")
        self._held: list[Held] = []
        self._bytes = 0
        self._sequence = 0
        self._outgoing = neighbours(number, plan.clients)
        self._incoming = [
            (sender, lane)
            for sender in range(plan.clients)
            for lane, receiver in enumerate(neighbours(sender, plan.clients)[:LANES])
            if receiver == number
        ]
        actions: tuple[tuple[Callable[[], None], int], ...] = (
            (self._alloc, 28), (self._alloc_many, 3), (self._write, 14), (self._check, 14), (self._resize, 10),
            (self._free, 14), (self._free_many, 2), (self._hand_over, 8), (self._receive, 4), (self._lock, 2),
            (self._open_stale, 1),
        )  # fmt: skip
        self._actions = [action for action, _ in actions]
        self._weights = [weight for _, weight in actions]

    # -- coming and going ------------------------------------------------------------------------------------------
    def run(self, control: hc.Heap) -> None:
        """All of it, from the start signal to the moment when every other client has freed its blocks too."""
        self._enter(Phase.READY)
        deadline = DEADLINE.unpack(control.lookup("go", timeout=PATIENCE_S).view)[0]
        self._enter(Phase.RUNNING)
        operations = self._board.get(self.number, Row.OPERATIONS)  # of an earlier life
        while time.monotonic() < deadline and len(self.report.errors) < _MOST_ERRORS:
            self.step()
            operations += 1
            self._board.put(self.number, Row.OPERATIONS, operations)
            self._board.put(self.number, Row.LIVE, len(self._held))
        self._enter(Phase.SENT)
        self._drain()
        while self._held:
            self._guarded(self._free)
        self._enter(Phase.FREED)
        self._wait(lambda: self._board.all_reached(Phase.FREED), "all clients to free their blocks")

    def step(self) -> None:
        """One random operation; what goes wrong is an error of the report."""
        self._guarded(self._random.choices(self._actions, self._weights)[0])

    def leave(self, control: hc.Heap) -> None:
        """Hand in the report."""
        data = self.report.to_json()
        block = control.alloc(len(data))
        block.view[:] = data
        control.publish(result_name(self.number), block)
        self._enter(Phase.ENDED)

    def _enter(self, phase: Phase) -> None:
        self._board.put(self.number, Row.PID, os.getpid())
        self._board.put(self.number, Row.PHASE, phase)

    def _drain(self) -> None:
        senders = [sender for sender, _ in self._incoming]

        def is_over() -> bool:
            over = self._board.all_reached(Phase.SENT, senders)  # asked first: what was sent before is seen below
            for _ in self._incoming:
                self._guarded(self._receive)
            return over

        self._wait(is_over, "the neighbours to hand over what they had")

    def _wait(self, is_over: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_over():
            if time.monotonic() > deadline:
                self._fail(f"waited {PATIENCE_S:g} s for {what}")
                return
            time.sleep(self.plan.clients / _POLLS_A_SECOND)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (HeapFullError, BlockTooLargeError):
            self.report.count("refused: memory full")
            self._free_half()
        except (HeapdError, CheckError) as error:
            self._fail(f"{action.__name__.strip('_')}: {type(error).__name__}: {error}")

    def _fail(self, text: str) -> None:
        self.report.errors.append(f"client {self.number}: {text}")
        self._board.add(self.number, Row.ERRORS)

    def _note(self, kind: str, started: int) -> None:
        """Count a call that began at `started` (perf_counter_ns) and has returned."""
        self.report.latencies.setdefault(kind, Histogram()).add(time.perf_counter_ns() - started)

    # -- operations ------------------------------------------------------------------------------------------------
    def _size(self) -> int:
        """Log-uniform from 48 B to 64 KiB, now and then up to 1 MiB."""
        large = self._random.random() < _LARGE_SHARE
        low, high = (64 * KIB, MAX_SIZE) if large else (HEADER_SIZE + 16, 64 * KIB)
        return int(low * (high / low) ** self._random.random())

    def _has_room(self, size: int) -> bool:
        return len(self._held) < _MOST_LIVE and self._bytes + size <= self.plan.most_bytes

    def _hold(self, block: hc.Block, heap: int) -> None:
        """Write into a block and keep it."""
        self._sequence += 1
        stamp = Stamp(self.number, self._sequence)
        fill(block.view, stamp)
        self._keep(Held(block, stamp, heap))

    def _keep(self, held: Held) -> None:
        self._held.append(held)
        self._bytes += held.block.size
        self._settle(held)

    def _pick(self) -> Held | None:
        return self._held[self._random.randrange(len(self._held))] if self._held else None

    def _drop(self, held: Held) -> None:
        self._unsettle(held)
        self._held.remove(held)
        self._bytes -= held.block.size

    def _settle(self, held: Held) -> None:
        """The block is now, whole, as its stamp says."""

    def _unsettle(self, held: Held) -> None:
        """The block is about to change, or to go; may be said twice."""

    def _sign(self, held: Held) -> None:
        """Write into a held block anew."""
        self._sequence += 1
        self._unsettle(held)
        held.stamp = Stamp(self.number, self._sequence)
        fill(held.block.view, held.stamp)
        self._settle(held)

    def _alloc(self) -> None:
        size = self._size()
        if not self._has_room(size):
            self._free()
            return
        heap = self._random.randrange(len(self._heaps))
        zero = self._random.random() < 0.1
        started = time.perf_counter_ns()
        block = self._heaps[heap].alloc(size, zero=zero)
        self._note("alloc zeroed" if zero else "alloc", started)
        if block.size != size:
            raise CheckError(f"{size} bytes asked for, {block.size} got")
        if zero:
            check_zero(block.view)
        self._hold(block, heap)

    def _alloc_many(self) -> None:
        sizes = [min(self._size(), 4 * KIB) for _ in range(self._random.randrange(2, 17))]
        if not self._has_room(sum(sizes)):
            self._free()
            return
        heap = self._random.randrange(len(self._heaps))
        started = time.perf_counter_ns()
        blocks = self._heaps[heap].alloc_many(sizes)
        self._note("alloc_many", started)
        for block in blocks:
            self._hold(block, heap)

    @contextmanager
    def _checking(self, held: Held) -> Iterator[None]:
        """A block found wrong inside is dropped: nobody can say whose it is, and once is enough."""
        self._board.add(self.number, Row.CHECKED)
        try:
            yield
        except CheckError:
            self._board.add(self.number, Row.LOST, held.block.size)
            self._drop(held)
            raise

    def _check_held(self, held: Held) -> None:
        with self._checking(held):
            check(held.block.view, held.stamp)

    def _write(self) -> None:
        held = self._pick()
        if held is not None:
            self._check_held(held)
            started = time.perf_counter_ns()
            self._sign(held)
            self._note("write", started)

    def _check(self) -> None:
        held = self._pick()
        if held is not None:
            started = time.perf_counter_ns()
            self._check_held(held)
            self._note("check", started)

    def _resize(self) -> None:
        held, size = self._pick(), self._size()
        if held is None or not self._has_room(size - held.block.size):
            return
        length = held.block.size
        in_place = self._random.random() < 0.2
        started = time.perf_counter_ns()
        self._unsettle(held)
        try:
            block = held.block.realloc(size, in_place_only=in_place)
        except HeapdError as error:
            self._settle(held)  # nothing has changed
            if not isinstance(error, CannotResizeInPlaceError):
                raise
            self.report.count("refused: resize in place")
            self._check_held(held)
            return
        self._note("realloc", started)
        self._bytes += block.size - length
        held.block = block
        with self._checking(held):
            check_prefix(block.view, held.stamp, length)
        self._sign(held)

    def _free(self) -> None:
        held = self._pick()
        if held is not None:
            self._check_held(held)
            self._drop(held)
            started = time.perf_counter_ns()
            held.block.free()
            self._note("free", started)

    def _free_many(self) -> None:
        heap = self._random.randrange(len(self._heaps))
        chosen = [held for held in self._held if held.heap == heap][:16]
        if not chosen:
            return
        for held in chosen:
            self._check_held(held)
            self._drop(held)
        started = time.perf_counter_ns()
        self._heaps[heap].free_many([held.block for held in chosen])
        self._note("free_many", started)

    def _free_half(self) -> None:
        for _ in range((len(self._held) + 1) // 2):
            self._guarded(self._free)

    def _hand_over(self) -> None:
        held = self._pick()
        if held is None or not self._outgoing:
            return
        lane = self._random.randrange(len(self._outgoing))
        if not self._board.is_empty(self.number, lane):
            return
        self._check_held(held)
        if held.stamp.owner != self.number:  # it came from another: the receiver wants to tell whom it is from
            self._sign(held)
        self._drop(held)
        self._board.send(self.number, lane, bytes([held.heap]) + held.block.handle.encode())
        self.report.count("handed over")

    def _receive(self) -> None:
        """Take over one block that a neighbour has left, if there is one."""
        for sender, lane in self._incoming:
            letter = self._board.receive(sender, lane)
            if letter is not None:
                self._take_over(sender, letter)
                return

    def _take_over(self, sender: int, letter: bytes) -> None:
        started = time.perf_counter_ns()
        block = self._session.open(Handle.decode(letter[1:]))
        self._note("open", started)
        self.report.count("taken over")
        stamp = read_stamp(block.view)
        self._keep(Held(block, stamp, letter[0]))
        self._check_held(self._held[-1])
        if stamp.owner != sender:
            raise CheckError(f"a block from client {sender} was written by client {stamp.owner}")

    def _lock(self) -> None:
        """Raise a count that is not atomic, under the heap's lock: a lock that excludes nobody loses some."""
        heap = self._random.randrange(len(self._heaps))
        started = time.perf_counter_ns()
        with self._heaps[heap].lock(timeout=PATIENCE_S):
            self._note("lock", started)
            self._raise_guard(heap)

    def _raise_guard(self, heap: int) -> None:
        self._board.raise_guard(heap)
        self.report.count(f"guard {heap}")

    def _open_stale(self) -> None:
        """A handle of a block that is no more must be refused."""
        held = self._pick()
        if held is None:
            return
        handle = held.block.handle
        self._check_held(held)
        self._drop(held)
        held.block.free()
        try:
            self._session.open(handle)
        except StaleHandleError:
            self.report.count("stale handles refused")
        else:
            raise CheckError("the handle of a freed block was accepted")


def run_client(plan: Plan, number: int, kind: type[StressClient] = StressClient) -> int:
    """All that a client process does. Returns: its exit code; why it is not 0 stands on stderr."""
    try:
        with hc.connect(plan.endpoint, autostart=False, timeout=PATIENCE_S) as session:
            control = session.open_heap(CONTROL_HEAP)
            client = kind(plan, number, session, control)
            client.run(control)
            client.leave(control)
    except HeapdError as error:
        print(f"client {number}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0
