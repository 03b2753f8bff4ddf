"""Frames to messages and back: msgpack outside, the dataclasses of messages.py inside.

Size limits and the fields' types are enforced here, in both directions: a client that asks for something impossible
is told before anything is sent, and the daemon believes nothing that it reads. Frames come from anybody who can open
the socket, so nothing of a frame's body ever gets into an error's text (the repr of a deep body can itself fail).

A field's check is made once, from its annotation, at import; decoding looks it up by class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from types import UnionType
from typing import Annotated, Any, Final, NamedTuple, get_args, get_origin, get_type_hints

import msgpack

from heapd.errors import (
    HeapdError,
    InvalidArgumentError,
    MessageError,
    MessageTooLargeError,
    UnknownOpError,
    VersionError,
    error_to_wire,
)
from heapd.wire.messages import (
    MAX_BATCH,
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    TOKEN_BYTES,
    Items,
    Range,
    Request,
    Text,
)

__all__ = [
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_ID",
    "Envelope",
    "Reply",
    "decode_reply",
    "decode_request",
    "encode_error",
    "encode_reply",
    "encode_request",
]

MAX_REQUEST_ID: Final = 2**63 - 1  # ids count from 1; 0 answers a request whose id cannot be read
MAX_REPLY_BYTES: Final = 4 * 1024 * 1024  # derived: a walk of 4,096 entries takes at most 0.4 MiB; ten times that
_ENVELOPE_ITEMS: Final = 4  # version, op, request id, token come before the fields

# What one frame may unpack to: msgpack makes 70 times its size of empty maps if it is let (measured).
_MAX_ARRAY: Final = 2 * MAX_BATCH  # derived: the longest list of any request
_MAX_MAP: Final = 64  # arbitrary: no request has a map; a newer client's extra field may
# Everything unpackb was seen to raise; BufferFull and OutOfData are no ValueErrors.
_UNPACK_ERRORS: Final = (
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
    msgpack.exceptions.UnpackException,
)

# One Packer for all: making one takes as long as packing. It runs with the GIL held and calls no Python code, so that
# no other thread, signal handler or finaliser meets it half-way.
_pack: Final[Callable[[Any], bytes]] = msgpack.Packer().pack
_unpack: Final[Callable[..., Any]] = msgpack.unpackb
_new: Final[Callable[..., Any]] = tuple.__new__  # a named tuple without the Python function that its class calls


class Envelope(NamedTuple):
    """A decoded request: its id (1..MAX_REQUEST_ID), the session's token (b"" on the control socket), the message."""

    request_id: int
    token: bytes
    request: Request


class Reply(NamedTuple):
    """A decoded answer: the request's id, 0 or an error code, and the result or (message, details)."""

    request_id: int
    code: int
    payload: Any


# -- checks, one a field ---------------------------------------------------------------------------------------------
# A check returns None for a good value, else what was expected instead; it never shows the value, only an int.
Check = Callable[[Any], str | None]


def _check_range(bounds: Range) -> Check:
    low, high = bounds
    expected = f"an integer from {low} to {high} is needed"

    def check(value: Any) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"{expected}, not {_describe(value)}"

    return check


_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f]")


def _check_text(limit: Text, *, is_optional: bool) -> Check:
    most = limit.max_bytes

    def check(value: Any) -> str | None:
        if type(value) is not str:
            return None if value is None and is_optional else f"text is needed, not {_describe(value)}"
        try:
            size = len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:
            return "the text has characters that UTF-8 cannot express"
        if _CONTROL.search(value):  # it would end up in somebody's terminal
            return "the text holds a control character, such as NUL or a line feed"
        return None if 0 < size <= most else f"text of 1 to {most} bytes is needed, not of {size}"

    return check


def _check_items(limit: Items) -> Check:
    (low, high), most = limit.item, limit.max_count
    expected = f"integers from {low} to {high} are needed"

    def check(value: Any) -> str | None:
        if type(value) is not list:
            return f"a list is needed, not {_describe(value)}"
        if len(value) > most:
            return f"at most {most} items are allowed, not {len(value)}"
        if value and (set(map(type, value)) != {int} or min(value) < low or max(value) > high):
            return f"{expected} in the list"
        return None

    return check


def _check_flag(value: Any) -> str | None:
    return None if type(value) is bool else f"true or false is needed, not {_describe(value)}"


def _describe(value: Any) -> str:
    """What a refused value is, without its content unless it is a number."""
    kind = type(value).__name__
    if type(value) is not int:
        return kind
    return str(value) if -(2**64) <= value <= 2**64 else "one of more than 64 bits"


