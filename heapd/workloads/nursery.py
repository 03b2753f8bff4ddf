"""Start hundreds of client processes cheaply: one process imports everything, and each client is a fork of it.

The nursery has no thread and has made no ZeroMQ context when it forks, so its children inherit nothing that must not
be inherited. It reports each child's end, starts it again if it is told to, and takes all of them with it when its
parent has gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

__all__ = ["Run", "log_of", "run_nursery"]

_POLL_S = 0.05

Run = Callable[[int], int]  # all that client `number` does; returns its exit code


def log_of(folder: Path, number: int) -> Path:
    """Where client `number` writes what it has to say."""
    return folder / f"client-{number}.log"


def run_nursery(connection: Connection, run: Run, clients: int, folder: Path) -> None:
    """Fork all clients; send (number, wait status) of each that ends; fork those again whose number is received.

    Returns when it receives None, or its parent is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    children: dict[int, int] = {}  # pid to number

    def start(number: int) -> None:
        children[_fork(partial(run, number), log_of(folder, number))] = number

    try:
        for number in range(clients):
            start(number)
        while True:
            if connection.poll(_POLL_S):
                wanted = connection.recv()
                if wanted is None:
                    return
                start(wanted)
            for pid, status in _ended():
                connection.send((children.pop(pid), status))
    except (OSError, EOFError):
        return  # the parent is gone
    finally:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _fork(run: Callable[[], int], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 2)
        code = run()
    finally:
        os._exit(code)


def _ended() -> list[tuple[int, int]]:
    """(pid, wait status) of the children that have ended and have not been waited for."""
    ended = []
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append((pid, status))
    return ended
