"""`heapd status`: what a daemon says about itself."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import click

from heapd.cli.control import ask
from heapd.cli.params import ENDPOINT, Seconds, endpoint_option, json_option
from heapd.units import format_size
from heapd.wire import Endpoint
from heapd.wire.messages import Status

__all__ = ["status"]

_SIZES = ("reserve", "reserved", "commit_limit", "committed", "peak_committed")


@click.command()
@click.argument("target", metavar="[ENDPOINT]", type=ENDPOINT, required=False)
@endpoint_option
@json_option
@click.option("--timeout", type=Seconds(min=0), default=5.0, show_default=True, help="Seconds to wait.")
def status(target: Endpoint | None, endpoint: Endpoint, as_json: bool, timeout: float) -> None:
    """Show a daemon's name, process, memory, sessions, and how long requests take in it."""
    values: dict[str, Any] = ask(target or endpoint, Status(), timeout)
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    width = max(map(len, values))
    for name, value in values.items():
        click.echo(f"{name:<{width}}  {_shown(name, value)}")


def _shown(name: str, value: Any) -> str:
    if name in _SIZES:
        return format_size(value)
    if name == "started_at":
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    return str(value)
