"""What crosses the socket: the requests (messages), their frames (codec), where the socket is
(endpoint) and who may reach it (access).

PROTOCOL.md in this folder is the specification; it changes together with PROTOCOL_VERSION.
"""

from heapd.wire.access import Access, check_directory, make_directory
from heapd.wire.codec import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_ID,
    Envelope,
    Reply,
    decode_reply,
    decode_request,
    encode_error,
    encode_reply,
    encode_request,
)
from heapd.wire.endpoint import DEFAULT_NAME, LEDGER_SUFFIX, SHUT_SUFFIX, Endpoint, own_directory, runtime_directory
from heapd.wire.folder import JobFolder, abandoned_folders
from heapd.wire.messages import (
    CONTROL_OPS,
    KEPT_REPLIES,
    MAX_BATCH,
    MAX_NAME_BYTES,
    MAX_REQUEST_BYTES,
    OPS,
    PROTOCOL_VERSION,
    TOKEN_BYTES,
    Request,
)

__all__ = [
    "CONTROL_OPS",
    "DEFAULT_NAME",
    "KEPT_REPLIES",
    "MAX_BATCH",
    "MAX_NAME_BYTES",
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_BYTES",
    "MAX_REQUEST_ID",
    "OPS",
    "PROTOCOL_VERSION",
    "TOKEN_BYTES",
    "Access",
    "LEDGER_SUFFIX",
    "SHUT_SUFFIX",
    "Endpoint",
    "Envelope",
    "JobFolder",
    "Reply",
    "Request",
    "abandoned_folders",
    "check_directory",
    "decode_reply",
    "decode_request",
    "encode_error",
    "encode_reply",
    "encode_request",
    "make_directory",
    "own_directory",
    "runtime_directory",
]
