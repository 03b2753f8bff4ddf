"""What a command's exit status says; the list that `heapd --help` ends with."""

from __future__ import annotations

from typing import Final

from heapd.errors import (
    AccessError,
    BlockTooLargeError,
    DaemonError,
    DaemonNotFoundError,
    DaemonRunningError,
    HeapdError,
    HeapFullError,
)

__all__ = [
    "DAEMON_LOST",
    "DAEMON_RUNNING",
    "EPILOG",
    "FAILED",
    "INTERRUPTED",
    "NO_DAEMON",
    "NO_MEMORY",
    "OK",
    "USAGE",
    "exit_code_of",
]

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_DAEMON: Final = 3
DAEMON_LOST: Final = 4
DAEMON_RUNNING: Final = 5
NO_MEMORY: Final = 6
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

# Each paragraph's \b keeps click from wrapping it.
EPILOG: Final = """\b
Exit status:
  0    it worked
  1    it failed, or found something: violations, differences, errors
  2    the command line is wrong
  3    no daemon answers at the endpoint
  4    the daemon was lost on the way, was stopped, or refused
  5    a daemon of that name runs already
  6    not enough shared memory, or a limit on it was reached
  130  interrupted by Ctrl-C

\b
Endpoint: -e NAME, -e ipc://DIRECTORY/NAME, or $HEAPD_ENDPOINT; without one, the daemon "default" in
$HEAPD_RUNTIME_DIR, else $XDG_RUNTIME_DIR/heapd, else /tmp/heapd-UID.
"""


def exit_code_of(error: HeapdError) -> int:
    """The exit status of a command that ended with `error`."""
    kinds: tuple[tuple[type[HeapdError] | tuple[type[HeapdError], ...], int], ...] = (
        (DaemonNotFoundError, NO_DAEMON),
        ((DaemonError, AccessError), DAEMON_LOST),
        (DaemonRunningError, DAEMON_RUNNING),
        ((HeapFullError, BlockTooLargeError), NO_MEMORY),
    )
    return next((code for kind, code in kinds if isinstance(error, kind)), FAILED)
