"""`heapd serve`: a daemon in the foreground."""

from __future__ import annotations

import faulthandler
import grp
import os
import select

import click

from heapd.cli.logs import log_options, set_up_logging
from heapd.cli.params import ENDPOINT, SIZE, Seconds, SizeType
from heapd.errors import InvalidArgumentError
from heapd.layout import MIN_RESERVE
from heapd.wire import DEFAULT_NAME, Endpoint, runtime_directory

__all__ = ["serve"]


@click.command()
@click.option("--name", help=f"The daemon's name.  [default: {DEFAULT_NAME}]")
@click.option("--runtime-dir", type=click.Path(file_okay=False), help="Directory of its sockets; made 0700.")
@click.option("--endpoint", "-e", type=ENDPOINT, help="Both in one: NAME or ipc://DIRECTORY/NAME.")
@click.option("--group", callback=lambda ctx, param, value: _gid(value),
              help="Serve this group's members too (name or number).  [default: its user alone]")  # fmt: skip
@click.option(
    "--reserve",
    type=SizeType(MIN_RESERVE),
    help="Address space of the arena; sparse.  [default: 64GiB, or what a killed daemon had]",
)
@click.option(
    "--commit-limit", type=SIZE, help="Memory it may commit.  [default: what the machine leaves, less a margin]"
)
@click.option(
    "--session-quota", type=SIZE, help="Memory one session may have, allocated or cached.  [default: no limit]"
)
@click.option("--idle-exit", type=Seconds(min=0), metavar="SECONDS",
              help="End by itself that long after the last session, unless a persistent heap lives.")  # fmt: skip
@click.option("--restarts", type=click.IntRange(min=0), default=100, show_default=True,
              help="How often in a minute a server process that dies is started again; 0: no supervisor.")  # fmt: skip
@click.option("--watchdog", type=Seconds(min=0), metavar="SECONDS", default=30, show_default=True,
              callback=lambda ctx, param, value: _silence(value),
              help="When its loop has not turned for so long, a server is killed and replaced; 0: never.")  # fmt: skip
@click.option("--metrics", type=click.IntRange(0, 65535), metavar="PORT",
              help="Prometheus metrics at http://127.0.0.1:PORT/metrics; 0: any free port, see the log.")  # fmt: skip
@click.option("--ledger/--no-ledger", default=True, hidden=True)  # for scripts/bench ledger
@log_options
@click.option("--until-eof", type=click.IntRange(min=0), metavar="FD",
              help="End when this descriptor of a pipe reads end of file: with whoever has its other end.")  # fmt: skip
@click.option(
    "--ready-fd", type=click.IntRange(min=0), metavar="FD", help="Write a line here once clients are answered."
)
def serve(
    name: str | None,
    runtime_dir: str | None,
    endpoint: Endpoint | None,
    group: int | None,
    reserve: int | None,
    commit_limit: int | None,
    session_quota: int | None,
    idle_exit: float | None,
    restarts: int,
    watchdog: float,
    metrics: int | None,
    ledger: bool,
    log_level: str,
    log_format: str,
    until_eof: int | None,
    ready_fd: int | None,
) -> None:
    """Run a daemon in the foreground until SIGTERM, Ctrl-C or `heapd stop`.

    A small supervisor process starts the server, and starts it again when it dies. It logs to stderr, and refuses to
    start where one of its name serves already.
    """
    from heapd.server import Config, supervise

    if endpoint is not None and (name or runtime_dir):
        raise click.UsageError("--endpoint says it all: leave --name and --runtime-dir away")
    if ready_fd is not None:
        _check_open(ready_fd)
    if until_eof is not None:
        _check_pipe(until_eof)
    set_up_logging(log_level, log_format)
    faulthandler.enable()  # a SIGBUS cannot be handled, only explained
    supervise(
        Config(
            endpoint=endpoint or _endpoint(name, runtime_dir),
            reserve=reserve,
            gid=group,
            commit_limit=commit_limit,
            session_quota=session_quota or 0,
            idle_exit_s=idle_exit,
            restarts=restarts,
            watchdog_s=watchdog,
            metrics_port=metrics,
            until_eof_fd=until_eof,
            has_ledger=ledger,
            ready_fd=ready_fd,
        )
    )


def _endpoint(name: str | None, runtime_dir: str | None) -> Endpoint:
    """The endpoint that the two options stand for; $HEAPD_ENDPOINT where neither is given."""
    try:
        if name is None and runtime_dir is None:
            return Endpoint.parse()
        return Endpoint(runtime_dir or runtime_directory(), name or DEFAULT_NAME)
    except InvalidArgumentError as error:
        raise click.UsageError(str(error)) from None


def _gid(group: str | None) -> int | None:
    """The group's number. Raises: click.BadParameter if there is none of that name."""
    if group is None:
        return None
    if group.isdecimal() and int(group) < 2**32 - 1:  # the last one means "leave it as it is"
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {group!r}") from None


def _silence(seconds: float) -> float:
    """The watchdog's. Raises: click.BadParameter if a server that only waits for work would look silent."""
    if 0 < seconds < 1:
        raise click.BadParameter(f"{seconds:g} is too short: a busy machine may pause for that long; 1 or more, or 0")
    return seconds


def _check_pipe(descriptor: int) -> None:
    with select.epoll() as poll:
        try:
            poll.register(descriptor)
        except OSError:
            raise click.BadParameter(f"descriptor {descriptor} is no open pipe", param_hint="--until-eof") from None


def _check_open(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        raise click.BadParameter(f"descriptor {descriptor} is not open", param_hint="--ready-fd") from None
