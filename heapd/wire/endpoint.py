"""Where a daemon is: a directory, and a name in it.

An endpoint is written `ipc://<directory>/<name>`, or just `<name>` for one in the user's runtime directory. The
daemon's two sockets and its lock file lie in the directory, beside each other:

    <name>.control   hello, status, stop: the kernel's word on who is calling is read for every message
    <name>.work      everything else, by session token
    <name>.lock      flock of the living daemon; holds its process id and start time as text
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from heapd.errors import InvalidArgumentError

__all__ = [
    "DEFAULT_NAME",
    "LEDGER_SUFFIX",
    "SHUT_SUFFIX",
    "Endpoint",
    "own_directory",
    "runtime_directory",
]

DEFAULT_NAME: Final = "default"
SHUT_SUFFIX: Final = ".shut"  # of a socket's file while descriptors are scarce, and no new client is let in
LEDGER_SUFFIX: Final = "-ledger"  # of the segment with the daemon's own records, after the arena's name
_SCHEME: Final = "ipc://"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MAX_PATH_BYTES: Final = 107  # sockaddr_un's 108 less its closing NUL
_ENDPOINT_VARIABLE: Final = "HEAPD_ENDPOINT"
_DIRECTORY_VARIABLE: Final = "HEAPD_RUNTIME_DIR"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A daemon's address. Fields: directory (absolute path), name (1 to 64 of A-Z a-z 0-9 . _ -)."""

    directory: str
    name: str = DEFAULT_NAME

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise InvalidArgumentError(
                "a daemon's name is 1 to 64 letters, digits, dots, dashes or underscores", field="name"
            )
        if not self.name.strip("."):
            raise InvalidArgumentError(
                f"a daemon's name has more than dots in it: {self.name} means a directory", field="name"
            )
        if self.name.endswith(LEDGER_SUFFIX):
            raise InvalidArgumentError(
                f"a daemon's name does not end in {LEDGER_SUFFIX}: so do its ledgers", field="name"
            )
        if "\0" in self.directory:
            raise InvalidArgumentError("a runtime directory's path holds no NUL", field="directory")
        object.__setattr__(self, "directory", os.path.abspath(self.directory))
        size = len(os.fsencode(self.control_path))
        if size > _MAX_PATH_BYTES:
            raise InvalidArgumentError(
                f"the socket path of daemon {self.name!r} would take {size} bytes and the system allows "
                f"{_MAX_PATH_BYTES}; choose a shorter runtime directory or name",
                size=size,
                limit=_MAX_PATH_BYTES,
            )

    @classmethod
    def parse(cls, text: str | None = None, environ: Mapping[str, str] | None = None) -> Endpoint:
        """The endpoint meant by `text`: "ipc:///run/me/demo", or "demo" in the user's runtime directory.

        Args:   text (None or "": $HEAPD_ENDPOINT if set, else the daemon "default"), environ (None: the process's).
        Raises: InvalidArgumentError if it is neither, its directory is no absolute path, or its socket's path would be
                too long.
        """
        if text is not None and not isinstance(text, str):
            raise InvalidArgumentError(f"an endpoint is text, or None, not {type(text).__name__}", field="endpoint")
        environ = os.environ if environ is None else environ
        text = text or environ.get(_ENDPOINT_VARIABLE) or DEFAULT_NAME
        if text.startswith(_SCHEME):
            directory, slash, name = text.removeprefix(_SCHEME).rpartition("/")
            if slash and name:
                return cls(_checked_directory(directory, name), name)
        elif _NAME.fullmatch(text) is not None:
            return cls(runtime_directory(environ), text)
        raise InvalidArgumentError(
            "an endpoint is a daemon's name, such as demo, or ipc://DIRECTORY/NAME; names have 1 to 64 letters, "
            "digits, dots, dashes or underscores",
            field="endpoint",
        )

    def __str__(self) -> str:
        return f"{_SCHEME}{os.path.join(self.directory, self.name)}"

    @property
    def control_path(self) -> str:
        return os.path.join(self.directory, f"{self.name}.control")

    @property
    def work_path(self) -> str:
        return os.path.join(self.directory, f"{self.name}.work")

    @property
    def lock_path(self) -> str:
        return os.path.join(self.directory, f"{self.name}.lock")

    def holder(self) -> tuple[int, int] | None:
        """Who holds the lock, as its file has it: process id, and start time in clock ticks after boot.

        It may have died; None if the file is missing, or names nobody yet.
        """
        try:
            with open(self.lock_path, "rb") as file:
                pid, start_time = file.read(64).split()
            return int(pid), int(start_time)
        except (OSError, ValueError):
            return None

    @property
    def control(self) -> str:
        """ZeroMQ address of the control socket."""
        return _SCHEME + self.control_path

    @property
    def work(self) -> str:
        """ZeroMQ address of the work socket."""
        return _SCHEME + self.work_path

    @property
    def segment(self) -> str:
        """Name of the daemon's shared memory segment.

        Names in /dev/shm are one flat space, so that a daemon elsewhere than in the user's own directory carries a
        hash of where it is. Clients do not compute it: hello tells them.
        """
        if self.directory == own_directory(os.environ):
            return f"heapd-{self.name}"
        return self.unique_segment

    @property
    def unique_segment(self) -> str:
        """The segment's name with the directory's hash, whichever directory it is."""
        digest = f"{zlib.crc32(os.fsencode(self.directory)):08x}"
        return f"heapd-{self.name}-{digest}"


def _checked_directory(directory: str, name: str) -> str:
    """The directory of an endpoint's text. Raises: InvalidArgumentError if it depends on where one is, or who reads."""
    if directory and not directory.startswith("/"):
        meant = os.path.join(os.path.abspath(os.path.expanduser(directory)), name)
        raise InvalidArgumentError(
            f"an endpoint's directory is an absolute path: {_SCHEME}{meant}, perhaps, not {_SCHEME}{directory}/{name}",
            field="endpoint",
        )
    if "*" in directory:
        raise InvalidArgumentError(
            f"an endpoint names one daemon, and knows no wildcards: {_SCHEME}{directory}/{name}", field="endpoint"
        )
    return directory or "/"


def runtime_directory(environ: Mapping[str, str] | None = None) -> str:
    """Where the user's daemons are: $HEAPD_RUNTIME_DIR, else $XDG_RUNTIME_DIR/heapd, else /tmp/heapd-UID."""
    environ = os.environ if environ is None else environ
    return os.path.abspath(environ.get(_DIRECTORY_VARIABLE) or own_directory(environ))


def own_directory(environ: Mapping[str, str]) -> str:
    """Where the user's daemons are if nobody says otherwise."""
    base = environ.get("XDG_RUNTIME_DIR")
    return os.path.join(os.path.abspath(base), "heapd") if base else f"/tmp/heapd-{os.getuid()}"
