"""Views of blocks in garbage: whatever the collector breaks a cycle at, Python does not crash, and nothing is kept."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import heapd_client as hc
from heapd_client import exporter
from tests.harness import Daemon

# Cycles of objects that refer to what belongs to a block, made in all orders that a seed yields.
_CYCLES = """
    import gc, random, sys
    import heapd_client as hc

    class Node:
        pass

    with hc.connect(sys.argv[1], autostart=False) as session:
        heap = session.create_heap()
        for seed in range(3000):
            order = random.Random(seed)
            block = heap.alloc(64)
            view = block.view
            parts = [block, view, view[8:16], view.cast("B")]
            nodes = [Node() for _ in range(order.choice((1, 2, 3)))]
            for number, node in enumerate(nodes):
                node.next = nodes[number - 1]
                for name in "abcd":
                    if order.random() < 0.6:
                        setattr(node, name, order.choice(parts))
            if order.random() < 0.3:
                nodes = None  # first: what is younger is broken first
            block = view = parts = nodes = node = None
            if seed % 500 == 0:
                gc.collect()
        gc.collect()
        print(len(gc.garbage))
"""


def test_views_in_cycles_are_collected(shared_daemon: Daemon) -> None:
    """In a process of its own: it is the interpreter that would crash."""
    command = [sys.executable, "-c", textwrap.dedent(_CYCLES), shared_daemon.endpoint]
    told = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (told.returncode, told.stdout, told.stderr) == (0, "0\n", "")


def test_an_exporter_goes_with_its_block(heap: hc.Heap) -> None:
    """At the latest when the collector has looked at everything, so that the mapping can go, too."""
    kept = heap.alloc(64)
    view = kept.view
    for _ in range(100):
        block = heap.alloc(64)
        assert block.view.nbytes == 64
    block = None
    gc.collect()
    assert len([pin for pin in exporter._pins.values() if pin.nbytes == 64]) <= 1
    assert view.nbytes == 64


def test_many_dropped_blocks_leave_few_exporters(heap: hc.Heap) -> None:
    """Also where the collector is off."""
    gc.collect()
    gc.disable()
    try:
        before = len(exporter._pins)
        for _ in range(5000):
            heap.alloc(64).view[0] = 1
        assert len(exporter._pins) <= 2 * before + 2000
    finally:
        gc.enable()
