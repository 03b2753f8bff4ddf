"""What a server process tells the supervisor that started it, over a pipe, in a word each.

Each message is small enough that the kernel writes it whole or not at all: a server killed while it speaks leaves no
half of one behind.
"""

from __future__ import annotations

from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

from heapd.errors import HeapdError
from heapd.server.lock import DaemonLock

__all__ = ["READY", "STOPPING", "SupervisorLink"]

READY: Final = "ready"  # clients are answered
STOPPING: Final = "stopping"  # on purpose: do not start another


class SupervisorLink:
    """The server's end. Fields: lock (the endpoint's, which both hold)."""

    def __init__(self, pipe: Connection, lock: DaemonLock) -> None:
        self._pipe = pipe
        self.lock = lock

    def fileno(self) -> int:
        """The pipe: a poll reports an error on it once the supervisor has died."""
        return self._pipe.fileno()

    def say(self, word: str | HeapdError) -> None:
        """READY, STOPPING, or the error that the server ends with. A supervisor that has died hears nothing."""
        with suppress(OSError):
            self._pipe.send(word)
