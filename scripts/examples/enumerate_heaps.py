"""The heaps of a process and every block in them, by the Toolhelp functions: of any client of a daemon, by its pid.

A snapshot holds which heaps the process has; Heap32ListFirst and Heap32ListNext go through them, Heap32First and
Heap32Next through the blocks of each. All state of an enumeration is in the structure that they fill.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from ctypes import sizeof

import click
from _stage import session_with

from heapd_client import win32


def heaps_of(pid: int) -> Iterator[win32.HEAPLIST32]:
    """The heaps of a process, its process heap first. Raises: click.ClickException if it is no client."""
    snapshot = win32.CreateToolhelp32Snapshot(win32.TH32CS_SNAPHEAPLIST, pid)
    if snapshot == win32.INVALID_HANDLE_VALUE:
        is_there = win32.GetLastError() == win32.ERROR_ACCESS_DENIED
        raise click.ClickException(f"process {pid} is no client of the daemon" if is_there else f"no process {pid}")
    try:
        heap = win32.HEAPLIST32(dwSize=sizeof(win32.HEAPLIST32))
        has_more = win32.Heap32ListFirst(snapshot, heap)
        while has_more:
            yield heap
            has_more = win32.Heap32ListNext(snapshot, heap)
    finally:
        win32.CloseHandle(snapshot)


def blocks_of(heap: win32.HEAPLIST32) -> Iterator[win32.HEAPENTRY32]:
    """The blocks of a heap, busy and free, in the order of their addresses."""
    block = win32.HEAPENTRY32(dwSize=sizeof(win32.HEAPENTRY32))
    has_more = win32.Heap32First(block, heap.th32ProcessID, heap.th32HeapID)
    while has_more:
        yield block
        has_more = win32.Heap32Next(block)


def allocate_a_little() -> None:
    """So that this process has something to show."""
    for size in (10, 100, 1000):
        win32.HeapAlloc(win32.GetProcessHeap(), 0, size)
    private = win32.HeapCreate(win32.HEAP_NO_SERIALIZE, 0, 0)
    for size in (5_000, 2_000_000):
        win32.HeapAlloc(private, win32.HEAP_ZERO_MEMORY, size)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("pid", type=click.IntRange(1, 2**31 - 1), required=False)
@click.option("--endpoint", "-e", help="The daemon whose client it is.  [default: $HEAPD_ENDPOINT, else the user's]")
def main(pid: int | None, endpoint: str | None) -> None:
    """Print every heap of process PID, and the address and size of every block; without a PID, of this process
    itself."""
    with session_with(endpoint, has_own_daemon=pid is None and endpoint is None) as session:
        win32.attach(session)
        if pid is None:
            allocate_a_little()
        print(f"process {pid or os.getpid()}")
        for heap in heaps_of(pid or os.getpid()):
            print(f"heap {heap.th32HeapID:#x}" + (", the process heap" if heap.dwFlags & win32.HF32_DEFAULT else ""))
            count = size = 0
            for block in blocks_of(heap):
                is_free = block.dwFlags & win32.LF32_FREE
                print(f"  {block.dwAddress:#14x} {block.dwBlockSize:>12} bytes{' free' if is_free else ''}")
                count, size = count + (not is_free), size + (0 if is_free else block.dwBlockSize)
            print(f"  {count} blocks allocated, {size} bytes")


if __name__ == "__main__":
    main()
