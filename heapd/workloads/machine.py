"""What a measurement ran on: for the head of a benchmark's output and for its JSON."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import zmq

__all__ = ["conditions"]


def conditions(command: str) -> dict[str, str]:
    """Machine, system, versions, date, command and load, each as a line of text."""
    return {
        "machine": f"{_cpu()}, {os.cpu_count()} CPUs, {_memory()}",
        "system": f"{platform.system()} {platform.release()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "versions": f"Python {platform.python_version()}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}, "
        f"msgpack {_version('msgpack')}",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": " ".join([command, *sys.argv[1:]]),
        "load": f"{os.getloadavg()[0]:.2f} before the run",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().split("\n"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
