"""What a daemon is told at its start; every figure that is not a flag says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from heapd.units import GIB, MIB
from heapd.wire import Endpoint

__all__ = ["DEFAULT_RESERVE", "Config"]

DEFAULT_RESERVE: Final = 64 * GIB  # address space, sparse: costs nothing until committed


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one daemon.

    Fields:
        endpoint              where it listens
        reserve               bytes of address space for the arena, None: those of one that was left, else 64 GiB
        gid                   group whose members are served too, None: its own user alone
        commit_limit          bytes it may commit, None: what the machine leaves, less a margin
        session_quota         bytes that one session may have, 0: no limit
        idle_exit_s           ends by itself this long after its last session, None: never
        restarts              times in a minute that a server that died is started again, 0: it has no supervisor
                              (arbitrary: one that dies at once, again and again, gets there within the minute)
        watchdog_s            seconds without a turn of its loop after which a server is killed, 0: never (longer than
                              clients wait by default: a request that hangs whoever reads it is then not sent to the
                              next server)
        metrics_port          of loopback, for Prometheus over HTTP, 0: any free one, None: no HTTP
        until_eof_fd          the daemon ends when this reads end of file, None: there is nobody whose end is its own
        has_ledger            False: nothing outlives the server process, for a benchmark to compare with
        ready_fd              a line "ready" is written to it once clients are answered, None: nobody waits
        max_sessions          sessions at once (arbitrary; state words have room for 16,383)
        max_process_sessions  sessions of one process (arbitrary)
        drain_frames          requests taken from a socket before timers and jobs get a turn (arbitrary)
        drain_ms              and for how long at most: a request may cost a slice of a job (arbitrary)
        backlog_frames        messages that wait for the daemon, and for each client, before zmq holds or refuses them
        handshake_ms          a connection that has not greeted by then is cut; libzmq's 30 s let silent ones pile up
        memory_growth         bytes by which the process may grow before its sockets are made anew: a multipart
                              message without end is buffered inside libzmq, where no limit reaches it
        tick_s                how often the guards look (arbitrary)
    """

    endpoint: Endpoint
    reserve: int | None = None
    gid: int | None = None
    commit_limit: int | None = None
    session_quota: int = 0
    idle_exit_s: float | None = None
    restarts: int = 100
    watchdog_s: float = 30.0
    metrics_port: int | None = None
    until_eof_fd: int | None = None
    has_ledger: bool = True
    ready_fd: int | None = None
    max_sessions: int = 4096
    max_process_sessions: int = 256
    drain_frames: int = 256
    drain_ms: int = 5
    backlog_frames: int = 1000
    handshake_ms: int = 5000
    memory_growth: int = 256 * MIB
    tick_s: float = 0.25
