"""heapd: a heap server over shared memory; this package holds the daemon, the arena, the heap managers and the wire format."""

__version__ = "0.1.0"

__all__ = ["__version__"]
