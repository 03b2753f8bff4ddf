"""Machine code in a block: in an executable heap it runs, in any other one the processor refuses to fetch it.

The same bytes are written into a block of either kind of heap and called there, each time by a child process. One ends
well, the other one with SIGSEGV; its parent and the heaps are none the worse for it.
"""

from __future__ import annotations

import ctypes
import platform
from signal import Signals

import click
from _stage import example, other_process

import heapd_client as hc

TWICE = bytes.fromhex("8d043fc3")  # x86-64: lea eax, [rdi + rdi]; ret


def call(block: hc.Block) -> None:
    """What each child does: call the block as a C function from int to int."""
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(block.heap.mapping.pointer + block.address)
    print(f"  process calls the code at {block.address:#x}: twice 21 is {function(21)}", flush=True)


@example
def main(session: hc.Session) -> None:
    """Call the same machine code in an executable heap, and in one that is not."""
    if platform.machine() != "x86_64":
        raise click.ClickException("the machine code of this example is x86-64's")
    for is_executable in (True, False):
        print(f"a heap made with executable={is_executable}:", flush=True)
        block = session.create_heap(executable=is_executable).alloc(len(TWICE))
        block.view[:] = TWICE
        with other_process(call, block) as child:
            pass  # until it has ended
        status = child.exitcode or 0
        print(f"  the process ended with {status if status >= 0 else Signals(-status).name}", flush=True)
        print(f"  broken invariants of the heap: {len(block.heap.validate())}", flush=True)


if __name__ == "__main__":
    main()
