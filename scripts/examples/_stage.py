"""What the examples share: a command line, and a daemon that lives as long as the example."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import click

import heapd_client as hc
from heapd.workloads import WorkloadError
from heapd.workloads.private import private_daemon, terminations_raise


def example(body: Callable[..., None]) -> click.Command:
    """Make a command of `body(session, **options)`; its docstring is the help."""

    @click.command(help=body.__doc__, context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--endpoint", "-e", help="Use that daemon; otherwise one runs for as long as the example does.")
    @wraps(body)
    def command(endpoint: str | None, **options: Any) -> None:
        daemon = private_daemon("example") if endpoint is None else nullcontext(endpoint)
        try:
            with terminations_raise(), daemon as where, hc.connect(where, autostart=False) as session:
                body(session, **options)
        except (hc.HeapdError, WorkloadError) as error:
            raise click.ClickException(str(error)) from None

    return command
