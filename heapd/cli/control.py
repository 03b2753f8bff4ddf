"""A few questions to a daemon's control socket, without a session: what status and stop need."""

from __future__ import annotations

import os
import socket
from time import monotonic, sleep
from typing import Any, Final

import zmq

from heapd.errors import DaemonLostError, DaemonNotFoundError, error_from_wire
from heapd.wire import Endpoint, Request, check_directory, decode_reply, encode_request

__all__ = ["ask"]

_POLL_S: Final = 0.01
_SLICE_S: Final = 0.1  # how late it is noticed that a daemon has ended instead of answering


def ask(endpoint: Endpoint, request: Request, timeout_s: float = 5.0) -> Any:
    """The daemon's answer to a control request.

    Raises: DaemonNotFoundError if nobody listens, or no longer; DaemonLostError if no answer comes within `timeout_s`;
            SegmentError if somebody else could have put the socket there; whatever error the daemon answers.
    """
    check_listening(endpoint, timeout_s)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as dealer:
            dealer.set(zmq.LINGER, 0)
            dealer.connect(endpoint.control)
            dealer.send(encode_request(request, 1))
            deadline = monotonic() + timeout_s
            while not dealer.poll(int(min(_SLICE_S, max(deadline - monotonic(), 0)) * 1000)):
                left_s = deadline - monotonic()
                if left_s <= 0:
                    raise DaemonLostError(f"the daemon at {endpoint} did not answer within {timeout_s:g} s")
                check_listening(endpoint, left_s)  # it may have ended since
            reply = decode_reply(dealer.recv())
    finally:
        context.term()
    if reply.code:
        raise error_from_wire(reply.code, *reply.payload)
    return reply.payload


def check_listening(endpoint: Endpoint, timeout_s: float) -> None:
    """Wait for a daemon that is just starting, or starts again after its server died.

    Raises: DaemonNotFoundError if nobody listens at the endpoint: zmq itself would wait for somebody to come.
    """
    if not os.path.lexists(endpoint.directory):
        raise _not_found(endpoint)
    check_directory(endpoint.directory)
    deadline = monotonic() + timeout_s
    while not _is_answering(endpoint.control_path):
        holder = endpoint.holder()
        if holder is None or not os.path.exists(f"/proc/{holder[0]}") or monotonic() >= deadline:
            raise _not_found(endpoint)
        sleep(_POLL_S)


def _is_answering(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _not_found(endpoint: Endpoint) -> DaemonNotFoundError:
    return DaemonNotFoundError(
        f"no daemon answers at {endpoint}; start one with `heapd serve -e {endpoint}`", endpoint=str(endpoint)
    )
