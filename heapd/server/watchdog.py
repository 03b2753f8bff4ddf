"""Tells a server that hangs from one that is busy: the supervisor looks now and then whether its pulse still moves.

Time in which the supervisor does not run either must not count against the server: a process tree that was stopped, a
container that was frozen, a machine that slept. So looks are counted, not seconds, and a look that comes late is one
look, however late. And a server that a debugger holds is the debugger's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from heapd.server.link import Pulse

__all__ = ["Watchdog"]

_LOOKS: Final = 8  # in a row that find no beat; arbitrary: a late one costs no more than an eighth of the silence


class Watchdog:
    """Watches one server process, from when it answers clients.

    Args: silence_s (how long the pulse may stand still, several times `Config.tick_s`; 0: for ever).
    """

    def __init__(self, pid: int, pulse: Pulse, silence_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pid = pid
        self._pulse = pulse
        self._pause_s = silence_s / _LOOKS
        self._clock = clock
        self._beats = pulse.beats
        self._idle_looks = 0
        self._next_look = clock() + self._pause_s

    @property
    def pause_s(self) -> float | None:
        """Seconds until `is_alarmed` is to be asked, None: never."""
        return max(0.0, self._next_look - self._clock()) if self._pause_s else None

    def is_alarmed(self) -> bool:
        """Look, if it is time to. Returns: whether the silence has lasted too long; asked once a look, no more."""
        now = self._clock()
        if not self._pause_s or now < self._next_look:
            return False
        self._next_look = now + self._pause_s
        beats = self._pulse.beats
        if beats != self._beats or self._is_debugged():
            self._beats, self._idle_looks = beats, 0
        else:
            self._idle_looks += 1
        return self._idle_looks >= _LOOKS

    def describe(self) -> str:
        """What the kernel says the process is doing, for the log: "T (stopped)", "R (running)", "D (disk sleep)"."""
        return self._read_status("State") or "unknown"

    def _is_debugged(self) -> bool:
        return self._read_status("TracerPid") not in ("", "0")

    def _read_status(self, field: str) -> str:
        """A field of /proc/PID/status, "" if it cannot be read."""
        with suppress(OSError):
            for line in Path(f"/proc/{self._pid}/status").read_text(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name == field:
                    return value.strip()
        return ""
