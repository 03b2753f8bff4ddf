"""Bad frames, one misuse a test: each gets its own error, and the daemon serves everybody else as before."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from heapd.errors import (
    HeapdError,
    MessageError,
    SessionLostError,
    UnknownOpError,
    VersionError,
    error_from_wire,
)
from heapd.wire import MAX_REQUEST_BYTES, PROTOCOL_VERSION, encode_request
from heapd.wire.messages import HeapAlloc, HeapCreate, HeapValidate, SessionList
from tests.harness import Daemon, wait_until
from tests.server.raw import Dealer, RawSession, connect_raw, is_cut_off, status, zmtp3_connect, zmtp3_frame


class Bench:
    """A daemon with a bystander who has a block, and a culprit's socket.

    Fields: daemon, bystander (a session), heap (the bystander's, with `blocks` in it), work (the culprit's socket),
    token (a session's).
    """

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.bystander = RawSession(daemon.endpoint)
        self.heap = self.bystander.create_heap()
        self.bystander.alloc(self.heap, 1000)
        self.blocks = 1
        self.culprit = RawSession(daemon.endpoint)
        self.work = self.culprit.work
        self.token = self.culprit.token

    def error(self) -> tuple[int, HeapdError]:
        """The next answer to the culprit: (request id, its error)."""
        request_id, code, payload = self.work.receive()
        assert code != 0, f"it was carried out: {payload!r}"
        return request_id, error_from_wire(code, *payload)

    def send(self, *items: Any) -> None:
        self.work.send(msgpack.packb(list(items)))

    def check(self) -> None:
        """Everybody else is served as before."""
        assert self.bystander.busy_blocks(self.heap) == self.blocks
        assert self.bystander.ask(HeapValidate(self.heap)) == []
        self.bystander.alloc(self.heap, 10)
        self.blocks += 1
        assert self.daemon.is_running
        assert "Traceback" not in self.daemon.log

    def close(self) -> None:
        self.bystander.close()
        self.culprit.close()


@pytest.fixture
def bench(daemon: Daemon) -> Iterator[Bench]:
    bench = Bench(daemon)
    yield bench
    try:
        bench.check()
    finally:
        bench.close()


def test_an_empty_frame_is_answered(bench: Bench) -> None:
    """Nothing is no request."""
    bench.work.send(b"")
    request_id, error = bench.error()
    assert (request_id, type(error)) == (0, MessageError)


def test_random_bytes_are_answered(bench: Bench) -> None:
    """Each frame gets one answer, and none is carried out."""
    generator = random.Random(3)
    for _ in range(200):
        bench.work.send(generator.randbytes(generator.randrange(1, 200)))
        assert isinstance(bench.error()[1], (MessageError, VersionError))


def test_mutated_requests_are_answered(bench: Bench) -> None:
    """A request with flipped bytes is carried out or refused; it is never left without an answer."""
    generator = random.Random(4)
    # A question, so that what is carried out changes nothing.
    whole = encode_request(SessionList(5), 7, bench.token)
    for _ in range(300):
        frame = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            frame[generator.randrange(len(frame))] = generator.randrange(256)
        bench.work.send(bytes(frame))
        bench.work.receive()


def test_every_truncation_of_a_request_is_answered(bench: Bench) -> None:
    """It is not waited for more."""
    whole = encode_request(HeapCreate("x" * 100, 0, 0, 0), 7, bench.token)
    for size in range(len(whole)):
        bench.work.send(whole[:size])
        assert isinstance(bench.error()[1], MessageError)


def test_an_unknown_op_is_named(bench: Bench) -> None:
    """With its number and the request's id."""
    bench.send(PROTOCOL_VERSION, 4711, 7, bench.token)
    request_id, error = bench.error()
    assert (request_id, type(error)) == (7, UnknownOpError)
    assert "4711" in str(error)


def test_another_version_is_named(bench: Bench) -> None:
    """Both versions are."""
    bench.send(PROTOCOL_VERSION + 1, HeapAlloc.op, 7, bench.token, bench.heap, 64)
    request_id, error = bench.error()
    assert (request_id, type(error)) == (7, VersionError)
    assert error.details["daemon"] == PROTOCOL_VERSION


@pytest.mark.parametrize("size", [-1, -(2**63), True, "64", None, 1.5, [64], {"size": 64}])
def test_an_absurd_size_is_refused(bench: Bench, size: Any) -> None:
    """By the field's name."""
    bench.send(PROTOCOL_VERSION, HeapAlloc.op, 7, bench.token, bench.heap, size)
    request_id, error = bench.error()
    assert (request_id, type(error), error.details.get("field")) == (7, MessageError, "size")


def test_a_name_of_10000_characters_is_refused(bench: Bench) -> None:
    """By the limit."""
    bench.send(PROTOCOL_VERSION, HeapCreate.op, 7, bench.token, "n" * 10_000, 0, 0, 0)
    _, error = bench.error()
    assert type(error) is MessageError
    assert "1 to 255 bytes" in str(error)
    assert "nnn" not in str(error)


def test_a_token_that_was_made_up_is_no_session(bench: Bench) -> None:
    """Whoever has no session cannot use one."""
    bench.send(PROTOCOL_VERSION, HeapAlloc.op, 7, os.urandom(16), bench.heap, 64)
    assert type(bench.error()[1]) is SessionLostError


def test_a_deep_body_is_refused(bench: Bench) -> None:
    """1,000 arrays in each other: even to print it would fail."""
    bench.work.send(b"\x91" * 1000 + b"\x00")
    assert type(bench.error()[1]) is MessageError


def test_a_body_of_many_empty_maps_is_refused(bench: Bench) -> None:
    """It would become 70 times its size."""
    bench.work.send(b"\xdd\x00\x00\xff\xf0" + b"\x80" * 65_000)
    assert type(bench.error()[1]) is MessageError


def test_a_message_of_two_frames_is_refused(bench: Bench) -> None:
    """A request is one frame; what came with it is not read as another."""
    request = encode_request(SessionList(), 7, bench.token)
    bench.work.send(b"", request)
    assert type(bench.error()[1]) is MessageError
    bench.work.send(request)
    assert bench.work.receive()[:2] == (7, 0)


def test_a_frame_over_the_limit_cuts_its_sender_off(bench: Bench) -> None:
    """And nobody else. libzmq does so before the daemon sees anything."""
    with zmtp3_connect(bench.daemon.endpoint) as peer:
        peer.sendall(zmtp3_frame(bytes(MAX_REQUEST_BYTES + 1)))
        assert is_cut_off(peer)


def test_a_frame_that_announces_a_gibibyte_cuts_its_sender_off(bench: Bench) -> None:
    """Nothing is reserved for it."""
    with zmtp3_connect(bench.daemon.endpoint) as peer:
        peer.sendall(b"\x02" + (1 << 30).to_bytes(8, "big") + bytes(100))
        assert is_cut_off(peer)


@pytest.mark.parametrize("socket", ["work", "control"])
def test_a_message_of_many_frames_cuts_its_sender_off(bench: Bench, socket: str) -> None:
    """Nobody who speaks the protocol sends 1,000 frames."""
    with zmtp3_connect(bench.daemon.endpoint, socket) as peer:
        peer.sendall(zmtp3_frame(b"x", more=True) * 1000 + zmtp3_frame(b"x"))
        assert is_cut_off(peer)
    wait_until(lambda: status(bench.daemon.endpoint)["peers_cut_off"] == 1)


def test_bytes_that_are_no_zmtp_are_ignored(bench: Bench) -> None:
    """Whatever greets."""
    generator = random.Random(5)
    for _ in range(20):
        with connect_raw(bench.daemon.endpoint, "work") as peer:
            peer.sendall(generator.randbytes(300))


def test_two_sockets_of_one_identity_do_no_harm(bench: Bench) -> None:
    """Nothing hangs on an identity: who has it already is answered, whoever else claims it."""
    address = bench.bystander.work.address
    with Dealer(address, identity=b"squat") as first:
        first.send(encode_request(SessionList(), 1, bench.token))
        assert first.receive()[0] == 1
        with Dealer(address, identity=b"squat") as second:
            second.send(encode_request(SessionList(), 2, bench.token))
            first.send(encode_request(SessionList(), 3, bench.token))
            assert first.receive()[0] == 3
            assert not second.has_answer(0)


def test_a_client_that_never_reads_blocks_nobody(bench: Bench) -> None:
    """When its queue is full its answers are dropped and counted; the daemon waits for nobody."""
    with zmtp3_connect(bench.daemon.endpoint) as peer:
        frames = zmtp3_frame(encode_request(SessionList(), 7, bench.token)) * 100
        for _ in range(200):
            peer.sendall(frames)
        wait_until(lambda: status(bench.daemon.endpoint)["replies_undeliverable"] > 0)
        bench.check()
