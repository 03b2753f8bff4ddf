"""Processes that wait for orders: the same members do one measurement after another, a different number of them each.

A member says when it is ready to begin, and hears the moment, the same for all. What is measured is what all of them
did between that moment and a fixed time later: where there are more of them than CPUs each begins when it is let, and
rates over times of their own would add up to more than there ever was at once.

Members know their index, and may `pin` themselves: left alone, two may share one CPU for longer than a measurement.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

from heapd.errors import HeapdError
from heapd.workloads import WorkloadError
from heapd.workloads.team import interrupts_held

__all__ = ["Crew", "Duty", "Start", "pin", "sleep_until"]

Start = Callable[[], int]  # says that the member is ready; the moment to begin (ns, the monotonic clock)
Duty = Callable[[Any, Start], Any]  # order, what to call once before work is measured -> result

_CPUS: Final = os.sched_getaffinity(0)
_START_DEADLINE_S = 60.0
_HEAD_START_NS = 20_000_000  # arbitrary: what the moment to begin takes to reach all members
_GRACE_S = 30.0  # for a member that the machine lets wait
_END_DEADLINE_S = 5.0


def sleep_until(moment_ns: int) -> None:
    """Return at a moment of the monotonic clock, or at once if it is past."""
    time.sleep(max(moment_ns - time.monotonic_ns(), 0) / 1e9)


def pin(index: int | None) -> None:
    """Have the calling process run on one of the CPUs it may use, the next one for the next index; None: on any."""
    cpus = sorted(_CPUS)
    os.sched_setaffinity(0, cpus if index is None else {cpus[index % len(cpus)]})


def _member(line: Connection, prepare: Callable[..., Duty], arguments: tuple[Any, ...]) -> None:

    def start() -> int:
        line.send((True, None))
        begin: int | None = line.recv()
        if begin is None:
            raise EOFError("another member failed")
        return begin

    try:
        duty = prepare(*arguments)
        line.send((True, None))
        while (order := line.recv()) is not None:
            line.send((True, duty(order, start)))
    except EOFError:
        return  # the parent has gone, or has given up
    except Exception as error:
        if not isinstance(error, HeapdError | WorkloadError | OSError):
            traceback.print_exc()
        with suppress(OSError):
            line.send((False, f"{type(error).__name__}: {error}"))


class Crew:
    """`count` processes, each with `prepare(index, *arguments)` done. A context manager: on exit all have ended.

    Args:   count, prepare (a module's function; it returns what does an order), arguments.
    Raises: WorkloadError, also in `run`, if a member fails, dies or does not answer.
    """

    def __init__(self, count: int, prepare: Callable[..., Duty], *arguments: object) -> None:
        self._context = get_context("spawn")
        self._members: list[tuple[Connection, BaseProcess]] = []
        try:
            for index in range(count):
                self._start(prepare, (index, *arguments))
            for index in range(count):
                self._answer(index, _START_DEADLINE_S)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self, prepare: Callable[..., Duty], arguments: tuple[object, ...]) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_member, args=(theirs, prepare, arguments), daemon=True)
        with interrupts_held():
            process.start()
        theirs.close()
        self._members.append((ours, process))

    def run(self, order: object, count: int, seconds: float) -> list[Any]:
        """Have the first `count` members do an order that takes about `seconds`; their results."""
        self._tell(count, order)
        for index in range(count):
            self._answer(index, _GRACE_S)
        self._tell(count, time.monotonic_ns() + _HEAD_START_NS)
        return [self._answer(index, seconds + _GRACE_S) for index in range(count)]

    def _tell(self, count: int, what: object) -> None:
        for line, _ in self._members[:count]:
            line.send(what)

    def _answer(self, index: int, timeout_s: float) -> Any:
        line, process = self._members[index]
        if not line.poll(timeout_s):
            raise WorkloadError(f"member {index} (process {process.pid}) did not answer within {timeout_s:g} s")
        try:
            is_well, value = line.recv()
        except (EOFError, ConnectionResetError):
            raise WorkloadError(f"member {index} (process {process.pid}) died") from None
        if not is_well:
            raise WorkloadError(f"member {index}: {value}")
        return value

    def _end(self) -> None:
        for line, _ in self._members:
            with suppress(OSError):
                line.send(None)
        deadline = time.monotonic() + _END_DEADLINE_S
        for line, process in self._members:
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
            line.close()
            process.close()
        self._members.clear()
