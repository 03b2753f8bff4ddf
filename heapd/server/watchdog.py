"""Tells a server that hangs from one that is busy: the supervisor looks now and then whether its pulse still moves.

While it serves, its pulse is the turns of its loop. While it starts and while it stops it has none: there it may have
a million blocks to read, or many GiB to give back, and works all that time; so its pulse is the CPU time it has spent.

Time in which the supervisor does not run either must not count against the server: a process tree that was stopped, a
container that was frozen, a machine that slept. So looks are counted, not seconds, and a look that comes late is one
look, however late. And a server that a debugger holds is the debugger's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

__all__ = ["Effort", "Heart", "Watchdog"]

_CPU_TIMES: Final = slice(11, 13)  # of /proc/PID/stat after the command: as a user and in the kernel
_LOOKS: Final = 8  # in a row that find no beat; arbitrary: a late one costs no more than an eighth of the silence


class Heart(Protocol):
    """What a watchdog listens to: a number that moves."""

    @property
    def beats(self) -> int: ...


class Effort:
    """The CPU time that a process has spent, in clock ticks, as a pulse; it stands still once it has ended."""

    def __init__(self, pid: int) -> None:
        self._stat = Path(f"/proc/{pid}/stat")

    @property
    def beats(self) -> int:
        with suppress(OSError):
            after_command = self._stat.read_bytes().rpartition(b")")[2].split()
            return sum(map(int, after_command[_CPU_TIMES]))
        return 0


class Watchdog:
    """Watches one server process.

    Args: silence_s (how long the pulse may stand still, several times `Config.tick_s`; 0: for ever).
    """

    def __init__(self, pid: int, pulse: Heart, silence_s: float, clock: Callable[[], float] = time.monotonic) -> None:
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
