"""The daemon's log: lines for people, or a JSON object a line, with the figures as fields."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

import pytest

from heapd.cli.logs import JsonFormatter, UnhurtHandler
from heapd.layout import F_SERIALIZE
from heapd.wire.messages import SessionClose
from tests.conftest import StartDaemon
from tests.server.raw import RawSession


def record(message: str, *values: Any, **extra: Any) -> logging.LogRecord:
    logger = logging.getLogger("heapd.test")
    return logger.makeRecord("heapd.test", logging.WARNING, __file__, 1, message, values, None, extra=extra)


def formatted(one: logging.LogRecord) -> Any:
    line = JsonFormatter().format(one)
    assert "\n" not in line
    return json.loads(line)


def test_a_line_says_when_who_and_what() -> None:
    """The event is the same for the same kind of thing; the message has its values."""
    fields = formatted(record("process %d of %s", 7, "x"))
    assert (fields["level"], fields["logger"], fields["message"]) == ("warning", "heapd.test", "process 7 of x")
    assert fields["event"] == "process %d of %s"
    assert fields["time"].endswith("+00:00")
    assert set(fields) == {"time", "level", "logger", "pid", "message", "event"}


def test_extras_are_fields() -> None:
    """Whatever they are, the line is JSON."""
    fields = formatted(record("x", session=3, thing={1, 2}.__class__, text="é\n"))
    assert (fields["session"], fields["text"]) == (3, "é\n")
    assert "set" in fields["thing"]


def test_a_traceback_is_a_field() -> None:
    """On one line like everything else."""
    one = record("fault")
    try:
        raise ValueError("no")
    except ValueError:
        one.exc_info = sys.exc_info()
    assert "ValueError: no" in formatted(one)["exception"]


def test_a_line_longer_than_a_pipe_has_room_for_is_lost_and_counted() -> None:
    """No byte of it waits for the reader; what follows comes whole, after a line that says so."""
    reader, writer = os.pipe()
    try:
        handler = UnhurtHandler(writer)
        for text in ("x" * 100_000, "lost, too"):
            handler.emit(record(text))
        assert set(os.read(reader, 1 << 20)) == {ord("x")}
        handler.emit(record("here"))
        assert os.read(reader, 1 << 20) == b"2 lines of this log are lost, because nobody read it\nhere\n"
        os.close(reader)
        handler.emit(record("to nobody"))
    finally:
        os.close(writer)


def test_a_daemon_logs_json_from_its_first_line_to_its_last(start_daemon: StartDaemon) -> None:
    """Its start, each session with its number and process, its stop."""
    daemon = start_daemon("--log-format", "json")
    with RawSession(daemon.endpoint) as session:
        session.create_heap("x", F_SERIALIZE)
        session.ask(SessionClose())
    assert daemon.stop() == 0
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    opened = [line for line in lines if line["event"].startswith("session %d opened")]
    assert [line["session"] for line in opened] == [1]
    assert {line["level"] for line in lines} <= {"info", "warning"}
    assert lines[-1]["message"].startswith("stopping ")


@pytest.mark.parametrize(("level", "is_silent"), [("error", True), ("info", False)])
def test_the_level_is_chosen(start_daemon: StartDaemon, level: str, is_silent: bool) -> None:
    """Nothing below it is written."""
    daemon = start_daemon("--log-level", level)
    assert daemon.stop() == 0
    assert (daemon.log == "") == is_silent
