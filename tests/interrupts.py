"""Signal handlers that raise, as Ctrl-C's does, at whatever instant the test asks for."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt(BaseException):
    """What the signal handler raises."""


@contextmanager
def interrupts() -> Iterator[Callable[..., bool]]:
    """Gives `attempt(delay_s, call, ...)`: call, and have a signal handler raise after `delay_s`; True if it did."""

    def handler(number: int, frame: Any) -> None:
        raise Interrupt

    def attempt(delay_s: float, call: Callable[..., object], *arguments: object) -> bool:
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, delay_s)
                call(*arguments)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            return True
        return False

    gc.collect()
    gc.disable()  # an interrupt in a finaliser of what other tests left would only be printed
    before, (left, _) = signal.signal(signal.SIGALRM, handler), signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield attempt
    finally:
        gc.enable()
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)  # of the test runner's own timeout
