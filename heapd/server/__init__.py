"""The daemon's processes: settings, credentials, the poll loop, start and stop, and who starts it again."""

from heapd.server.config import DEFAULT_RESERVE, Config
from heapd.server.lifecycle import serve
from heapd.server.supervisor import supervise

__all__ = ["DEFAULT_RESERVE", "Config", "serve", "supervise"]
