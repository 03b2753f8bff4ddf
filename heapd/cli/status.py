"""`heapd status`: what a daemon says about itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import click

import heapd_client as hc
from heapd.cli.params import ENDPOINT, Seconds, endpoint_option, json_option, one_endpoint
from heapd.units import format_size
from heapd.wire import Endpoint

__all__ = ["status"]

# Shown when they are not 0: something came up.
_INCIDENTS: Final = (
    "requests_refused", "requests_repeated", "callers_refused", "anonymous_dropped", "dead_dropped",
    "replies_undeliverable", "peers_cut_off", "gates_shut", "gates_renewed",
)  # fmt: skip


@click.command()
@click.argument("target", metavar="[ENDPOINT]", type=ENDPOINT, required=False)
@endpoint_option
@json_option
@click.option("--timeout", type=Seconds(min=0), default=5.0, show_default=True, help="Seconds to wait.")
def status(target: Endpoint | None, endpoint: Endpoint, as_json: bool, timeout: float) -> None:
    """Show a daemon's process, memory, sessions, and how long requests take in it.

    --json has every figure; heapd/wire/PROTOCOL.md explains each.
    """
    values = hc.daemon_status(str(one_endpoint(target, endpoint)), timeout=timeout)
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for title, text in _lines(values):
        click.echo(f"{title:<10}{text}")


def _lines(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, text) of each line."""
    since = datetime.fromtimestamp(values["started_at"], UTC).isoformat(timespec="seconds")
    yield "daemon", f"{values['name']} at {values['endpoint']}, heapd {values['version']}, Python {values['python']}"
    yield "process", f"{values['pid']}, {values['state']} for {_span(values['uptime_s'])}, since {since}"
    yield "restarts", f"{values['restarts']:,}"
    yield "sessions", f"{values['sessions']:,} of at most {values['session_limit']:,}"
    yield "heaps", f"{values['heaps']:,} of at most {values['heap_limit']:,}; {values['waiters']:,} wait for a name"
    yield (
        "memory",
        f"{format_size(values['committed'])} committed of at most {format_size(values['commit_limit'])}, "
        f"{format_size(values['peak_committed'])} at the most so far; {format_size(values['ledger'])} of ledger",
    )
    yield (
        "arena",
        f"{format_size(values['reserved'])} reserved of {format_size(values['reserve'])}, /dev/shm/{values['segment']}",
    )
    yield "requests", f"{values['requests']:,} since the start{_durations(values) if values['requests'] else ''}"
    incidents = [f"{values[name]:,} {name.replace('_', ' ')}" for name in _INCIDENTS if values.get(name)]
    yield "incidents", ", ".join(incidents) or "none"


def _durations(values: dict[str, Any]) -> str:
    return (
        f"; in the daemon: median {_us(values['rpc_median_us'])}, 90 % within {_us(values['rpc_p90_us'])}, "
        f"99 % within {_us(values['rpc_p99_us'])}, longest {_us(values['rpc_max_us'])}"
    )


def _span(seconds: float) -> str:
    """A duration in its two largest units: "2 d 3 h", "41 s"."""
    minutes, whole_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (whole_seconds, "s")) if n]
    return " ".join(parts[:2]) or "less than a second"


def _us(microseconds: float) -> str:
    """Microseconds for people: "12 us", "3.2 ms", "1.5 s"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.1f} {unit}"
    return f"{microseconds:.0f} us"
