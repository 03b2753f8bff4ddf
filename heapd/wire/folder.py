"""The folder of a job that runs a daemon of its own: made for it, gone with it, known as abandoned if it was killed.

heapd-NAME-XXXXXXXX/     in the folder for temporary files, 0700
    job                  flocked by the job for as long as it lives
    log, NAME.control .. the daemon's
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

__all__ = ["JobFolder", "abandoned_folders"]

_PREFIX: Final = "heapd-"
_MARK: Final = "job"
_UNBORN: Final = "job.new"  # the mark until it is locked: nobody takes the folder for abandoned before


class JobFolder:
    """A context manager; on exit the folder is gone. Field: path."""

    def __init__(self, name: str) -> None:
        """Args: name (of the job: letters, digits, dashes). Raises: OSError."""
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-"))
        unborn = self.path / _UNBORN
        self._mark = os.open(unborn, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._mark, fcntl.LOCK_EX)
        unborn.rename(self.path / _MARK)

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._mark)


def abandoned_folders() -> Iterator[Path]:
    """This user's folders whose job has died. Their daemons may still live, for a moment."""
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*")):
        try:
            mark = os.open(path / _MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # no folder, not ours to read, or another thing of that name
            continue
        try:
            if os.fstat(mark).st_uid == os.getuid() == os.lstat(path).st_uid:
                fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
                yield path
        except BlockingIOError:
            pass  # its job lives
        finally:
            os.close(mark)
