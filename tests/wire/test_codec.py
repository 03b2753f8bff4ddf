"""Requests and answers as frames: everything round-trips, everything else is refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heapd.errors import (
    HeapdError,
    HeapFullError,
    InvalidArgumentError,
    MessageError,
    MessageTooLargeError,
    UnknownOpError,
    VersionError,
    error_from_wire,
)
from heapd.wire import (
    CONTROL_OPS,
    MAX_BATCH,
    MAX_NAME_BYTES,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    MAX_REQUEST_ID,
    OPS,
    PROTOCOL_VERSION,
    Request,
    decode_reply,
    decode_request,
    encode_error,
    encode_reply,
    encode_request,
)
from heapd.wire.messages import (
    HeapAlloc,
    HeapAllocMany,
    HeapCreate,
    HeapFreeMany,
    HeapList,
    HeapResize,
    Hello,
    Items,
    NameLookup,
    Range,
    Status,
    Text,
)

ALL_OPS = {**CONTROL_OPS, **OPS}
TOKEN = bytes(range(16))


def extremes(hint: Any) -> list[Any]:
    """The least and the greatest value that a field's annotation allows."""
    if hint is bool:
        return [False, True]
    assert get_origin(hint) is Annotated
    base, limit = get_args(hint)
    if isinstance(limit, Range):
        return [limit.low, limit.high]
    if isinstance(limit, Text):
        return ["a", "é" * (limit.max_bytes // 2), *([None] if base is not str else [])]
    assert isinstance(limit, Items)
    return [[], [limit.item.low] * limit.max_count]


def examples(kind: type[Request]) -> list[Request]:
    """Messages of a class that between them hold every extreme of every field."""
    hints = get_type_hints(kind, include_extras=True)
    values = [extremes(hints[name]) for name in (field.name for field in fields(kind))]
    longest = max((len(each) for each in values), default=1)
    return [kind(*(each[i % len(each)] for each in values)) for i in range(longest)]


EVERY_MESSAGE = [message for kind in ALL_OPS.values() for message in examples(kind)]


def raw(*items: Any) -> bytes:
    frame: bytes = msgpack.packb(list(items))
    return frame


def alloc(**changes: Any) -> bytes:
    """The frame of an alloc request with some items replaced."""
    items = {"version": PROTOCOL_VERSION, "op": HeapAlloc.op, "id": 7, "token": TOKEN, "heap": 3, "size": 64}
    return raw(*(items | changes).values())


# -- round trips -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("message", EVERY_MESSAGE, ids=lambda message: message.name)
def test_every_message_round_trips(message: Request) -> None:
    """What a client asks is what the daemon reads, at every bound of every field."""
    envelope = decode_request(encode_request(message, 7, TOKEN), ALL_OPS)
    assert envelope == (7, TOKEN, message)


@pytest.mark.parametrize("kind", ALL_OPS.values(), ids=lambda kind: kind.name)
def test_every_truncation_is_refused(kind: type[Request]) -> None:
    """A frame that lost its end is never taken for a request."""
    frame = encode_request(examples(kind)[0], 7, TOKEN)
    for size in range(len(frame)):
        with pytest.raises(MessageError):
            decode_request(frame[:size], ALL_OPS)


@pytest.mark.parametrize("result", [None, 5, "text", b"bytes", [1, [2, None, True]], {"a": 1}])
def test_a_result_round_trips(result: Any) -> None:
    """What the daemon answers is what the client reads."""
    assert decode_reply(encode_reply(9, result)) == (9, 0, result)


def test_an_error_round_trips_with_its_kind_text_and_figures() -> None:
    """An error raised in the daemon is the same error in the client."""
    sent = HeapFullError.of("commit", requested=5, used=3, limit=4, advice="free something")
    request_id, code, payload = decode_reply(encode_error(9, sent))
    received = error_from_wire(code, *payload)
    assert (request_id, type(received), str(received)) == (9, HeapFullError, str(sent))
    assert received.details == sent.details


def test_extra_trailing_fields_are_ignored() -> None:
    """A newer client may send fields that this daemon does not know."""
    frame = raw(PROTOCOL_VERSION, HeapAlloc.op, 7, TOKEN, 3, 64, "new", {"map": [1]})
    assert decode_request(frame, OPS).request == HeapAlloc(3, 64)


def test_missing_trailing_fields_take_their_defaults() -> None:
    """An older client does not send what was added after it."""
    frame = raw(PROTOCOL_VERSION, HeapList.op, 7, TOKEN)
    assert decode_request(frame, OPS).request == HeapList()


# -- what a client is told before it sends ---------------------------------------------------------------------------
@pytest.mark.parametrize("size", [-1, 2**64, True, 1.0, "64", None])
def test_a_client_cannot_send_a_size_that_is_none(size: Any) -> None:
    """An impossible argument is refused where it was given, by the field's name."""
    with pytest.raises(InvalidArgumentError, match=r"heap\.alloc: size: an integer from 0 to"):
        encode_request(HeapAlloc(3, size), 7, TOKEN)


@pytest.mark.parametrize("name", ["", "x" * 10_000, "é" * 128, "a\0b", "\ud800", 5, b"bytes"])
def test_a_client_cannot_send_a_name_that_is_none(name: Any) -> None:
    """Names have 1 to 255 bytes of UTF-8, and no NUL."""
    with pytest.raises(InvalidArgumentError, match=r"heap\.create: heap_name: "):
        encode_request(HeapCreate(name, 0, 0, 0), 7, TOKEN)


def test_a_client_cannot_send_more_items_than_a_batch_has() -> None:
    """The batch limit is named."""
    with pytest.raises(InvalidArgumentError, match=f"at most {MAX_BATCH} items"):
        encode_request(HeapAllocMany(3, [1] * (MAX_BATCH + 1)), 7, TOKEN)


def test_a_client_cannot_send_a_frame_over_the_limit() -> None:
    """The daemon would cut the connection without a word, so the client says it."""
    with pytest.raises(MessageTooLargeError, match=f"one may take {MAX_REQUEST_BYTES}") as caught:
        encode_request(HeapFreeMany(3, [2**63 - 1] * 2 * MAX_BATCH), 7, TOKEN)
    assert caught.value.details["limit"] == MAX_REQUEST_BYTES


# -- what the daemon refuses -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [-1, True, 1.5, "64", None, [], {}, b"64"])
def test_a_field_of_the_wrong_type_or_range_is_refused(size: Any) -> None:
    """True is no integer, and neither is anything else but one within the bounds."""
    with pytest.raises(MessageError, match=r"heap\.alloc: size: ") as caught:
        decode_request(alloc(size=size), OPS)
    assert caught.value.details == {"request_id": 7, "field": "size"}


@pytest.mark.parametrize("flag", [0, 1, None, "yes"])
def test_a_flag_that_is_no_bool_is_refused(flag: Any) -> None:
    """Only true and false are flags."""
    with pytest.raises(MessageError, match=r"heap\.resize: in_place_only: true or false"):
        decode_request(raw(PROTOCOL_VERSION, HeapResize.op, 7, TOKEN, 3, 4096, 1, 64, flag), OPS)


@pytest.mark.parametrize("sizes", [5, "ab", [1, True], [1, None], [-1], [2**63, "x"], {"a": 2}])
def test_a_list_with_anything_else_in_it_is_refused(sizes: Any) -> None:
    """Every item of a list is checked."""
    with pytest.raises(MessageError, match=r"heap\.alloc_many: sizes: "):
        decode_request(raw(PROTOCOL_VERSION, HeapAllocMany.op, 7, TOKEN, 3, sizes), OPS)


@pytest.mark.parametrize("name", ["", "x" * 10_000, "a\0b", 5, b"bytes", None])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    """Names are checked in the daemon too."""
    with pytest.raises(MessageError, match=r"name\.lookup: block_name: "):
        decode_request(raw(PROTOCOL_VERSION, NameLookup.op, 7, TOKEN, 3, name, 0), OPS)


def test_a_missing_field_is_refused() -> None:
    """Fields without a default must come."""
    with pytest.raises(MessageError, match="2 fields are needed, 1 came"):
        decode_request(raw(PROTOCOL_VERSION, HeapAlloc.op, 7, TOKEN, 3), OPS)


@pytest.mark.parametrize("op", [0, 9999, -1, 2**63, "30", None, 30.0, Hello.op])
def test_an_unknown_op_is_refused(op: Any) -> None:
    """Each socket knows its own operations only."""
    with pytest.raises(UnknownOpError) as caught:
        decode_request(alloc(op=op), OPS)
    assert caught.value.details["request_id"] == 7


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, -5, 2**63])
def test_another_version_is_refused_by_name(version: int) -> None:
    """Both versions are in the text; the request's id is read all the same."""
    with pytest.raises(
        VersionError, match=f"version {PROTOCOL_VERSION}, the request is of version {version}"
    ) as caught:
        decode_request(alloc(version=version), OPS)
    assert caught.value.details["request_id"] == 7


