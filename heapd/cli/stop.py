"""`heapd stop`: ask a daemon to end, and see that it has."""

from __future__ import annotations

import os
import select
from contextlib import ExitStack, suppress
from time import monotonic

import click

from heapd.cli.control import ask
from heapd.cli.params import ENDPOINT, Seconds, endpoint_option, one_endpoint
from heapd.errors import DaemonLostError, DaemonNotFoundError
from heapd.wire import Endpoint
from heapd.wire.messages import Status, Stop

__all__ = ["stop"]


@click.command()
@click.argument("target", metavar="[ENDPOINT]", type=ENDPOINT, required=False)
@endpoint_option
@click.option("--timeout", type=Seconds(min=0), default=10.0, show_default=True, help="Seconds to wait.")
def stop(target: Endpoint | None, endpoint: Endpoint, timeout: float) -> None:
    """Stop a daemon and wait until it has ended; its heaps are gone then."""
    endpoint = one_endpoint(target, endpoint)
    pid = int(ask(endpoint, Status(), timeout)["pid"])
    holder = endpoint.holder()  # the supervisor, if it has one
    with ExitStack() as stack:
        pidfds = [_open(each, stack) for each in {pid, holder[0] if holder is not None else pid}]
        with suppress(DaemonNotFoundError):  # somebody else told it before
            ask(endpoint, Stop(), timeout)
        deadline = monotonic() + timeout
        for pidfd in pidfds:
            if pidfd is not None and not select.select([pidfd], [], [], max(deadline - monotonic(), 0))[0]:
                raise DaemonLostError(
                    f"the daemon at {endpoint} was told to stop, and had not ended after {timeout:g} s"
                )
    click.echo(f"daemon {endpoint.name} (process {pid}) has stopped")


def _open(pid: int, stack: ExitStack) -> int | None:
    """A pidfd for as long as the stack, None if the process is ending by itself."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    stack.callback(os.close, pidfd)
    return pidfd
