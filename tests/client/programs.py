"""What the tests run in other processes: functions for multiprocessing, and how to run a program of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import heapd_client as hc


def run(program: str, *arguments: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process of its own; warnings are errors there too."""
    paths = [path for path in sys.path if path]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )


def in_child(work: Callable[[], None], timeout_s: float = 30.0) -> int:
    """Run `work` in a forked child, which ends without any cleanup; its exit status, 0 if nothing was raised."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            sys.stderr.flush()
            os._exit(status)
    return wait_for(pid, timeout_s)


def wait_for(pid: int, timeout_s: float = 30.0) -> int:
    """The exit status of a child, minus the signal if one killed it; AssertionError if it hangs."""
    import select

    process = os.pidfd_open(pid)
    try:
        if not select.select([process], [], [], timeout_s)[0]:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise AssertionError(f"the child did not end within {timeout_s:g} s")
    finally:
        os.close(process)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def add_up(block: hc.Block) -> int:
    """The sum of the block's bytes, and one more in its first."""
    total = sum(block.view)
    block.view[0] = (block.view[0] + 1) % 256
    return total


def allocate_in(heap: hc.Heap, text: bytes) -> Any:
    """A block with `text`, allocated by the worker; its handle."""
    block = heap.alloc(len(text))
    block.view[:] = text
    return block.handle


def who(_: object) -> tuple[int, int]:
    """(process id, sessions opened here)."""
    from heapd_client import registry

    return os.getpid(), len(registry._open)
