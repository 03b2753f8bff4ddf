"""Loaded by a daemon that is to die at a named step: before or after a method of the daemon's, when it is told so.

$HEAPD_TEST_POINT is a file. Does it hold "NAME COUNT", the server process dies at the COUNTth pass of that step from
then on, and takes the file with it. Names are in POINTS. The ledger is compacted often, so that this is seen.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from heapd.arena import Arena
from heapd.heap import Heap
from heapd.heap.slabpool import SlabPool
from heapd.manager import HeapManager
from heapd.manager.ledger import Ledger, Records, recovery
from heapd.manager.ledger import ledger as ledger_module
from heapd.manager.ledger.volume import Log, Volume
from heapd.manager.sessions import Sessions
from heapd.manager.shared import Controls
from heapd.server import loop
from heapd.server.loop import Loop
from heapd.service import RunningJob, Service

STEPS: dict[str, tuple[Any, str]] = {
    "alloc": (Heap, "_alloc_small"),
    "run": (Heap, "_finish_run"),
    "resize": (Heap, "resize"),
    "free": (Heap, "take_back"),
    "lease": (Heap, "lease"),
    "give-back": (Heap, "give_back"),
    "new-slab": (SlabPool, "_make"),
    "drop-slab": (SlabPool, "_drop"),
    "commit": (Arena, "commit"),
    "decommit": (Arena, "_remove"),
    "reserve": (Arena, "reserve"),
    "release": (Arena, "release"),
    "create": (HeapManager, "_make"),
    "activate": (Controls, "activate"),
    "destroy": (Heap, "close"),
    "open-session": (Sessions, "open"),
    "end-session": (Sessions, "end"),
    "job-slice": (RunningJob, "step"),
    "append": (Log, "append"),
    "ledger-commit": (Ledger, "commit"),
    "carry-out": (Ledger, "hasten"),
    "compaction": (Ledger, "_append_next"),
    "switch": (Volume, "switch"),
    "wipe": (Log, "_remove"),
    "answer": (loop, "_send"),
    "start-read": (Records, "add"),
    "start-arena": (recovery, "take_over"),
    "start-trim": (Log, "trim"),
    "start-directory": (HeapManager, "recover"),
    "start-sessions": (Loop, "readmit"),
    "start-resume": (Service, "resume"),
}
# Passed a few times in a while; the others hundreds of times a second.
RARE = {"create", "activate", "destroy", "reserve", "release", "open-session", "end-session", "switch", "wipe"}
POINTS = [f"{when}-{name}" for name in STEPS for when in ("before", "after")]
AT_START = [point for point in POINTS if "-start-" in point]


def is_rare(point: str) -> bool:
    return point in AT_START or point.split("-", 1)[1] in RARE


_supervisor = os.getpid()
_passed: dict[str, int] = {}


def _pass(point: str) -> None:
    path = os.environ["HEAPD_TEST_POINT"]
    try:
        with open(path) as file:
            name, count = file.read().split()
    except (FileNotFoundError, ValueError):
        return
    if name != point or os.getpid() == _supervisor:
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] >= int(count):
        os.unlink(path)
        os.kill(os.getpid(), signal.SIGKILL)


def _instrument(name: str, owner: Any, attribute: str) -> None:
    real = getattr(owner, attribute)

    def method(*arguments: Any, **options: Any) -> Any:
        _pass(f"before-{name}")
        result = real(*arguments, **options)
        _pass(f"after-{name}")
        return result

    setattr(owner, attribute, method)


if "HEAPD_TEST_POINT" in os.environ:
    for _name, (_owner, _attribute) in STEPS.items():
        _instrument(_name, _owner, _attribute)
    ledger_module._SMALL = 100_000
