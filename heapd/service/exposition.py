"""A daemon's status as Prometheus text: base units, no label that grows with use, names that will not change.

Needs prometheus-client, the extra heapd[metrics]; imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from heapd.errors import MissingExtraError

__all__ = ["CONTENT_TYPE", "check_extra", "expose"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# status key: (metric, what it says); a metric counts in the base unit that its name ends with, or in things.
_GAUGES: Final = {
    "started_at": ("heapd_start_time_seconds", "When the daemon's process started serving, since the epoch."),
    "sessions": ("heapd_sessions", "Living sessions."),
    "session_limit": ("heapd_sessions_limit", "Sessions there may be at once."),
    "heaps": ("heapd_heaps", "Heaps."),
    "heap_limit": ("heapd_heaps_limit", "Heaps there may be at once."),
    "waiters": ("heapd_waiters", "Lookups that wait for a name to be published."),
    "reserve": ("heapd_arena_bytes", "Address space of the arena."),
    "reserved": ("heapd_reserved_bytes", "Address space reserved by heaps."),
    "commit_limit": ("heapd_commit_limit_bytes", "Memory that the daemon may commit."),
    "committed": ("heapd_committed_bytes", "Memory committed, tables included."),
    "ledger": ("heapd_ledger_bytes", "Memory of the daemon's own records; not part of what is committed."),
    "peak_committed": ("heapd_peak_committed_bytes", "The most memory that was committed at a time."),
}
_COUNTERS: Final = {
    "restarts": ("heapd_restarts", "Times that the daemon was started again on its arena."),
    "requests_refused": ("heapd_requests_refused", "Requests that could not be decoded."),
    "requests_repeated": ("heapd_requests_repeated", "Repeated requests that were answered from memory."),
    "callers_refused": ("heapd_callers_refused", "Control requests of other users."),
    "anonymous_dropped": ("heapd_anonymous_dropped", "Messages without the kernel's word on their sender."),
    "dead_dropped": ("heapd_dead_dropped", "Hellos of processes that had died."),
    "replies_undeliverable": ("heapd_replies_undeliverable", "Answers whose client had left or did not read."),
    "peers_cut_off": ("heapd_peers_cut_off", "Connections cut for messages of many frames."),
    "gates_shut": ("heapd_gates_shut", "Times that descriptors ran short and no client was let in."),
    "gates_renewed": ("heapd_gates_renewed", "Times that all connections were cut because buffers ran away."),
}


def check_extra() -> None:
    """Raises: MissingExtraError unless metrics can be made."""
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "prometheus-client is not installed; install it with: pip install 'heapd[metrics]'"
        ) from None


def expose(status: Mapping[str, Any]) -> bytes:
    """The text that Prometheus scrapes.

    Args:   status (as the daemon answers it; a key that an older daemon does not have gives no metric).
    Raises: MissingExtraError.
    """
    check_extra()
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(status))
    return bytes(generate_latest(registry))


class _Status:
    """What prometheus-client collects: one status, as metric families."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        status = self._status
        about = {key: str(status[key]) for key in ("name", "version", "python") if key in status}
        yield InfoMetricFamily("heapd", "Which daemon this is.", about)
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for key, (name, text) in table.items():
                if key in status:
                    yield kind(name, text, status[key])
        if "rpc_doublings" in status:
            yield self._durations()

    def _durations(self) -> Any:
        from prometheus_client.core import HistogramMetricFamily

        buckets = [(repr(bound_ns / 1e9), count) for bound_ns, count in self._status["rpc_doublings"]]
        return HistogramMetricFamily(
            "heapd_request_duration_seconds",
            "How long requests on the work socket took in the daemon.",
            [*buckets, ("+Inf", self._status["requests"])],
            self._status["rpc_total_s"],
        )
