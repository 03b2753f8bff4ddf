"""Metrics over HTTP: from a thread that asks the loop and touches nothing; whatever clients do, the loop goes on."""

from __future__ import annotations

import http.client
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from heapd.errors import InvalidArgumentError
from heapd.server.exporter import Exporter
from tests.harness import wait_until

pytest.importorskip("prometheus_client", reason="needs the extra heapd[metrics]")


class Owner(threading.Thread):
    """Stands for the loop: supplies a status when asked, unless somebody holds `turn`. Field: supplied (how often)."""

    def __init__(self, exporter: Exporter) -> None:
        super().__init__()
        self.exporter = exporter
        self.supplied = 0
        self.turn = threading.Lock()
        self.over = threading.Event()

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.exporter.descriptor, select.POLLIN)
        while not self.over.is_set():
            with self.turn:
                if poll.poll(5):
                    self.supplied += 1
                    self.exporter.supply({"name": "x", "sessions": self.supplied})
            time.sleep(0.001)


@pytest.fixture
def owner() -> Iterator[Owner]:
    exporter = Exporter(0)
    owner = Owner(exporter)
    exporter.start()
    owner.start()
    yield owner
    owner.over.set()
    owner.join()
    exporter.close()


def get(port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str, str]:
    """(status, content type, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type") or "", answer.read().decode()
    finally:
        connection.close()


def test_a_scrape_gets_the_loops_status_as_text(owner: Owner) -> None:
    """With the content type that Prometheus knows."""
    code, kind, text = get(owner.exporter.port)
    assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "heapd_sessions 1.0" in text


def test_scrapes_within_a_second_share_a_status(owner: Owner) -> None:
    """Nobody makes the loop work by asking often."""
    started = time.monotonic()
    texts = {get(owner.exporter.port)[2] for _ in range(20)}
    if time.monotonic() - started < 0.9:  # else the machine stood still, and it may rightly be two
        assert (len(texts), owner.supplied) == (1, 1)


def test_while_the_loop_is_busy_the_last_status_is_served(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late, not never; and before there is any, the scraper is told to come again."""
    import heapd.server.exporter as module

    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(module, "_FRESH_S", 0.0)
    with owner.turn:
        assert get(owner.exporter.port)[0] == 503
    assert wait_until(lambda: get(owner.exporter.port)[0] == 200)
    with owner.turn:
        first, second = get(owner.exporter.port), get(owner.exporter.port)
        assert first[0] == second[0] == 200
        assert first == second


@pytest.mark.parametrize(
    ("path", "method", "code"),
    [("/", "GET", 200), ("/metrics?x=1", "GET", 200), ("/etc/passwd", "GET", 404), ("/metrics", "POST", 501)],
)
def test_other_paths_and_methods_are_refused(owner: Owner, path: str, method: str, code: int) -> None:
    """It serves one page."""
    assert get(owner.exporter.port, path, method)[0] == code


def test_rubbish_and_silence_do_not_keep_others_out(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that are no HTTP are an error; a connection that says nothing is dropped after a while."""
    monkeypatch.setattr(owner.exporter._server.RequestHandlerClass, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", owner.exporter.port)) as silent:
        with socket.create_connection(("127.0.0.1", owner.exporter.port)) as noisy:
            noisy.sendall(b"\0\xff" * 1000 + b"\r\n\r\n")
            assert get(owner.exporter.port)[0] == 200
        silent.settimeout(10)
        assert silent.recv(1) == b""


def test_closing_does_not_wait_for_a_scraper() -> None:
    """Nor for one that never says what it wants: a stop of the daemon is not held up."""
    exporter = Exporter(0)
    exporter.start()
    with socket.create_connection(("127.0.0.1", exporter.port)) as silent:
        wait_until(lambda: exporter._thread.is_alive())
        silent.sendall(b"GET /metr")
        started = time.monotonic()
        exporter.close()
        assert time.monotonic() - started < 5
    exporter._thread.join(10)
    assert not exporter._thread.is_alive()


def test_it_listens_on_loopback_alone(owner: Owner) -> None:
    """Whatever interfaces the machine has."""
    assert owner.exporter._server.server_address[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_said(owner: Owner) -> None:
    """With what to do; no descriptor is left open."""
    with pytest.raises(InvalidArgumentError, match=rf"127.0.0.1:{owner.exporter.port}: .*choose another port"):
        Exporter(owner.exporter.port)
