"""`heapd metrics`: a daemon's figures as Prometheus text, for a textfile collector or to look at."""

from __future__ import annotations

import click

import heapd_client as hc
from heapd.cli.params import ENDPOINT, Seconds, endpoint_option, one_endpoint
from heapd.service import check_extra, expose
from heapd.wire import Endpoint

__all__ = ["metrics"]


@click.command()
@click.argument("target", metavar="[ENDPOINT]", type=ENDPOINT, required=False)
@endpoint_option
@click.option("--timeout", type=Seconds(min=0), default=5.0, show_default=True, help="Seconds to wait.")
def metrics(target: Endpoint | None, endpoint: Endpoint, timeout: float) -> None:
    """Print a daemon's metrics as Prometheus scrapes them.

    `heapd serve --metrics PORT` serves the same over HTTP. Needs the extra heapd[metrics].
    """
    check_extra()
    click.echo(expose(hc.daemon_status(str(one_endpoint(target, endpoint)), timeout=timeout)), nl=False)
