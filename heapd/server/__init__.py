"""The daemon's process: settings, credentials, the poll loop, start and stop."""

from heapd.server.config import DEFAULT_RESERVE, Config
from heapd.server.lifecycle import serve

__all__ = ["DEFAULT_RESERVE", "Config", "serve"]
