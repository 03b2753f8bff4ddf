"""Processes of other users, for tests that ask what those can reach."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest

NOBODY = 65534
GROUP = 54321  # any number will do: the kernel knows no names

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

_PRELUDE = """
import os, socket, sys
import zmq
import heapd_client as hc
from heapd_client.control import ask
from heapd.layout import LAYOUT_VERSION
from heapd.wire import Endpoint, decode_reply, encode_request
from heapd.wire.messages import Hello, Status, Stop
os.setgroups({groups}); os.setgid({gid}); os.setuid({uid})

def attempt(action):
    try:
        print("did", action())
    except Exception as error:
        print(type(error).__name__, error)
"""


def run_as(uid: int, body: str, *arguments: str, gid: int | None = None, groups: Sequence[int] = ()) -> list[str]:
    """Run a program as another user. Returns: the lines it printed.

    It has `hc`, `Endpoint`, the control requests, and `attempt(action)`, which prints "did RESULT" or the error's name
    and text. Its modules are loaded before it gives up being root: another user may not be able to read them.
    """
    prelude = _PRELUDE.format(uid=uid, gid=uid if gid is None else gid, groups=list(groups))
    ended = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(body), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout.splitlines()
