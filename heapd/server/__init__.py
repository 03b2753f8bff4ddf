"""The daemon's processes: settings, credentials, the poll loop, start and stop, and who starts it again; and the
machine that it runs on."""

from heapd.server.checkup import Finding, check_up
from heapd.server.config import DEFAULT_RESERVE, Config
from heapd.server.garbage import Leftover, find_leftovers, remove_leftover
from heapd.server.lifecycle import serve
from heapd.server.supervisor import supervise

__all__ = [
    "DEFAULT_RESERVE",
    "Config",
    "Finding",
    "Leftover",
    "check_up",
    "find_leftovers",
    "remove_leftover",
    "serve",
    "supervise",
]
