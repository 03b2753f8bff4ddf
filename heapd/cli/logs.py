"""How a daemon's log looks: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import click

__all__ = ["log_options", "set_up_logging"]

_LEVELS: Final = ("debug", "info", "warning", "error")
_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
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


def set_up_logging(level: str, form: str) -> None:
    """Log to stderr from now on. Args: level (debug to error), form ("text" or "json")."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def log_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--log-level` and `--log-format`; it is called with `log_level` and `log_format`."""
    level = click.option("--log-level", type=click.Choice(_LEVELS), default="info", show_default=True)
    form = click.option("--log-format", type=click.Choice(("text", "json")), default="text", show_default=True)
    return level(form(command))
