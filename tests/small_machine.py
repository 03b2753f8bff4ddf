"""A machine with little shared memory: scripts run in namespaces of their own, with a small tmpfs over /dev/shm."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

_UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


@cache
def why_not() -> str:
    """Why such namespaces cannot be made here, "" if they can."""
    try:
        done = subprocess.run(
            [*_UNSHARE, "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/dev/shm"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no unshare here: {error}"
    return "" if done.returncode == 0 else f"this system allows no mount in a user namespace: {done.stderr.strip()}"


def run_with_small_shm(script: str, *, mebibytes: int = 8) -> None:
    """Run a script with a /dev/shm of its own, of that size; it must end well and print "ok"."""
    if why_not():
        pytest.skip(why_not())
    inside = f'mount -t tmpfs -o size={mebibytes}m tmpfs /dev/shm && exec "$0" -X faulthandler -c "$1"'
    done = subprocess.run(
        [*_UNSHARE, "sh", "-c", inside, sys.executable, script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stderr
