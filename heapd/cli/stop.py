"""`heapd stop`: ask a daemon to end, and see that it has."""

from __future__ import annotations

import os
import select

import click

from heapd.cli.control import ask
from heapd.cli.params import ENDPOINT, Seconds, endpoint_option
from heapd.errors import DaemonLostError
from heapd.wire import Endpoint
from heapd.wire.messages import Status, Stop

__all__ = ["stop"]


@click.command()
@click.argument("target", metavar="[ENDPOINT]", type=ENDPOINT, required=False)
@endpoint_option
@click.option("--timeout", type=Seconds(min=0), default=10.0, show_default=True, help="Seconds to wait.")
def stop(target: Endpoint | None, endpoint: Endpoint, timeout: float) -> None:
    """Stop a daemon and wait until it has ended; its heaps are gone then."""
    endpoint = target or endpoint
    pid = int(ask(endpoint, Status(), timeout)["pid"])
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        pidfd = -1  # it is ending by itself
    ask(endpoint, Stop(), timeout)
    if pidfd >= 0:
        _wait_for_end(pidfd, endpoint, timeout)
    click.echo(f"daemon {endpoint.name} (process {pid}) has stopped")


def _wait_for_end(pidfd: int, endpoint: Endpoint, timeout: float) -> None:
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise DaemonLostError(f"the daemon at {endpoint} was told to stop, and had not ended after {timeout:g} s")
    finally:
        os.close(pidfd)
