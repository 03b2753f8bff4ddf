"""Many commands at once, beside a daemon that is started, stopped and killed all the while."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

import heapd_client as hc
from heapd.cli.exit_codes import DAEMON_LOST, FAILED, NO_DAEMON, OK
from tests.harness import Daemon, unique_name, wait_until

_WORKERS = 4

# Runs random commands until its standard input ends, and writes what became of each.
_WORKER = """
import functools, json, random, select, sys
import heapd_client
from click.testing import CliRunner
from heapd.cli import main
endpoint, directory, seed = sys.argv[1:]
heapd_client.connect = functools.partial(heapd_client.connect, timeout=1)
commands = [[*words, "-e", endpoint] for words in (
    ["status"], ["locks"], ["heaps"], ["heaps", "--blocks"], ["map"], ["stop"], ["metrics"],
    ["walk", "work"], ["validate", "work"], ["map", "work"])]
commands.append(["gc", "--runtime-dir", directory, endpoint.rpartition("/")[2]])
generator = random.Random(int(seed))
while not select.select([0], [], [], 0)[0]:
    words = generator.choice(commands)
    met = CliRunner().invoke(main, words)
    print(json.dumps([words[0], met.exit_code, met.stderr]))
"""


@pytest.mark.parametrize("seconds", [2, pytest.param(120, marks=pytest.mark.nightly)])
def test_commands_beside_a_daemon_that_comes_and_goes_end_as_documented(runtime_dir: Path, seconds: int) -> None:
    """The exit status tells which of it they met, and one line says so; no start takes any of them for a daemon."""
    pytest.importorskip("prometheus_client")
    generator = random.Random(seconds)
    name = unique_name()
    endpoint = f"ipc://{runtime_dir}/{name}"
    workers = [worker(endpoint, runtime_dir, seed) for seed in range(_WORKERS)]
    ends = Counter[int]()
    try:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            ends[live_and_end(Daemon(runtime_dir, name), generator)] += 1
    finally:
        answers = [worker.communicate(timeout=60)[0] for worker in workers]
    last = Daemon(runtime_dir, name)
    last.status()
    last.check_clean_end()
    assert set(ends) <= {0, -9, -15}, ends
    met = Counter[tuple[str, int]]()
    assert [worker.returncode for worker in workers] == [0] * _WORKERS
    for line in "".join(answers).splitlines():
        command, code, message = json.loads(line)
        met[command, code] += 1
        check(command, code, message)
    assert len({code for _, code in met}) > 1, met


def worker(endpoint: str, directory: Path, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, endpoint, str(directory), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def live_and_end(daemon: Daemon, generator: random.Random) -> int:
    """A daemon's life with a heap in it, and its end by chance, if no command has stopped it before. Returns: how it
    ended."""
    wait_until(lambda: not daemon.is_running or is_up(daemon))
    with suppress(hc.HeapdError), hc.connect(daemon.endpoint, autostart=False, timeout=2) as session:
        session.create_heap("work", persistent=True).alloc_many(1000, 100)
    with suppress(subprocess.TimeoutExpired):
        daemon.process.wait(generator.uniform(0, 0.4))
    if generator.random() < 0.5:
        daemon.kill()
    return daemon.stop()


def is_up(daemon: Daemon) -> bool:
    with suppress(hc.DaemonError):
        return bool(hc.daemon_status(daemon.endpoint, timeout=1))
    return False


def check(command: str, code: int, message: str) -> None:
    """One end of a command."""
    what = f"{command} ended with {code}: {message}"
    lines = message.splitlines()
    if code == OK:
        assert not lines, what
    else:
        assert [line.startswith("heapd: ") for line in lines] == [True], what
    if code == FAILED:
        assert command in ("walk", "validate", "map"), what
        assert "there is no heap 'work'" in message, what
    elif command == "gc":
        assert code == OK, what
    elif command == "stop":
        assert code in (OK, NO_DAEMON), what
    else:
        assert code in (OK, NO_DAEMON, DAEMON_LOST), what
