"""`heapd locks`: who holds each heap's lock now, and what waiting for it has cost so far. Asks nobody: it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import click
from rich.text import Text

import heapd_client as hc
from heapd.cli.params import endpoint_option, json_option
from heapd.cli.tables import console, heap_title, make_table, print_json
from heapd.layout import (
    C_ACQUIRED,
    C_CONTENDED,
    C_HEAP_ID,
    C_RECOVERED,
    C_WAITED_NS,
    F_SERIALIZE,
    HEAP_INDEX_BITS,
)
from heapd.mutex import Holder, Mutex
from heapd.records import HeapInfo
from heapd.wire import Endpoint

__all__ = ["locks"]


@dataclass(frozen=True, slots=True)
class _Lock:
    """A heap's lock: heap (its name, None for an anonymous one), title (as the table calls it), holder (None: free) and
    counters as in layout.C_ACQUIRED."""

    heap: str | None
    title: str
    heap_id: int
    serialized: bool
    holder: Holder | None
    acquisitions: int
    contended: int
    waited_ns: int
    recoveries: int

    @property
    def contended_share(self) -> float:
        return self.contended / self.acquisitions if self.acquisitions else 0.0

    def plain(self) -> dict[str, object]:
        """For JSON."""
        plain = asdict(self) | {"contended_share": self.contended_share}
        del plain["title"]
        return plain


@click.command("locks")
@json_option
@endpoint_option
def locks(as_json: bool, endpoint: Endpoint) -> None:
    """List each heap's lock: who holds it, how often it was taken, what waiting cost.

    held by: process/thread and command. recovered: how often its holder had died.
    """
    with hc.connect(str(endpoint), autostart=False) as session:
        locks = [lock for info in session.heaps() if (lock := _read(session, info)) is not None]
    if as_json:
        print_json([lock.plain() for lock in locks])
    elif locks:
        _print(locks)
    else:
        console().print("no heaps")


def _read(session: hc.Session, info: HeapInfo) -> _Lock | None:
    """The lock of a heap as its control block shows it; None if the heap has gone meanwhile."""
    arena, index = session.arena, info.heap_id & (1 << HEAP_INDEX_BITS) - 1
    slot = arena.shape.control_slot(index)
    words = arena.words
    holder = Mutex(arena.pointer + arena.shape.mutex_address(index)).holder()
    counters = [words[slot + word] for word in (C_ACQUIRED, C_CONTENDED, C_WAITED_NS, C_RECOVERED)]
    if words[slot + C_HEAP_ID] != info.heap_id:
        return None
    return _Lock(info.name, heap_title(info), info.heap_id, bool(info.flags & F_SERIALIZE), holder, *counters)


def _holder_text(holder: Holder | None) -> str:
    if holder is None:
        return "-"
    return f"{holder.pid or '?'}/{holder.tid} {holder.command}" + (" (stopped)" if holder.is_stopped else "")


def _print(locks: list[_Lock]) -> None:
    table = make_table("heap", "serial", "held by", "taken", "contended", "waited", "recovered", left=3)
    for lock in locks:
        table.add_row(
            Text(lock.title),
            "yes" if lock.serialized else "no",
            Text(_holder_text(lock.holder)),
            f"{lock.acquisitions:,}",
            f"{lock.contended:,} ({lock.contended_share:.1%})" if lock.contended else "-",
            f"{lock.waited_ns / 1e6:,.1f} ms" if lock.waited_ns else "-",
            f"{lock.recoveries:,}" if lock.recoveries else "-",
        )
    console().print(table)
