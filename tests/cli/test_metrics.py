"""`heapd metrics` and `heapd serve --metrics`: the same figures over both ways, from a daemon that goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
import urllib.request
from typing import Any

import pytest

import heapd_client as hc
from tests.cli.conftest import Heapd
from tests.conftest import StartDaemon
from tests.harness import Daemon, unique_name, wait_until

parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra heapd[metrics]")


def samples(text: str) -> dict[str, float]:
    """Values by name, of what has no labels."""
    families = parser.text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def scrape(daemon: Daemon) -> str:
    found: Any = re.search(r"metrics are at (\S+)", daemon.log)
    with urllib.request.urlopen(found[1], timeout=10) as answer:
        return str(answer.read().decode())


def test_the_command_prints_what_the_daemon_says_of_itself(heapd: Heapd, session: hc.Session, daemon: Daemon) -> None:
    """Sessions, heaps, bytes, requests: the figures of status, in base units."""
    with session.create_heap(initial=1 << 20).alloc(8):
        values = samples(heapd("metrics", daemon.endpoint).out)
        status = daemon.status()
    assert (values["heapd_sessions"], values["heapd_heaps"]) == (1, 1)
    assert values["heapd_committed_bytes"] == status["committed"] > 1 << 20
    assert values["heapd_request_duration_seconds_count"] == status["requests"] > 0
    assert 0 < values["heapd_request_duration_seconds_sum"] < status["uptime_s"]
    assert values["heapd_start_time_seconds"] == pytest.approx(status["started_at"])


def test_a_daemon_serves_them_over_http(start_daemon: StartDaemon) -> None:
    """What a scraper gets; one that stops reading does not stop the daemon."""
    daemon = start_daemon("--metrics", "0")
    with hc.connect(daemon.endpoint, autostart=False):
        values = samples(wait_until(lambda: scrape(daemon)))
    assert set(values) >= {"heapd_sessions", "heapd_committed_bytes", "heapd_restarts_total"}


def test_a_stopped_daemon_is_a_scrape_that_fails_not_one_that_hangs(start_daemon: StartDaemon) -> None:
    """SIGSTOP: the scraper's own deadline counts; afterwards the daemon goes on."""
    daemon = start_daemon("--metrics", "0", "--restarts", "0")
    assert scrape(daemon)
    daemon.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED)  # until its last thread has stopped
    found: Any = re.search(r"metrics are at (\S+)", daemon.log)
    try:
        with pytest.raises((TimeoutError, urllib.error.URLError)):
            urllib.request.urlopen(found[1], timeout=0.2)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert "heapd_sessions 0.0" in scrape(daemon)


def test_a_port_that_is_taken_keeps_the_daemon_from_starting(start_daemon: StartDaemon, heapd: Heapd) -> None:
    """With one line, and nothing left behind."""
    daemon = start_daemon("--metrics", "0")
    found: Any = re.search(r"127.0.0.1:(\d+)", daemon.log)
    second = Daemon(daemon.directory, unique_name(), ("--metrics", found[1]))
    assert second.process.wait(20) == 1
    assert re.fullmatch(r"(.*\n)*heapd: metrics cannot be served on .*; choose another port\n", second.log)
    assert second.segments() == []


def test_no_daemon_no_metrics(heapd: Heapd, runtime_dir: object) -> None:
    """Exit status 3, for whoever collects them."""
    assert "no daemon answers" in heapd("metrics", "nobody", status=3).err


def test_status_is_for_people_or_for_programs(heapd: Heapd, session: hc.Session, daemon: Daemon) -> None:
    """Process, restarts, sessions and limits, memory, how long requests take; JSON has every figure."""
    session.create_heap()
    lines = dict(line.split(maxsplit=1) for line in heapd("status", daemon.endpoint).out.splitlines())
    assert list(lines) == [
        "daemon", "process", "restarts", "sessions", "heaps", "memory", "arena", "requests", "incidents",
    ]  # fmt: skip
    assert lines["restarts"] == "0"
    assert lines["sessions"] == "1 of at most 4,096"
    assert lines["heaps"].startswith("1 of at most ")
    assert "reserved of 1 GiB, /dev/shm/heapd-" in lines["arena"]
    assert re.search(r"median [\d.]+ [um]s, 90 % within [\d.]+ [um]s, 99 % within .*, longest ", lines["requests"])
    # On a machine that stood still, requests are repeated, and who asked may have left.
    assert re.fullmatch(r"none|\d+ (requests repeated|replies undeliverable).*", lines["incidents"])
    assert json.loads(heapd("status", daemon.endpoint, "--json").out)["session_limit"] == 4096
