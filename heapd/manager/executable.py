"""Whether this machine lets shared memory be executed."""

from __future__ import annotations

import os

from heapd.errors import ExecuteError

__all__ = ["check_executable"]


def check_executable(directory: str = "/dev/shm") -> None:
    """Raises: ExecuteError if `directory` is mounted noexec, and so no heap in it can be executable."""
    if os.statvfs(directory).f_flag & os.ST_NOEXEC:
        raise ExecuteError(
            f"{directory} is mounted noexec: a block there cannot be executed; `mount -o remount,exec {directory}`"
        )
