"""The daemon's private records in a segment of their own, so that its death loses none of them."""

from heapd.manager.ledger.ledger import Ledger
from heapd.manager.ledger.records import Records
from heapd.manager.ledger.recovery import count_persistent, restore_arena, restore_directory
from heapd.manager.ledger.retelling import retell
from heapd.manager.ledger.volume import LedgerHeader, Volume, read_ledger_header, stop_ledger

__all__ = [
    "Ledger",
    "LedgerHeader",
    "Records",
    "Volume",
    "count_persistent",
    "read_ledger_header",
    "restore_arena",
    "restore_directory",
    "retell",
    "stop_ledger",
]
