"""What the examples share: a command line, a daemon that lives as long as the example, and other processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
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
        with session_with(endpoint, has_own_daemon=endpoint is None) as session:
            body(session, **options)

    return command


@contextmanager
def session_with(endpoint: str | None, *, has_own_daemon: bool) -> Iterator[hc.Session]:
    """A session with a daemon that ends with it, or else with the one at `endpoint` (None: the user's).

    Raises: click.ClickException for every error of heapd.
    """
    daemon = private_daemon("example") if has_own_daemon else nullcontext(endpoint)
    try:
        with terminations_raise(), daemon as where, hc.connect(where, autostart=False) as session:
            yield session
    except (hc.HeapdError, WorkloadError) as error:
        raise click.ClickException(str(error)) from None


@contextmanager
def other_process(work: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """Run `work` in a process of its own, which has ended when the `with` block is left; at once if that fails."""
    process = get_context("spawn").Process(target=work, args=arguments)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is ours, and we end the other one
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield process
        process.join()
    finally:
        process.terminate()
        process.join()