@pytest.mark.parametrize("version", [None, True, "1", 1.0, []])
def test_a_version_that_is_no_integer_is_refused(version: Any) -> None:
    """It is no request then."""
    with pytest.raises(MessageError):
        decode_request(alloc(version=version), OPS)


@pytest.mark.parametrize("request_id", [0, -1, MAX_REQUEST_ID + 1, None, True, "7"])
def test_a_request_id_that_is_none_is_answered_with_0(request_id: Any) -> None:
    """The sender could not tell the answer from another."""
    with pytest.raises(MessageError) as caught:
        decode_request(alloc(id=request_id), OPS)
    assert caught.value.details["request_id"] == 0


@pytest.mark.parametrize("token", [b"x", b"x" * 15, b"x" * 17, None, "x" * 16, 5])
def test_a_token_of_the_wrong_size_is_refused(token: Any) -> None:
    """A token is 16 bytes, or none on the control socket."""
    with pytest.raises(MessageError, match="token"):
        decode_request(alloc(token=token), OPS)


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xc1", b"\x00", raw(), raw(1, 2, 3), msgpack.packb({}), msgpack.packb("text"), raw(1) + b"\x00"],
    ids=["nothing", "invalid", "a number", "empty", "too short", "a map", "a text", "two values"],
)
def test_a_frame_that_is_no_request_is_refused(frame: bytes) -> None:
    """Whatever msgpack makes of it."""
    with pytest.raises(MessageError) as caught:
        decode_request(frame, OPS)
    assert caught.value.details["request_id"] == 0


