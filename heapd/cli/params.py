"""Option types and options that several commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from heapd.errors import InvalidArgumentError
from heapd.units import format_size, parse_size
from heapd.wire import Endpoint

__all__ = [
    "ENDPOINT",
    "OUTPUT_FILE",
    "SIZE",
    "EndpointType",
    "OutputFile",
    "Seconds",
    "SizeType",
    "endpoint_option",
    "json_option",
    "one_endpoint",
]

Command = TypeVar("Command", bound=Callable[..., Any])


if TYPE_CHECKING:
    _IntType = click.ParamType[int]
    _EndpointType = click.ParamType[Endpoint]
else:  # generic in newer versions of click only
    _IntType = _EndpointType = click.ParamType


class SizeType(_IntType):
    """Bytes, written 4096, 64KiB, 1.5GiB; the value is an int."""

    name = "size"

    def __init__(self, minimum: int = 0) -> None:
        self._minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < self._minimum:
            self.fail(f"{format_size(size)} is less than {format_size(self._minimum)}", param, ctx)
        if size >= 2**63:
            self.fail("that is more than any machine has", param, ctx)
        return size


class EndpointType(_EndpointType):
    """A daemon's name or ipc://DIRECTORY/NAME; the value is an Endpoint."""

    name = "endpoint"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Endpoint:
        if isinstance(value, Endpoint):
            return value
        try:
            return Endpoint.parse(value)
        except InvalidArgumentError as error:
            self.fail(str(error), param, ctx)


class Seconds(click.FloatRange):
    """Seconds within a range; not a number, and infinity, are in none."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds) or seconds > 1e9:
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


class OutputFile(click.Path):
    """A file to be written after long work; that its folder takes one is found out before. The value is a Path."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            what = "may not be written to" if path.parent.is_dir() else "does not exist"
            self.fail(f"the folder {str(path.parent)!r} {what}", param, ctx)
        return path


SIZE = SizeType()
ENDPOINT = EndpointType()
OUTPUT_FILE = OutputFile()


def endpoint_option(command: Command) -> Command:
    """Give a command `--endpoint/-e`; it is called with `endpoint`, an Endpoint."""
    option = click.option(
        "--endpoint",
        "-e",
        type=ENDPOINT,
        envvar="HEAPD_ENDPOINT",
        default=Endpoint.parse,
        show_default="$HEAPD_ENDPOINT, else the daemon named default",
        help="Which daemon: its name, or ipc://DIRECTORY/NAME.",
    )
    return option(command)


def one_endpoint(argument: Endpoint | None, option: Endpoint) -> Endpoint:
    """The daemon that a command is about which takes it as an argument, too; the argument goes before $HEAPD_ENDPOINT.

    Raises: click.UsageError if the command line names two.
    """
    source = click.get_current_context().get_parameter_source("endpoint")
    if argument is not None and source is click.core.ParameterSource.COMMANDLINE and argument != option:
        raise click.UsageError(f"two daemons are named, {argument} and {option}; leave one away")
    return argument or option


def json_option(command: Command) -> Command:
    """Give a command `--json`; it is called with `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
