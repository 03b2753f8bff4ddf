"""What one RPC costs beside a bare pyzmq echo of the same bytes: `scripts/bench rpc [--quick] [--strict]`.

The echo is a DEALER and a ROUTER in processes of their own over ipc, the server a loop of recv_multipart and
send_multipart that answers with as many bytes as the daemon does. The machine is not quiet, so both sides take turns
round by round, and the bars are on the median of the rounds' ratios. The RPC is the wire protocol by hand, encoding
and decoding included; heap.alloc and block.free stand beside it for what users get, mostly without a round trip.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from operator import truediv
from statistics import median
from typing import Any

import zmq

import heapd_client as hc
from heapd.layout import LAYOUT_VERSION
from heapd.wire.codec import decode_reply, encode_request
from heapd.wire.endpoint import Endpoint
from heapd.wire.messages import HeapAlloc, HeapCreate, HeapFree, Hello, Request
from scripts.benchmarks._harness import Benchmark, daemon

_SIZE = 64  # bytes a block
_BATCH = 256
_CLIENTS = 8
_HELD = 50  # blocks that one of the eight holds at most


# -- the two sides ---------------------------------------------------------------------------------------------------
class RawClient:
    """The wire protocol by hand: no block, no mapping, no thread, only frames encoded, sent, received, decoded."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._ids = 0
        self._token = b""
        self._socket = self._dealer(Endpoint.parse(endpoint).control)
        hello = self.call(Hello(layout_version=LAYOUT_VERSION))
        self._socket.close()
        self._token = hello["token"]
        self._socket = self._dealer(hello["work"])
        self.heap: int = self.call(HeapCreate(None, 0, 0, 0))[0]

    def _dealer(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.connect(address)
        return socket

    def frame(self, request: Request) -> bytes:
        """The bytes of a request."""
        self._ids += 1
        return encode_request(request, self._ids, self._token)

    def exchange(self, frame: bytes) -> bytes:
        """Send a frame and return the answer's bytes."""
        self._socket.send(frame)
        return self._socket.recv()

    def call(self, request: Request) -> Any:
        """The result of a request; raises RuntimeError if the daemon refuses."""
        _, code, payload = decode_reply(self.exchange(self.frame(request)))
        if code:
            raise RuntimeError(f"error {code}: {payload}")
        return payload

    def close(self) -> None:
        """Leave; the daemon notices the session's end when this process ends."""
        self._socket.close()
        self._context.term()


def _echo_server(address: str, reply: bytes) -> None:
    """Answer every frame with `reply`, for ever: as bare as it gets."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(address)
    while True:
        identity, _ = router.recv_multipart()
        router.send_multipart([identity, reply])


class EchoClient:
    """The other end of the echo."""

    def __init__(self, address: str, request: bytes) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(address)
        self._request = request
        self.call()

    def call(self) -> bytes:
        """One round trip; returns the answer."""
        self._socket.send(self._request)
        return self._socket.recv()

    def close(self) -> None:
        """Leave."""
        self._socket.close()
        self._context.term()


# -- one client ------------------------------------------------------------------------------------------------------
def _timed(call: Callable[[], object], count: int) -> list[int]:
    samples = []
    clock = time.perf_counter_ns
    for _ in range(count):
        before = clock()
        call()
        samples.append(clock() - before)
    return samples


class _OneClient:
    """Rounds of each kind in turn: echo, raw alloc, raw free, public alloc, public free."""

    def __init__(self, raw: RawClient, echo: EchoClient, heap: hc.Heap, count: int) -> None:
        self._raw = raw
        self._echo = echo
        self._heap = heap
        self._count = count
        self.samples: dict[str, list[int]] = {}
        self.ratios: dict[str, list[float]] = {}

    def round(self) -> None:
        """One turn of everything; ratios are to this round's echo, taken before and after."""
        echo = _timed(self._echo.call, self._count // 2)
        kinds = {**self._raw_round(), **self._public_round()}
        echo += _timed(self._echo.call, self._count // 2)
        self.samples.setdefault("echo", []).extend(echo)
        for kind, samples in kinds.items():
            self.samples.setdefault(kind, []).extend(samples)
            self.ratios.setdefault(kind, []).append(median(samples) / median(echo))

    def _raw_round(self) -> dict[str, list[int]]:
        grants: list[Any] = []
        alloc = HeapAlloc(self._raw.heap, _SIZE)
        allocs = _timed(lambda: grants.append(self._raw.call(alloc)), self._count)
        queue = iter([HeapFree(self._raw.heap, address, generation) for _, address, generation, *_ in grants])
        return {"alloc RPC": allocs, "free RPC": _timed(lambda: self._raw.call(next(queue)), self._count)}

    def _public_round(self) -> dict[str, list[int]]:
        blocks: list[hc.Block] = []
        allocs = _timed(lambda: blocks.append(self._heap.alloc(_SIZE)), self._count)
        return {"heap.alloc": allocs, "block.free": _timed(lambda: blocks.pop().free(), self._count)}


def _one_client(bench: Benchmark, endpoint: str, echo: tuple[str, bytes], rounds: int, count: int) -> None:
    raw, bare = RawClient(endpoint), EchoClient(*echo)
    with hc.connect(endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=False)
        turns = _OneClient(raw, bare, heap, count)
        turns.round()  # warm up
        turns.samples.clear()
        turns.ratios.clear()
        for _ in range(rounds):
            turns.round()
        _batches(bench, heap, rounds)
    for kind, samples in turns.samples.items():
        bench.add_samples(kind, samples)
    bench.raw["ratios to the echo"] = turns.ratios
    bench.add("alloc RPC / echo", median(turns.ratios["alloc RPC"]), "x", at_most=1.3)
    bench.add("free RPC / echo", median(turns.ratios["free RPC"]), "x", at_most=1.3)
    bench.add("heap.alloc / echo", median(turns.ratios["heap.alloc"]), "x")
    bench.add("block.free / echo", median(turns.ratios["block.free"]), "x")
    raw.close()
    bare.close()


def _batches(bench: Benchmark, heap: hc.Heap, rounds: int) -> None:
    allocs, frees = [], []
    for _ in range(10 * rounds):
        before = time.perf_counter_ns()
        blocks = heap.alloc_many([_SIZE] * _BATCH)
        between = time.perf_counter_ns()
        heap.free_many(blocks)
        frees.append((time.perf_counter_ns() - between) / _BATCH)
        allocs.append((between - before) / _BATCH)
    bench.raw["alloc_many, ns a block"] = allocs
    bench.add(f"alloc_many of {_BATCH}, a block", median(allocs) / 1e3, "us", at_most=4.0)
    bench.add(f"free_many of {_BATCH}, a block", median(frees) / 1e3, "us")


# -- eight clients ---------------------------------------------------------------------------------------------------
def _worker(line: Connection, endpoint: str, echo: tuple[str, bytes]) -> None:
    """Do as told: (a kind of call, seconds until the end) answered by the number of round trips."""
    bare, raw = EchoClient(*echo), RawClient(endpoint)
    with hc.connect(endpoint, autostart=False) as session:
        heap = session.create_heap(serialize=False)
        calls = {
            "echo": bare.call,
            "coded": _coded(raw, bare),
            "rpc": _alternating(raw),
            "public": _in_turn(lambda: heap.alloc(_SIZE), hc.Block.free),
        }
        line.send(0)
        while (order := line.recv()) is not None:
            kind, seconds = order
            line.send(_count_calls(calls[kind], seconds))
    raw.close()
    bare.close()


def _coded(raw: RawClient, bare: EchoClient) -> Callable[[], object]:
    """An echo whose client encodes a request and decodes an answer: what a daemon that does nothing would reach."""
    alloc = HeapAlloc(raw.heap, _SIZE)

    def call() -> None:
        raw.frame(alloc)
        decode_reply(bare.call())

    return call


def _alternating(raw: RawClient) -> Callable[[], object]:
    """Some allocs, then as many frees, in turn: each call is one RPC."""
    alloc = HeapAlloc(raw.heap, _SIZE)

    def free(grant: Any) -> None:
        raw.call(HeapFree(raw.heap, grant[1], grant[2]))

    return _in_turn(lambda: raw.call(alloc), free)


def _in_turn(alloc: Callable[[], Any], free: Callable[[Any], object]) -> Callable[[], object]:
    """A call that allocates until _HELD are held, frees until none is, and so on."""
    held: list[Any] = []
    is_growing = True

    def call() -> None:
        nonlocal is_growing
        if is_growing:
            held.append(alloc())
            is_growing = len(held) < _HELD
        else:
            free(held.pop())
            is_growing = not held

    return call


def _count_calls(call: Callable[[], object], seconds: float) -> int:
    deadline = time.perf_counter() + seconds
    count = 0
    while time.perf_counter() < deadline:
        for _ in range(10):
            call()
        count += 10
    return count


def _many_clients(bench: Benchmark, endpoint: str, echo: tuple[str, bytes], rounds: int, seconds: float) -> None:
    with _workers(endpoint, echo) as lines:
        rates: dict[str, list[float]] = {"echo": [], "coded": [], "rpc": [], "public": []}
        for _ in range(rounds):
            for kind, rate in rates.items():
                for line in lines:
                    line.send((kind, seconds))
                rate.append(sum(line.recv() for line in lines) / seconds)
    bench.raw[f"{_CLIENTS} clients, calls a second"] = rates
    for kind, label in (("echo", "echo"), ("rpc", "alloc and free RPC"), ("public", "heap.alloc and block.free")):
        bench.add(f"{_CLIENTS} clients, {label}", median(rates[kind]), "a second")
    ratios = {kind: median(map(truediv, rates[kind], rates["echo"])) for kind in ("coded", "rpc")}
    bench.add(f"{_CLIENTS} clients, echo that they encode and decode for / echo", ratios["coded"], "x")
    bench.add(f"{_CLIENTS} clients, RPC / echo", ratios["rpc"], "x", at_least=0.7)


@contextmanager
def _workers(endpoint: str, echo: tuple[str, bytes]) -> Iterator[list[Connection]]:
    context = get_context("spawn")
    with ExitStack() as stack:
        lines = []
        for _ in range(_CLIENTS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, endpoint, echo), daemon=True)
            process.start()
            stack.callback(process.join, 5)
            stack.callback(ours.send, None)
            lines.append(ours)
        for line in lines:
            line.recv()
        yield lines


# -- both ------------------------------------------------------------------------------------------------------------
@contextmanager
def _echo(endpoint: str) -> Iterator[tuple[str, bytes]]:
    """An echo server that answers as many bytes as an alloc does. Yields: its address, a request of alloc's bytes."""
    raw = RawClient(endpoint)
    request = raw.frame(HeapAlloc(raw.heap, _SIZE))
    reply = raw.exchange(request)
    raw.close()
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/echo"
        server = get_context("spawn").Process(target=_echo_server, args=(address, reply), daemon=True)
        server.start()
        try:
            yield address, request
        finally:
            server.kill()
            server.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench rpc", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a bar is missed")
    options = parser.parse_args()
    rounds, count, seconds = (3, 200, 0.3) if options.quick else (30, 400, 1.0)
    runs = f"{rounds} rounds of {count} calls a kind; {rounds // 3} rounds of {seconds:g} s for {_CLIENTS} clients"
    bench = Benchmark("rpc", runs)
    with daemon() as endpoint, _echo(endpoint) as echo:
        bench.runs += f"; request {len(echo[1])} bytes"
        _one_client(bench, endpoint, echo, rounds, count)
        _many_clients(bench, endpoint, echo, max(1, rounds // 3), seconds)
    bench.caveats.append("first touch of a block's pages (the payload is not written), serialized heaps")
    return bench.report(strict=options.strict)


if __name__ == "__main__":
    sys.exit(main())