def _check_of(hint: Any) -> Check:
    """The check that an annotation of messages.py stands for."""
    if get_origin(hint) is Annotated:
        base, limit = get_args(hint)
        if isinstance(limit, Range):
            return _check_range(limit)
        if isinstance(limit, Text):
            return _check_text(limit, is_optional=isinstance(base, UnionType))
        if isinstance(limit, Items):
            return _check_items(limit)
    if hint is bool:
        return _check_flag
    raise TypeError(f"no check is known for the annotation {hint!r}")


def _compile(kind: type[Request], hints: dict[str, Any], source: str, value: str) -> Callable[..., Any]:
    """A function over all fields of a class, from source.

    The comparisons of ints and flags stand in it as source. It is called for every request on both sides, mostly with
    cold caches, where a call for each field, or another function, takes longer than all the rest.

    Args: source (of the function: {fields} is their values with commas, {are_good} true if every check finds its value
    good, which comes first), value (source of one: {name} is the field's name, {place} its place in a frame).
    """
    conditions = []
    scope = {"kind": kind, "pack": _pack, "version": PROTOCOL_VERSION, "op": kind.op}
    for place, (name, hint) in enumerate(hints.items(), _ENVELOPE_ITEMS):
        limit = get_args(hint)[1] if get_origin(hint) is Annotated else None
        given = f"(_{name} := {value.format(name=name, place=place)})"
        if isinstance(limit, Range):
            conditions.append(f"type{given} is int and {limit.low} <= _{name} <= {limit.high}")
        elif hint is bool:
            conditions.append(f"type{given} is bool")
        else:
            conditions.append(f"check_{name}{given} is None")
            scope[f"check_{name}"] = _check_of(hint)
    values = "".join(f"_{name}, " for name in hints)
    function: Callable[..., Any] = eval(
        source.format(fields=values, are_good=" and ".join(conditions) or "True", count=_ENVELOPE_ITEMS + len(hints)),
        scope,
    )
    return function


_ENCODE: Final = "lambda request, number, token: pack((version, op, number, token, {fields})) if {are_good} else None"
_BUILD: Final = "lambda items: kind({fields}) if len(items) == {count} and {are_good} else None"


class _Shape(NamedTuple):
    """How a request class reads and writes.

    Fields: names (of its fields), checks (theirs), required (fields without a default), encode (request, its id, token
    -> frame; None if a check refuses a field), build (items of a frame -> request; None if they are not as many as it
    has fields, or a check refuses one).
    """

    names: tuple[str, ...]
    checks: tuple[Check, ...]
    required: int
    encode: Callable[[Request, int, bytes], bytes | None]
    build: Callable[[list[Any]], Request | None]

    def fault_of(self, values: Sequence[Any]) -> tuple[str, str]:
        """The first field whose check refuses its value, and what was expected. Fewer values than fields are fine."""
        faults = ((name, check(value)) for name, check, value in zip(self.names, self.checks, values, strict=False))
        return next(((name, fault) for name, fault in faults if fault is not None), ("", ""))


def _shape_of(kind: type[Request]) -> _Shape:
    annotations = get_type_hints(kind, include_extras=True)
    hints = {field.name: annotations[field.name] for field in fields(kind)}
    required = sum(field.default is MISSING and field.default_factory is MISSING for field in fields(kind))
    return _Shape(
        tuple(hints),
        tuple(map(_check_of, hints.values())),
        required,
        _compile(kind, hints, _ENCODE, "request.{name}"),
        _compile(kind, hints, _BUILD, "items[{place}]"),
    )


class _Shapes(dict[type[Request], _Shape]):
    """Shapes by class, each made when it is first needed: to make them all takes longer than to import the rest."""

    def __missing__(self, kind: type[Request]) -> _Shape:
        shape = self[kind] = _shape_of(kind)
        return shape


_SHAPES: Final = _Shapes()


# -- requests --------------------------------------------------------------------------------------------------------
def encode_request(request: Request, request_id: int, token: bytes = b"") -> bytes:
    """The frame that asks for `request`.

    Args:   request_id (1..MAX_REQUEST_ID, unique in the session), token (of the session; b"" on the control socket).
    Raises: InvalidArgumentError if a field is of a wrong type or out of range; MessageTooLargeError if the frame is
            over MAX_REQUEST_BYTES (the daemon would cut the connection). Nothing has been sent.
    """
    shape = _SHAPES[type(request)]
    frame = shape.encode(request, request_id, token)
    if frame is None:
        name, fault = shape.fault_of([getattr(request, name) for name in shape.names])
        raise InvalidArgumentError(f"{request.name}: {name}: {fault}", field=name)
    if len(frame) > MAX_REQUEST_BYTES:
        raise MessageTooLargeError(
            f"{request.name}: the request takes {len(frame)} bytes; one may take {MAX_REQUEST_BYTES}",
            size=len(frame),
            limit=MAX_REQUEST_BYTES,
        )
    return frame


