"""The command line: one module a command, loaded when the command is called.

A command is a click command object; what it returns, if it is an int, is the exit status. A HeapdError that comes out
of it becomes one line on stderr and the status of exit_codes.py: a user's mistake never ends in a traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

import click

from heapd import __version__
from heapd.cli.exit_codes import EPILOG, FAILED, INTERRUPTED, OK, exit_code_of
from heapd.errors import HeapdError

__all__ = ["main"]

# name: (module:attribute, the line that `heapd --help` shows: it loads no command)
COMMANDS: Final = {
    "serve": ("heapd.cli.serve:serve", "Run a daemon in the foreground."),
    "stop": ("heapd.cli.stop:stop", "Stop a daemon."),
    "status": ("heapd.cli.status:status", "What a daemon is doing."),
    "metrics": ("heapd.cli.metrics:metrics", "A daemon's figures as Prometheus text."),
    "heaps": ("heapd.cli.heaps:heaps", "List heaps, their sizes and who uses them."),
    "walk": ("heapd.cli.walk:walk", "List the regions and blocks of a heap."),
    "map": ("heapd.cli.map:map_", "Draw the arena, or a heap."),
    "validate": ("heapd.cli.validate:validate", "Check every invariant of a heap."),
    "locks": ("heapd.cli.locks:locks", "Who holds which heap's lock, and what waiting costs."),
    "gc": ("heapd.cli.gc:gc", "Remove what killed daemons left behind."),
    "doctor": ("heapd.cli.doctor:doctor", "Is this machine fit for a daemon? What to do where it is not."),
    "demo": ("heapd.cli.demo:demo", "Index a folder with several processes over one shared heap."),
    "stress": ("heapd.cli.stress:stress", "Many clients, random operations, everything checked."),
    "chaos": ("heapd.cli.chaos:chaos", "The stress while clients and the server are killed."),
    "bench": ("heapd.cli.bench:bench", "Measure: what serialization costs, and more."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def main(self, *args: Any, **extra: Any) -> Any:
        """As click's, with heapd's own errors and exit statuses."""
        run = partial(super().main, *args, **extra | {"standalone_mode": False})
        if not extra.get("standalone_mode", True):
            return run()
        sys.exit(_status_of(run))


def _status_of(run: Callable[[], Any]) -> int:
    """The exit status of a command line, after telling the user what went wrong."""
    try:
        status = run()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except HeapdError as error:
        click.echo(f"heapd: {error}", err=True)
        return exit_code_of(error)
    except OSError as error:
        with suppress(OSError):
            click.echo(f"heapd: {error.strerror or error}", err=True)
        return FAILED
    return status if type(status) is int else OK


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="heapd")
def main() -> None:
    """A heap server: Win32-like heaps in shared memory, for many Python processes at once."""
