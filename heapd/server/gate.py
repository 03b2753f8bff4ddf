"""One listening ROUTER socket: opened, shut while descriptors are scarce, made anew when its buffers run away.

libzmq aborts the whole process when accept() meets the descriptor limit, so a gate counts what it lets in and the
loop shuts it in time. Shutting must not disturb who is in, and an unbind would: libzmq ends a listener's connections
with it. So the socket file is renamed, and nobody else finds it; only what waits in the listener's backlog still
comes in.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import zmq

from heapd.server.config import Config
from heapd.wire import MAX_REQUEST_BYTES, SHUT_SUFFIX, Access

__all__ = ["Gate"]

_MANDATORY: Final = 1  # a reply to somebody who has left, or does not read, is an error and not a silent loss


class Gate:
    """A listening socket. Fields: socket, monitor (its events), is_open, accepted (connections since last asked)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: str, config: Config) -> None:
        self._context = context
        self._path = path
        self._shut_path = path + SHUT_SUFFIX
        self._address = f"ipc://{path}"
        self._config = config
        self._access = Access(os.getuid(), config.gid)
        self.is_open = self._is_bound = False
        self.socket, self.monitor = self._make()

    def _make(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        socket = self._context.socket(zmq.ROUTER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.ROUTER_MANDATORY, _MANDATORY)
        socket.set(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
        socket.set(zmq.RCVHWM, self._config.backlog_frames)
        socket.set(zmq.SNDHWM, self._config.backlog_frames)
        socket.set(zmq.HANDSHAKE_IVL, self._config.handshake_ms)
        if self._access.gid is None:  # for a group the socket's permissions do it; libzmq knows primary groups only
            socket.set(zmq.IPC_FILTER_UID, self._access.uid)
        monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED)
        return socket, monitor

    def open(self) -> None:
        """Listen. A socket file that is there, from the last time, is replaced."""
        if self.is_open:
            return
        if self._is_bound:
            os.rename(self._shut_path, self._path)
        else:
            self.socket.bind(self._address)  # by the umask it is nobody's but ours until the next line
            self._access.give(self._path)
            self._is_bound = True
        self.is_open = True

    def shut(self) -> None:
        """Let nobody else in; who is in stays."""
        if self.is_open:
            os.rename(self._path, self._shut_path)
            self.is_open = False

    def renew(self) -> None:
        """Drop every connection with all that is buffered, and begin again; clients reconnect by themselves.

        The gate is shut afterwards.
        """
        self.close()
        self.socket, self.monitor = self._make()

    def close(self, linger_ms: int = 0) -> None:
        """Close for good, giving answers that are on their way `linger_ms` to leave."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger_ms)
        self.is_open = self._is_bound = False
        for path in (self._path, self._shut_path):  # libzmq leaves them
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def take_accepted(self) -> int:
        """How many connections came in since the last call."""
        count = 0
        with contextlib.suppress(zmq.Again):
            while True:
                self.monitor.recv_multipart(zmq.NOBLOCK)
                count += 1
        return count
