"""Two components, one of them faulty: in one heap it damages the other, in separate heaps only itself.

The fault is the classic one, a write past the end of a block. Python's memoryviews refuse it; code that is called
through ctypes does not ask. The daemon's own records lie where no client can write, so that it can tell what broke, and
destroy a broken heap like any other.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64

import click
from _stage import example

import heapd_client as hc
from heapd_client.structs import Record


class Entry(Record):
    """What both components keep: a number, and a check sum of it."""

    _fields_ = [("number", c_uint64), ("check", c_uint32)]

    @property
    def is_intact(self) -> bool:
        """The check sum is right."""
        return bool(self.check == checksum(self.number))


def checksum(number: int) -> int:
    """32 bits that a number written by accident does not have."""
    return (number * 2654435761 ^ 0x5EED) & 0xFFFFFFFF


def fill(first: hc.Heap, second: hc.Heap, count: int) -> tuple[list[Entry], list[Entry]]:
    """Entries of the faulty component, and of the sound one, allocated in turn."""
    pairs = [
        (Entry.alloc(first, number=n, check=checksum(n)), Entry.alloc(second, number=n, check=checksum(n)))
        for n in range(count)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def overrun(entries: list[Entry], size: int) -> None:
    """The fault: a write that begins in the component's first block and goes on for `size` bytes."""
    first = min(entries, key=lambda entry: entry.address)
    ctypes.memset(first.arena.pointer + first.address, 0xAA, size)


def report(name: str, entries: list[Entry]) -> None:
    """What is left of a component, by its own check sums."""
    print(f"  {name:<17} {count_intact(entries):>4} of {len(entries)} entries intact")


def check(name: str, heap: hc.Heap) -> None:
    """What is left of a heap, by its invariants."""
    broken = heap.validate()
    print(f"  {name:<17} {len(broken):>4} violations" + (f", such as: {broken[0].detail}" if broken else ""))


def count_intact(entries: list[Entry]) -> int:
    """Entries that can be read and have the right check sum."""
    intact = 0
    for entry in entries:
        try:
            intact += entry.is_intact
        except hc.HeapdError:  # its state word was overwritten, so that it looks freed
            continue
    return intact


@example
@click.option("--entries", type=click.IntRange(1, 10_000), default=500, show_default=True, help="Of each component.")
@click.option("--overrun", "size", type=click.IntRange(1, 60_000), default=16_000, show_default=True, help="In bytes.")
def main(session: hc.Session, entries: int, size: int) -> None:
    """Let one component write past the end of a block, and see what becomes of the other one."""
    print(f"both in one heap, after the faulty one wrote {size} bytes too far:")
    shared = session.create_heap()
    faulty, sound = fill(shared, shared, entries)
    overrun(faulty, size)
    report("faulty component", faulty)
    report("sound component", sound)
    check("their heap", shared)
    shared.destroy()

    print("each in a heap of its own, after the same:")
    first, second = session.create_heap(), session.create_heap()
    faulty, sound = fill(first, second, entries)
    overrun(faulty, size)
    report("faulty component", faulty)
    check("its heap", first)
    report("sound component", sound)
    check("its heap", second)

    first.destroy()
    sound.append(Entry.alloc(second, number=entries, check=checksum(entries)))
    print(f"the broken heap is destroyed; the sound component goes on: {count_intact(sound)} entries")


if __name__ == "__main__":
    main()
