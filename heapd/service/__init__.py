"""Dispatch: messages in, messages out; no socket, no thread, no clock of its own."""

from heapd.service.backend import Caller, Job, Manager, Peer, Session, Waiter
from heapd.service.exposition import CONTENT_TYPE, check_extra, expose
from heapd.service.histogram import Histogram
from heapd.service.pending import Deferred, ReplyMemory, RunningJob
from heapd.service.service import Answer, Identity, Service

__all__ = [
    "CONTENT_TYPE",
    "Answer",
    "Caller",
    "Deferred",
    "Histogram",
    "Identity",
    "Job",
    "Manager",
    "Peer",
    "ReplyMemory",
    "RunningJob",
    "Service",
    "Session",
    "Waiter",
    "check_extra",
    "expose",
]
