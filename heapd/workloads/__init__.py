"""Jobs that real processes do on a heap server, and pictures of what they leave: demo, stress, benchmark inputs.

On the level of the command line: everything here is a client, through `heapd_client` alone.
"""

from __future__ import annotations

__all__ = ["WorkloadError"]


class WorkloadError(RuntimeError):
    """A job could not be done; the text is a sentence for the user."""