def decode_request(frame: bytes, ops: Mapping[int, type[Request]]) -> Envelope:
    """The request in a frame from anybody.

    Args:   ops (the operations of the socket that the frame came from: messages.OPS or CONTROL_OPS).
    Raises: MessageError, MessageTooLargeError, UnknownOpError or VersionError, each with details["request_id"], 0
            where no id could be read.
    """
    if len(frame) > MAX_REQUEST_BYTES:
        raise MessageTooLargeError(
            f"the request takes {len(frame)} bytes; one may take {MAX_REQUEST_BYTES}",
            request_id=0,
            size=len(frame),
            limit=MAX_REQUEST_BYTES,
        )
    try:
        items = _unpack(frame, max_array_len=_MAX_ARRAY, max_map_len=_MAX_MAP, max_ext_len=0)
    except _UNPACK_ERRORS:
        # No cause: its text may carry the body.
        raise MessageError("the request is not one msgpack value within the limits", request_id=0) from None
    if type(items) is not list or len(items) < _ENVELOPE_ITEMS:
        raise MessageError("a request is an array: version, op, request id, token, fields", request_id=0)
    request_id = items[2]
    if type(request_id) is not int or not 0 < request_id <= MAX_REQUEST_ID:
        raise MessageError(f"a request id is an integer from 1 to {MAX_REQUEST_ID}", request_id=0)
    if items[0] != PROTOCOL_VERSION or type(items[0]) is not int:
        raise _version_error(items[0], request_id)
    op, token = items[1], items[3]
    if type(op) is not int or (kind := ops.get(op)) is None:
        raise UnknownOpError(f"no operation {_describe(op)} on this socket", request_id=request_id)
    if type(token) is not bytes or len(token) not in (0, TOKEN_BYTES):
        raise MessageError(f"a session's token is {TOKEN_BYTES} bytes, or none", request_id=request_id)
    request = _SHAPES[kind].build(items)
    if request is None:
        request = _build(kind, items[_ENVELOPE_ITEMS:], request_id)
    envelope: Envelope = _new(Envelope, (request_id, token, request))
    return envelope


def _build(kind: type[Request], values: list[Any], request_id: int) -> Request:
    """The message of class `kind` from fields that are not just its own; extra ones are a newer client's, missing ones
    have defaults."""
    shape = _SHAPES[kind]
    if len(values) != len(shape.names):
        if len(values) < shape.required:
            raise MessageError(
                f"{kind.name}: {shape.required} fields are needed, {len(values)} came", request_id=request_id
            )
        del values[len(shape.names) :]
    name, fault = shape.fault_of(values)
    if name:
        raise MessageError(f"{kind.name}: {name}: {fault}", request_id=request_id, field=name)
    return kind(*values)


def _version_error(version: object, request_id: int) -> HeapdError:
    if type(version) is not int:
        return MessageError("a request begins with the protocol version, an integer", request_id=request_id)
    return VersionError(
        f"the daemon speaks protocol version {PROTOCOL_VERSION}, the request is of version {_describe(version)}",
        request_id=request_id,
        daemon=PROTOCOL_VERSION,
    )


# -- replies ---------------------------------------------------------------------------------------------------------
def encode_reply(request_id: int, result: Any) -> bytes:
    """The frame that answers request `request_id` with `result`, plain values as msgpack takes them."""
    frame: bytes = _pack((request_id, 0, result))
    return frame


def encode_error(request_id: int, error: HeapdError) -> bytes:
    """The frame that answers request `request_id` with `error`."""
    code, message, details = error_to_wire(error)
    frame: bytes = _pack((request_id, code, (message, details)))
    return frame


def decode_reply(frame: bytes) -> Reply:
    """The answer in a frame from the daemon; the caller turns a code that is not 0 into its error.

    Raises: MessageError if the frame is no answer.
    """
    if len(frame) > MAX_REPLY_BYTES:
        raise MessageTooLargeError(f"the answer takes {len(frame)} bytes; one may take {MAX_REPLY_BYTES}")
    try:
        items = _unpack(frame)
    except _UNPACK_ERRORS:
        raise MessageError("the answer is not one msgpack value") from None
    if type(items) is not list or len(items) < 3:
        raise MessageError("an answer is an array: request id, code, result")
    reply: Reply = _new(Reply, items[:3])
    if type(reply.request_id) is not int or type(reply.code) is not int:
        raise MessageError("an answer's request id and code are integers")
    if reply.code != 0 and not _is_error(reply.payload):
        raise MessageError("an error's answer carries a text and its details")
    return reply


def _is_error(payload: Any) -> bool:
    """Whether `payload` is [message, details] as errors.error_from_wire takes them."""
    if type(payload) is not list or len(payload) != 2:
        return False
    message, details = payload
    return type(message) is str and type(details) is dict and all(type(key) is str for key in details)
