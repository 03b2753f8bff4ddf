"""Who sent a message, by the kernel's word, and a pidfd that says when that process dies.

A pid is not a process: it may be a corpse's, whose request is still delivered, or belong to somebody new by now. So
the process is taken from the connection itself (SO_PEERPIDFD on a duplicate of its descriptor, Linux 6.5 and later);
where that is not to be had, from its pid, with its start time read between opening the pidfd and seeing it alive.

Of a message's properties only Peer-Address is believed: libzmq writes it from SO_PEERCRED and a peer cannot. A peer
that greets as ZMTP 1.0 or 2.0 comes with no properties at all; nobody knows who it is, and it gets no answer.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Final

import zmq

from heapd.service import Peer

__all__ = [
    "SO_PEERPIDFD",
    "ClientProcess",
    "MessageCaller",
    "ProcessTable",
    "connection_of",
    "cut_off",
    "peer_address",
    "start_time_of",
]

log = logging.getLogger("heapd.server")

SO_PEERPIDFD: Final = 77  # asm-generic/socket.h; CPython has no name for it
_SO_PEERGROUPS: Final = 59  # likewise; Linux 4.13
_MAX_OPTION_BYTES: Final = 1024  # what CPython's getsockopt takes: 256 groups
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
_START_TIME_FIELD: Final = 22  # of /proc/PID/stat, counted from 1


class ClientProcess(Peer):
    """A living client process. Fields: those of Peer, and pidfd (readable once it is dead; closed by `close`)."""

    __slots__ = ("pidfd",)

    def __init__(self, pid: int, uid: int, start_time: int, pidfd: int) -> None:
        super().__init__(pid, uid, start_time)
        self.pidfd = pidfd

    def close(self) -> None:
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class ProcessTable:
    """The processes that have sessions, one entry and one pidfd each however many sessions they open."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], ClientProcess] = {}
        self._fresh: list[ClientProcess] = []

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[ClientProcess]:
        return iter(list(self._known.values()))

    def admit(self, pid: int, uid: int, connection: int | None) -> ClientProcess | None:
        """The process behind a message, None if it has died.

        Args:   pid, uid (as Peer-Address has them), connection (the daemon's own descriptor of it, if known).
        Raises: OSError if no descriptor is left for the pidfd.
        """
        pidfd = _pidfd_of_connection(connection, pid) if connection is not None else None
        if pidfd is None:
            pidfd = _pidfd_of_pid(pid)
        start_time = start_time_of(pid)
        if pidfd is None or start_time is None or is_dead(pidfd):
            if pidfd is not None:
                os.close(pidfd)
            return None
        known = self._known.get((pid, start_time))
        if known is not None:
            os.close(pidfd)
            return known
        process = ClientProcess(pid, uid, start_time, pidfd)
        self._known[pid, start_time] = process
        self._fresh.append(process)
        return process

    def readmit(self, pid: int, uid: int, start_time: int) -> ClientProcess:
        """The process that had sessions with an earlier server, as that one wrote it down.

        Returns: it, among the fresh ones if it lives; if it has died, with a closed pidfd and not in the table: its
                 sessions are to be ended.
        Raises:  OSError if no descriptor is left for the pidfd.
        """
        known = self._known.get((pid, start_time))
        if known is not None:
            return known
        pidfd = _pidfd_of_pid(pid)
        # In this order: the process that is seen alive last is the one whose start time was read.
        if pidfd is not None and (start_time_of(pid) != start_time or is_dead(pidfd)):
            os.close(pidfd)
            pidfd = None
        process = ClientProcess(pid, uid, start_time, -1 if pidfd is None else pidfd)
        if pidfd is not None:
            self._known[pid, start_time] = process
            self._fresh.append(process)
        return process

    def take_fresh(self) -> list[ClientProcess]:
        """The processes admitted since the last call; the loop is to watch their pidfds."""
        fresh = self._fresh
        if fresh:
            self._fresh = []
        return fresh

    def forget(self, process: ClientProcess) -> None:
        """Close the pidfd of a process that has no session left. The loop has stopped watching it."""
        self._known.pop((process.pid, process.start_time), None)
        process.close()


class MessageCaller:
    """Who sent one message of the control socket. Fields: pid, uid."""

    __slots__ = ("_connection", "_table", "pid", "uid")

    def __init__(self, pid: int, uid: int, connection: int | None, table: ProcessTable) -> None:
        self.pid = pid
        self.uid = uid
        self._connection = connection
        self._table = table

    def is_member(self, gid: int) -> bool:
        """Whether the process was in that group when it connected. A process in more than 256 groups is in none."""
        return self._connection is not None and gid in _groups_of_connection(self._connection, self.pid)

    def admit(self) -> ClientProcess | None:
        """The living process behind the message, None if it has died."""
        return self._table.admit(self.pid, self.uid, self._connection)


def peer_address(frame: zmq.Frame) -> tuple[int, int] | None:
    """(pid, uid) of a message's sender, None if the message does not say: such a one is dropped."""
    try:
        text = frame.get("Peer-Address")
        _, uid, _, pid = str(text).split(":")
        return int(pid), int(uid)
    except (zmq.ZMQError, ValueError):
        return None


def connection_of(frame: zmq.Frame) -> int | None:
    """The daemon's own descriptor of the connection that a message came by; it may be closed or another's by now."""
    try:
        return int(frame.get(zmq.SRCFD))
    except (zmq.ZMQError, ValueError):
        return None


def start_time_of(pid: int) -> int | None:
    """Start of process `pid` in clock ticks after boot, None if no such process lives: a zombie has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in brackets and may hold spaces and brackets itself.
    after_command = text.rpartition(b")")[2].split()
    if after_command[0] in (b"Z", b"X"):
        return None
    return int(after_command[_START_TIME_FIELD - 3])


def is_dead(pidfd: int) -> bool:
    """Whether the process has ended; true of a zombie already."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def cut_off(connection: int) -> None:
    """Shut a connection down from this side; libzmq then drops it with all that is buffered for it."""
    try:
        with _borrow(connection) as peer:
            peer.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        log.debug("cutting off: %s", error)


def _borrow(connection: int) -> socket.socket:
    """A duplicate of libzmq's descriptor as a socket. Raises: OSError if it is closed or no socket by now."""
    duplicate = os.dup(connection)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _pidfd_of_connection(connection: int, pid: int) -> int | None:
    """A pidfd of the process that made the connection, None where the kernel gives none or it is not `pid`'s."""
    try:
        with _borrow(connection) as peer:
            # libzmq may have closed the connection, and the number may stand for another by now.
            if _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0] != pid:
                return None
            return peer.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError:
        return None


def _groups_of_connection(connection: int, pid: int) -> set[int]:
    """The groups, primary and supplementary, of the process that made the connection, as they were then.

    SO_PEERCRED has the primary group only. /proc/PID/status has them all, but of whatever the process is now: it may
    have connected as a stranger and become a program that is set to another user's id.
    """
    try:
        with _borrow(connection) as peer:
            peer_pid, _, primary = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            if peer_pid != pid:
                return set()
            groups = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION_BYTES)
    except OSError:
        return set()
    return {primary, *struct.unpack(f"{len(groups) // 4}I", groups)}


def _pidfd_of_pid(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