def test_a_deep_body_is_refused_without_being_shown() -> None:
    """The repr of a deep body can itself fail; no error's text holds a body."""
    deep = b"\x91" * 1000 + b"\x00"
    with pytest.raises(MessageError) as caught:
        decode_request(alloc(size=0)[:-1] + deep, OPS)
    assert str(caught.value).endswith("not list")


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\x00\x00\xff\xff" + b"\x80" * 65_000,
        b"\xdf\x00\x00\x10\x00" + b"\x01" * 8192,
        b"\xc7\x10\x05" + b"x" * 16,
        b"\xd6\xff\x00\x00\x00\x05",
    ],
    ids=["array", "map", "extension", "timestamp"],
)
def test_a_frame_that_unpacks_to_many_times_its_size_is_refused(body: bytes) -> None:
    """Arrays, maps and extensions are bounded below what a frame could hold."""
    with pytest.raises(MessageError):
        decode_request(b"\x96\x01\x1e\x07\xc4\x10" + TOKEN + b"\x03" + body, OPS)


def test_a_frame_over_the_limit_is_refused_unread() -> None:
    """The size is checked first."""
    with pytest.raises(MessageTooLargeError):
        decode_request(b"\x00" * (MAX_REQUEST_BYTES + 1), OPS)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_with_a_message_error(frame: bytes) -> None:
    """Nothing but a MessageError or a VersionError comes out of a frame that is no request."""
    with pytest.raises((MessageError, VersionError)) as caught:
        decode_request(frame, OPS)
    assert "request_id" in caught.value.details


@settings(max_examples=500, deadline=None)
@given(
    message=st.sampled_from([m for m in EVERY_MESSAGE if len(encode_request(m, 7, TOKEN)) < 2000]),
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_mutated_request_is_a_request_or_refused(message: Request, edits: list[tuple[int, int]]) -> None:
    """Flipped bytes never let an exception of another kind out, nor a field that is out of its bounds in."""
    frame = bytearray(encode_request(message, 7, TOKEN))
    for at, value in edits:
        frame[at % len(frame)] = value
    try:
        envelope = decode_request(bytes(frame), ALL_OPS)
    except (MessageError, VersionError):
        return
    # What was let in can be sent: its fields are within their bounds.
    encode_request(envelope.request, envelope.request_id, envelope.token)


# -- answers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "frame",
    [b"", b"\xc1", raw(), raw(1, 0), msgpack.packb(5), raw("1", 0, None), raw(1, True, None), raw(1, 10, "text"),
     raw(1, 10, ["text"]), raw(1, 10, ["text", {1: 2}]), raw(1, 10, [5, {}])],
)  # fmt: skip
def test_a_frame_that_is_no_answer_is_refused(frame: bytes) -> None:
    """The client does not believe everything either."""
    with pytest.raises(MessageError):
        decode_reply(frame)


def test_an_answer_over_the_limit_is_refused_unread() -> None:
    """The size is checked first."""
    with pytest.raises(MessageTooLargeError):
        decode_reply(b"\x00" * (MAX_REPLY_BYTES + 1))


def test_the_limits_are_those_of_the_names() -> None:
    """A name may have as many bytes as PROTOCOL.md says, counted in UTF-8."""
    longest = "é" * (MAX_NAME_BYTES // 2) + "x"
    assert decode_request(encode_request(NameLookup(3, longest), 7, TOKEN), OPS).request == NameLookup(3, longest)


def test_an_unknown_code_still_carries_its_text() -> None:
    """A newer daemon's error is an error."""
    error = error_from_wire(9999, "new", {})
    assert type(error) is HeapdError
    assert str(error) == "new"


def test_status_has_no_fields() -> None:
    """A request without fields is four items."""
    assert len(msgpack.unpackb(encode_request(Status(), 1))) == 4
