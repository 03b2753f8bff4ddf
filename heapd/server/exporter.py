"""Metrics over HTTP on loopback, from a thread of its own that never touches the daemon's records.

A scrape asks the loop, through a descriptor that the loop watches, for a status; the loop hands one over in its next
turn (30 us), the thread makes the text of it. Scrapes within a second share one status, so that nobody can make the
loop work by asking; and while the loop is busy they get the last one. One connection at a time: whoever opens many
waits in the kernel's queue, and takes no descriptor from the daemon's clients.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer
from typing import Any, Final

from heapd.errors import InvalidArgumentError
from heapd.service import CONTENT_TYPE, check_extra, expose

__all__ = ["Exporter"]

log = logging.getLogger("heapd.server")

_HOST: Final = "127.0.0.1"
_FRESH_S: Final = 1.0
_PATIENCE_S: Final = 2.0  # arbitrary: longer than the loop's longest stall, shorter than a scraper's
_CLOSE_S: Final = 0.5  # arbitrary: how long a stop waits for a scrape at work
_CLIENT_TIMEOUT_S: Final = 5.0  # a connection that says nothing is dropped


class Exporter:
    """A listening HTTP server. Fields: port, descriptor (readable when a status is wanted: call `supply` then)."""

    def __init__(self, port: int) -> None:
        """Listen on a port of loopback, 0: any that is free.

        Raises: InvalidArgumentError if it is taken or may not be used; MissingExtraError without prometheus-client.
        """
        check_extra()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._handed = threading.Condition()
        self._status: Mapping[str, Any] | None = None
        self._taken_at = 0.0
        self._exposed: Mapping[str, Any] | None = None
        self._text: bytes | None = None
        try:
            self._server = _Server((_HOST, port), _handler_for(self))
        except OSError as error:
            os.close(self.descriptor)
            raise InvalidArgumentError(
                f"metrics cannot be served on {_HOST}:{port}: {error.strerror}; choose another port", field="metrics"
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._is_closed = False

    def start(self) -> None:
        self._thread.start()
        log.info("metrics are at http://%s:%d/metrics", _HOST, self.port, extra={"port": self.port})

    def close(self) -> None:
        """Stop listening. A scraper that is slow is not waited for: its thread goes with the process."""
        with self._handed:
            self._is_closed = True
            self._handed.notify_all()
        if self._thread.is_alive():
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for a connection
            self._thread.join(_CLOSE_S)
        self._server.server_close()
        if not self._thread.is_alive():
            os.close(self.descriptor)

    def _serve(self) -> None:
        while not self._is_closed:
            self._server.handle_request()

    # -- the loop's side ---------------------------------------------------------------------------------------------
    def supply(self, status: Mapping[str, Any]) -> None:
        """Hand over a status that nobody changes any more; a call of the loop's thread."""
        os.eventfd_read(self.descriptor)
        with self._handed:
            self._status, self._taken_at = status, time.monotonic()
            self._handed.notify_all()

    # -- the thread's side -------------------------------------------------------------------------------------------
    def text(self) -> bytes | None:
        """What a scrape gets, made once for each status; None if there has been no status yet."""
        status = self.status()
        if status is not None and status is not self._exposed:
            self._exposed, self._text = status, expose(status)
        return self._text

    def status(self) -> Mapping[str, Any] | None:
        """A status at most a second old, the last one if the loop is busy, None if there has been none yet."""
        with self._handed:
            if time.monotonic() - self._taken_at > _FRESH_S or self._status is None:
                before = self._taken_at
                os.eventfd_write(self.descriptor, 1)
                self._handed.wait_for(lambda: self._taken_at > before or self._is_closed, _PATIENCE_S)
            return self._status


class _Server(TCPServer):  # http.server's own looks its host up in the DNS
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("metrics: a scraper left", exc_info=True)


def _handler_for(exporter: Exporter) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_S
        server_version = "heapd"
        sys_version = ""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                self.send_error(404, explain="metrics are at /metrics")
                return
            text = exporter.text()
            if text is None:
                self.send_error(503, explain="the daemon is busy")
                return
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: Any) -> None:
            log.debug("metrics: " + format, *arguments)

    return Handler
