"""`heapd stop`: ask a daemon to end, and see that it has."""

from __future__ import annotations

import click

import heapd_client as hc
from heapd.cli.params import ENDPOINT, Seconds, endpoint_option, one_endpoint
from heapd.wire import Endpoint

__all__ = ["stop"]


@click.command()
@click.argument("target", metavar="[ENDPOINT]", type=ENDPOINT, required=False)
@endpoint_option
@click.option("--timeout", type=Seconds(min=0), default=10.0, show_default=True, help="Seconds to wait.")
def stop(target: Endpoint | None, endpoint: Endpoint, timeout: float) -> None:
    """Stop a daemon and wait until it has ended; its heaps are gone then."""
    endpoint = one_endpoint(target, endpoint)
    pid = hc.stop_daemon(str(endpoint), timeout=timeout)
    click.echo(f"daemon {endpoint.name} (process {pid}) has stopped")
