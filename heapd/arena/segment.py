"""The named shared memory object behind an arena: create, attach, unlink. Sole import of multiprocessing.shared_memory.

Must never let Python's resource tracker know of the segment: on 3.11 and 3.12 the tracker of any process that attached
would unlink it when that process ends, and the creator's when the daemon is killed.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from mmap import PROT_READ, mmap
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any, cast

from heapd.errors import SegmentError
from heapd.layout import WORD

__all__ = ["Segment", "remove_segment", "segment_exists"]

SHM_DIRECTORY = Path("/dev/shm")
_patching = threading.Lock()


class _Untracked(shared_memory.SharedMemory):
    """SharedMemory that the resource tracker never hears of, silent when it is collected with live views."""

    def __del__(self) -> None:
        pass  # the base class would close() and complain of views; the kernel unmaps at exit


class _Attached(_Untracked):
    """One that somebody else made."""

    def unlink(self) -> None:
        pass  # the base class would unlink what it cannot map: another's segment, because we are short of address space


@contextmanager
def _no_tracker(name: str) -> Iterator[None]:
    """Keep `name` from the resource tracker for the calls inside; other names go through (another thread's may)."""
    tracker = cast(Any, shared_memory).resource_tracker
    with _patching:
        register, unregister = tracker.register, tracker.unregister

        def unless_ours(call: Any) -> Any:
            return lambda path, kind: None if path == f"/{name}" else call(path, kind)

        tracker.register, tracker.unregister = unless_ours(register), unless_ours(unregister)
        try:
            yield
        finally:
            tracker.register, tracker.unregister = register, unregister


def _open(name: str, size: int) -> shared_memory.SharedMemory:
    """size 0 attaches."""
    kind = _Untracked if size else _Attached
    if sys.version_info >= (3, 13):
        return kind(name, create=size > 0, size=size, track=False)
    with _no_tracker(name):
        return kind(name, create=size > 0, size=size)


class _View:
    """As much of a SharedMemory as a Segment needs, of an existing one, for reading only."""

    def __init__(self, name: str) -> None:
        fd = os.open(SHM_DIRECTORY / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._mapping = mmap(fd, 0, prot=PROT_READ)
        finally:
            os.close(fd)
        self.buf = memoryview(self._mapping)
        self.size = len(self.buf)

    def close(self) -> None:
        self.buf.release()
        self._mapping.close()


class Segment:
    """A mapped shared memory object of this user.

    Fields: name, size (bytes, mapped), fd (for fallocate and fstat), buffer (memoryview of bytes), words (the same as
    "Q"), mapping (the mmap, for madvise).
    """

    def __init__(self, memory: shared_memory.SharedMemory | _View, name: str) -> None:
        self._memory = memory
        self.name = name
        self.size = memory.size
        access = os.O_RDONLY if isinstance(memory, _View) else os.O_RDWR
        self.fd = os.open(SHM_DIRECTORY / name, access | os.O_NOFOLLOW | os.O_CLOEXEC)
        assert memory.buf is not None  # typed so for closed ones
        self.buffer = memory.buf
        self.mapping = cast(mmap, self.buffer.obj)
        self.words = self.buffer[: self.size // WORD * WORD].cast("Q")

    @classmethod
    def create(cls, name: str, size: int) -> Segment:
        """Make a sparse segment of `size` bytes (a multiple of the page size), mode 0600, that reads as zeros.

        Raises: SegmentError if one of that name exists or the system refuses the size.
        """
        try:
            memory = _open(name, size)
        except FileExistsError:
            raise SegmentError(f"the shared memory segment {name} exists already") from None
        except OSError as error:
            raise SegmentError(f"cannot create the shared memory segment {name} of {size} bytes: {error}") from error
        segment = cls(memory, name)
        os.fchmod(segment.fd, 0o600)
        return segment

    def open_to(self, gid: int | None) -> None:
        """Let the members of a group map the segment too; None: nobody but this user, as it was made.

        Raises: SegmentError if this user may not give it to the group.
        """
        try:
            if gid is not None:
                os.fchown(self.fd, -1, gid)
            os.fchmod(self.fd, 0o600 if gid is None else 0o660)
        except OSError as error:
            raise SegmentError(
                f"the segment {self.name} cannot be opened to group {gid}: {error.strerror}; be a member of it"
            ) from error

    @classmethod
    def attach(cls, name: str, *, is_to_write: bool = True) -> Segment:
        """Map an existing segment of this user.

        Args:   is_to_write (False: to look only, in nobody's way; a look at a page that is not committed commits it).
        Raises: SegmentError if it is missing, empty, not a plain file, another user's, open to others than this user
                or a group, or too large for this process to map.
        """
        try:
            status = os.lstat(SHM_DIRECTORY / name)
        except FileNotFoundError:
            raise SegmentError(f"there is no shared memory segment {name}") from None
        if status.st_uid != os.geteuid() or status.st_mode not in (stat.S_IFREG | 0o600, stat.S_IFREG | 0o660):
            raise SegmentError(f"the shared memory segment {name} is not a private file of this user")
        if not status.st_size:
            raise SegmentError(f"the shared memory segment {name} is empty: whoever was making it did not finish")
        try:
            return cls(_open(name, 0) if is_to_write else _View(name), name)
        except OSError as error:
            raise SegmentError(f"cannot map the shared memory segment {name}: {error}") from error

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory behind the segment, as the kernel counts them."""
        return os.fstat(self.fd).st_blocks * 512

    @property
    def inode(self) -> int:
        """The file's number: another file of the same name and bytes has another one."""
        return os.fstat(self.fd).st_ino

    def unlink(self) -> None:
        """Remove the name; mappings go on working on memory that goes with the last of them."""
        remove_segment(self.name)

    def close(self) -> None:
        """Unmap, if no view is alive; else leave that to the end of the process."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with suppress(BufferError):
            self.words.release()
            self._memory.close()


def segment_exists(name: str) -> bool:
    return os.path.lexists(SHM_DIRECTORY / name)


def remove_segment(name: str) -> bool:
    """Unlink a segment by name; False if there is none."""
    try:
        os.unlink(SHM_DIRECTORY / name)
    except FileNotFoundError:
        return False
    return True
