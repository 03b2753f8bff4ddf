"""heapd: a heap server over shared memory: the daemon, its arena and heap managers, and the wire format."""

__version__ = "0.1.0"

__all__ = ["__version__"]
