"""A client by hand: one DEALER a socket, one frame a request, nothing of heapd_client; and peers that are worse."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from heapd.errors import error_from_wire
from heapd.layout import F_SERIALIZE, LAYOUT_VERSION
from heapd.wire import Endpoint, Request, decode_reply, encode_request
from heapd.wire.messages import HeapAlloc, HeapCreate, HeapStatisticsGet, Hello, Status
from tests import harness

ANSWER_MS = 5000
ZMTP_GREETINGS = {
    # Signature, then the peer's revision and socket type; no security, so no metadata.
    "1.0": b"\x01\x00",  # a length and flags: an anonymous identity
    "2.0": b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x01\x05\x00\x00",
}


class Dealer:
    """One DEALER socket of its own context."""

    def __init__(self, address: str, identity: bytes = b"") -> None:
        self.address = address
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.reconnect_ivl = 10
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(address)

    def send(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)

    def receive(self, deadline_ms: int = ANSWER_MS) -> tuple[int, int, Any]:
        """The next answer: (request id, code, payload). Fails the test if none comes."""
        assert self.socket.poll(deadline_ms), f"no answer from {self.address} within {deadline_ms} ms"
        return tuple(decode_reply(self.socket.recv()))

    def has_answer(self, within_ms: int) -> bool:
        return bool(self.socket.poll(within_ms))

    def result(self) -> Any:
        """The next answer's result; raises its error."""
        _, code, payload = self.receive()
        if code:
            raise error_from_wire(code, *payload)
        return payload

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()

    def __enter__(self) -> Dealer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class RawSession:
    """A session: hello on the control socket, requests on the work socket. Fields: greeting, token, work."""

    def __init__(self, endpoint: str | Endpoint) -> None:
        self.greeting = hello(endpoint)
        self.token: bytes = self.greeting["token"]
        self.work = Dealer(self.greeting["work"])
        self._last_id = 0

    def send(self, request: Request, request_id: int | None = None) -> int:
        """Send without waiting. Returns: the request's id."""
        if request_id is None:
            self._last_id += 1
            request_id = self._last_id
        self.work.send(encode_request(request, request_id, self.token))
        return request_id

    def ask(self, request: Request) -> Any:
        """The result; raises the error."""
        wanted = self.send(request)
        request_id, code, payload = self.work.receive()
        assert request_id == wanted
        if code:
            raise error_from_wire(code, *payload)
        return payload

    def reconnect(self) -> None:
        """A new connection for the same session, as after a break."""
        self.work.close()
        self.work = Dealer(self.greeting["work"])

    def create_heap(self, name: str | None = None, flags: int = F_SERIALIZE) -> int:
        return int(self.ask(HeapCreate(name, 0, 0, flags))[0])

    def alloc(self, heap: int, size: int = 64) -> list[Any]:
        grant: list[Any] = self.ask(HeapAlloc(heap, size))
        return grant

    def busy_blocks(self, heap: int) -> int:
        return int(self.ask(HeapStatisticsGet(heap))[10])

    def close(self) -> None:
        self.work.close()

    def __enter__(self) -> RawSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def control(endpoint: str | Endpoint, request: Request) -> Any:
    """The answer of the control socket."""
    with Dealer(f"{endpoint}.control") as dealer:
        dealer.send(encode_request(request, 1))
        return dealer.result()


def hello(endpoint: str | Endpoint) -> dict[str, Any]:
    greeting: dict[str, Any] = control(endpoint, Hello(LAYOUT_VERSION))
    return greeting


def status(endpoint: str | Endpoint) -> dict[str, Any]:
    answer: dict[str, Any] = control(endpoint, Status())
    return answer


def connect_raw(endpoint: str | Endpoint, which: str = "control") -> socket.socket:
    """A bare connection to a socket of the daemon; nothing was said on it."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(5)
    peer.connect(f"{str(endpoint).removeprefix('ipc://')}.{which}")
    return peer


def zmtp1_message(frame: bytes) -> bytes:
    """A message of one frame as ZMTP 1.0 and 2.0 write a short one (1.0 counts the flags in the length)."""
    assert len(frame) < 255
    return bytes([len(frame) + 1, 0]) + frame


def zmtp2_message(frame: bytes) -> bytes:
    assert len(frame) < 256
    return bytes([0, len(frame)]) + frame


def zmtp3_connect(endpoint: str | Endpoint, which: str = "work") -> socket.socket:
    """A raw peer that has greeted as a DEALER of ZMTP 3.0 and may send frames."""
    peer = connect_raw(endpoint, which)
    peer.sendall(b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31))
    _receive(peer, 64)  # libzmq closes on a READY that comes before it has greeted
    ready = b"\x05READY" + b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    peer.sendall(bytes([4, len(ready)]) + ready)
    header = _receive(peer, 2)
    _receive(peer, header[1])
    return peer


def is_cut_off(peer: socket.socket) -> bool:
    """Wait until the daemon closes the connection, passing over what it still sends; fails after the timeout."""
    try:
        while peer.recv(4096):
            pass
    except ConnectionResetError:  # it had not read everything
        pass
    return True


def zmtp3_frame(frame: bytes, *, more: bool = False) -> bytes:
    return bytes([2 | more]) + len(frame).to_bytes(8, "big") + frame


def _receive(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = peer.recv(size - len(data))
        assert part, "the daemon closed the connection"
        data += part
    return data


PRELUDE = """
import sys
from heapd.layout import LAYOUT_VERSION
from heapd.wire import encode_request
from heapd.wire.messages import *
from heapd.wire.messages import Hello, SessionClose
from tests.server.raw import RawSession, zmtp3_connect, zmtp3_frame
endpoint = sys.argv[1]

def tell(word):
    print(word, flush=True)
    return sys.stdin.readline()
"""


class Program:
    """A client process. Its program may use `endpoint` and `tell(word)`, which says a word and waits to go on; it
    says "ready" at its end, and ends when told to go on."""

    def __init__(self, endpoint: str, body: str) -> None:
        program = f"{PRELUDE}\n{textwrap.dedent(body)}\ntell('ready')\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, endpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.pid = self.process.pid

    def hear(self, word: str = "ready") -> None:
        """Wait until it says `word`."""
        assert self.process.stdout is not None
        heard = self.process.stdout.readline().strip()
        assert heard == word, f"the client said {heard!r}, not {word!r}"

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """kill -9; when this returns it has ended, and is a zombie until `reap`."""
        self.process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def reap(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.reap()


class ConfiguredDaemon:
    """`heapd.server.serve` with settings that the command line does not offer; a process of its own."""

    def __init__(self, directory: Path, settings: str) -> None:
        self.endpoint = f"ipc://{directory}/{harness.unique_name()}"
        self.log_path = directory / "configured.log"
        program = (
            "import sys, logging; from heapd.server import Config, serve; from heapd.wire import Endpoint\n"
            "logging.basicConfig(level='INFO')\n"
            "serve(Config(endpoint=Endpoint.parse(sys.argv[1]), reserve=1 << 30, "
            f"until_eof_fd={harness.LIFELINE}, {settings}))\n"
        )
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, self.endpoint],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[harness.LIFELINE],
            )

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(10)
