"""How a daemon's log looks: lines for people, or one JSON object a line for programs; and that it waits for nobody."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import click

__all__ = ["log_options", "set_up_logging"]

_LEVELS: Final = ("debug", "info", "warning", "error")
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PATIENCE_MS: Final = 50  # arbitrary, once until there is room again: for a reader who is slower than a burst of lines
# What a record has by itself; anything else was given as `extra` by whoever logged, and is a field.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One line of JSON a record.

    Fields: time (ISO 8601, UTC, ms), level, logger, pid, message, event (the message without its values: the same for
    the same kind of event), whatever was given as `extra`, and exception (a traceback as text) if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            "event": str(record.msg),
        }
        fields.update((key, value) for key, value in vars(record).items() if key not in _OWN)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


class UnhurtHandler(logging.Handler):
    """Writes to a descriptor, and does without what does not fit: whoever reads the log may have stopped to do so, and
    neither clients nor the supervisor shall wait for that. When there is room again, a line says how many were lost.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._lost and self._write(self._loss()):
                self._lost = 0
            if self._lost or not self._write(record):
                self._lost += 1
        except Exception:
            self.handleError(record)

    def _write(self, record: logging.LogRecord) -> bool:
        """Whether there was room for all of it."""
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            for at in range(0, len(line), select.PIPE_BUF):  # a pipe that has room at all has it for so much
                if not self._room.poll(0 if self._lost else _PATIENCE_MS):
                    return False
                os.write(self._descriptor, line[at : at + select.PIPE_BUF])
        except OSError:  # nobody reads any more, or the disk is full
            return False
        return True

    def _loss(self) -> logging.LogRecord:
        text = "%d lines of this log are lost, because nobody read it"
        return logging.LogRecord("heapd", logging.WARNING, __file__, 0, text, (self._lost,), None)


def set_up_logging(level: str, form: str) -> None:
    """Log to stderr from now on. Args: level (debug to error), form ("text" or "json")."""
    handler = UnhurtHandler(sys.stderr.fileno())
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--log-level` and `--log-format`; it is called with `log_level` and `log_format`."""
    level = click.option("--log-level", type=click.Choice(_LEVELS), default="info", show_default=True)
    form = click.option("--log-format", type=click.Choice(("text", "json")), default="text", show_default=True)
    return level(form(command))
