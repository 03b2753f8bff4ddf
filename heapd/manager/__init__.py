"""Many heaps for many clients: sessions, names, limits, and every operation on them."""

from heapd.manager.ledger import LedgerHeader, count_persistent, read_ledger_header, stop_ledger
from heapd.manager.manager import HeapManager, Job, Limits
from heapd.manager.names import Waiter
from heapd.manager.sessions import Session

__all__ = [
    "HeapManager",
    "Job",
    "LedgerHeader",
    "Limits",
    "Session",
    "Waiter",
    "count_persistent",
    "read_ledger_header",
    "stop_ledger",
]
