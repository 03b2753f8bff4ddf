"""Every fact of Win32 heap behaviour that docs/win32.md says is held, over a real daemon, alone and three at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness import Daemon
from tests.win32.facts import Fact, all_facts


@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("fact", all_facts(), ids=lambda fact: f"{fact.name}-{'-'.join(fact.ids)}")
def test_fact(fact: Fact) -> None:
    """The check passes in a process that is attached to the daemon."""
    fact.check()


def test_all_facts_in_three_processes_at_once(shared_daemon: Daemon) -> None:
    """Heaps of others, made, filled and destroyed meanwhile, change nothing of it."""
    command = [sys.executable, "-m", "tests.win32.everything", shared_daemon.endpoint]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    crew = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in crew]
    finally:
        for process in crew:
            process.kill()
            process.wait()
    assert [process.returncode for process in crew] == [0, 0, 0], "\n".join(outputs)
