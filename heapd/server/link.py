"""What a server process tells the supervisor that started it: words, over a pipe, and that its loop turns.

Each message is small enough that the kernel writes it whole or not at all: a server killed while it speaks leaves no
half of one behind. The pulse is no message: a pipe fills while a supervisor is stopped, and then stops the server.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Final

from heapd.errors import HeapdError
from heapd.server.lock import DaemonLock

__all__ = ["READY", "STOPPING", "Pulse", "SupervisorLink"]

READY: Final = "ready"  # clients are answered
STOPPING: Final = "stopping"  # on purpose: do not start another


class Pulse:
    """A counter in memory that a process and its forks share: one counts, the other sees whether it moves."""

    def __init__(self) -> None:
        self._word = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def beat(self) -> None:
        self._word[0] += 1

    @property
    def beats(self) -> int:
        return self._word[0]


class SupervisorLink:
    """The server's end. Fields: lock (the endpoint's, which both hold)."""

    def __init__(self, pipe: Connection, lock: DaemonLock, pulse: Pulse) -> None:
        self._pipe = pipe
        self._pulse = pulse
        self.lock = lock

    def fileno(self) -> int:
        """The pipe: a poll reports an error on it once the supervisor has died."""
        return self._pipe.fileno()

    def say(self, word: str | HeapdError) -> None:
        """READY, STOPPING, or the error that the server ends with. A supervisor that has died hears nothing."""
        with suppress(OSError):
            self._pipe.send(word)

    def beat(self) -> None:
        """The loop has come round once more. Costs a store, and waits for nobody."""
        self._pulse.beat()
