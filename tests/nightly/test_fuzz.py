"""The service, the codec and the live sockets, fuzzed for as long as it takes."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from heapd.errors import MessageError, VersionError
from heapd.wire import CONTROL_OPS, OPS, decode_reply, decode_request, encode_request
from tests.faults.test_bad_frames import Bench
from tests.harness import Daemon
from tests.server.raw import connect_raw, zmtp3_connect, zmtp3_frame
from tests.service.machine import ServiceMachine
from tests.wire.test_codec import EVERY_MESSAGE, TOKEN

pytestmark = pytest.mark.nightly

OPERATIONS = 200_000


def test_two_hundred_thousand_operations_leave_everything_as_the_model_has_it() -> None:
    """Of all kinds and in all orders; after each one walk, validate, statistics and the model are compared."""
    before = ServiceMachine.operations
    while ServiceMachine.operations - before < OPERATIONS:
        run_state_machine_as_test(
            ServiceMachine,
            settings=settings(
                max_examples=300,
                stateful_step_count=150,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


@settings(max_examples=20_000, deadline=None, database=None)
@given(frame=st.binary(max_size=400))
def test_bytes_of_any_kind_are_refused(frame: bytes) -> None:
    """By the daemon's decoder and by the client's, with the errors that are meant for it."""
    for decode in (lambda: decode_request(frame, OPS), lambda: decode_reply(frame)):
        with suppress(MessageError, VersionError):
            decode()


@settings(max_examples=20_000, deadline=None, database=None)
@given(
    message=st.sampled_from([m for m in EVERY_MESSAGE if len(encode_request(m, 7, TOKEN)) < 2000]),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
)
def test_requests_with_bytes_exchanged_and_inserted(message: object, edits: list[tuple[int, bytes]]) -> None:
    """What is let in is within the bounds of its fields."""
    frame = bytearray(encode_request(message, 7, TOKEN))  # type: ignore[arg-type]
    for at, piece in edits:
        at %= len(frame)
        frame[at : at + len(piece) * (len(piece) % 2)] = piece
    try:
        envelope = decode_request(bytes(frame), {**OPS, **CONTROL_OPS})
    except (MessageError, VersionError):
        return
    encode_request(envelope.request, envelope.request_id, envelope.token)


@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_against_the_live_sockets(daemon: Daemon, seed: int) -> None:
    """Before the greeting, after it, as frames and as their headers; the bystander is served and nothing is lost."""
    bench = Bench(daemon)
    generator = random.Random(seed)
    try:
        for _ in range(300):
            which = generator.choice(["work", "control"])
            junk = generator.randbytes(generator.randrange(1, 600))
            peer = connect_raw(daemon.endpoint, which) if generator.random() < 0.5 else zmtp3_connect(daemon.endpoint)
            with peer:
                try:
                    for _ in range(generator.randrange(1, 5)):
                        is_framed = generator.random() < 0.5
                        peer.sendall(zmtp3_frame(junk, more=generator.random() < 0.3) if is_framed else junk)
                except (BrokenPipeError, ConnectionResetError):
                    continue
        bench.check()
    finally:
        bench.close()
