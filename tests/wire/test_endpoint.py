"""Endpoints: what the text means, which paths follow from it, and which directories are trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from heapd.errors import InvalidArgumentError, SegmentError
from heapd.wire import Endpoint, check_directory, make_directory, runtime_directory


def test_a_full_endpoint_names_directory_and_name() -> None:
    """What an endpoint says of itself reads back as the same endpoint."""
    endpoint = Endpoint.parse("ipc:///run/me/demo", {})
    assert (endpoint.directory, endpoint.name) == ("/run/me", "demo")
    assert Endpoint.parse(str(endpoint), {}) == endpoint


def test_a_bare_word_is_a_name_in_the_runtime_directory() -> None:
    """So that users rarely write a path."""
    assert str(Endpoint.parse("demo", {"HEAPD_RUNTIME_DIR": "/run/x"})) == "ipc:///run/x/demo"


def test_without_text_the_environment_counts() -> None:
    """$HEAPD_ENDPOINT, else the daemon named default."""
    assert str(Endpoint.parse(None, {"HEAPD_ENDPOINT": "ipc:///run/y/z"})) == "ipc:///run/y/z"
    assert str(Endpoint.parse("", {"HEAPD_RUNTIME_DIR": "/run/x"})) == "ipc:///run/x/default"


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"HEAPD_RUNTIME_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}, "/a"),
        ({"XDG_RUNTIME_DIR": "/b"}, "/b/heapd"),
        ({}, f"/tmp/heapd-{os.getuid()}"),
    ],
)
def test_the_runtime_directory_is_the_first_that_is_told(environ: dict[str, str], directory: str) -> None:
    """heapd's own variable, then the desktop's, then one of the user's own in /tmp."""
    assert runtime_directory(environ) == directory


def test_the_files_of_a_daemon_lie_beside_each_other() -> None:
    """Both sockets and the lock carry the daemon's name."""
    endpoint = Endpoint("/run/x", "demo")
    assert endpoint.control == "ipc:///run/x/demo.control"
    assert endpoint.work == "ipc:///run/x/demo.work"
    assert endpoint.lock_path == "/run/x/demo.lock"


@pytest.mark.parametrize(
    "text", ["a b", "a/b", "../up", "é", "x" * 65, "tcp://127.0.0.1:1", "ipc://", "ipc:///x/", "-\n"]
)
def test_anything_else_is_refused(text: str) -> None:
    """With a text that says what an endpoint is."""
    with pytest.raises(InvalidArgumentError, match="letters"):
        Endpoint.parse(text, {})


def test_a_path_too_long_for_a_socket_is_refused_by_its_size() -> None:
    """The kernel's limit is named, and what to do."""
    with pytest.raises(InvalidArgumentError, match=r"takes? .* bytes .* allows 107; choose a shorter"):
        Endpoint("/" + "d" * 100, "demo")


def test_the_longest_path_is_allowed() -> None:
    """107 bytes with the longest suffix."""
    directory = "/" + "d" * (107 - len("//n.control"))
    assert len(Endpoint(directory, "n").control_path) == 107


def test_the_segment_of_the_users_own_directory_has_a_plain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a hash of the directory tells equal names apart."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/me")
    assert Endpoint("/run/me/heapd", "demo").segment == "heapd-demo"
    elsewhere = {Endpoint(f"/run/{i}", "demo").segment for i in range(10)}
    assert len(elsewhere) == 10
    assert all(len(name) == len("heapd-demo-") + 8 for name in elsewhere)


def test_a_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    """Whatever the umask; making it again is no error."""
    path = tmp_path / "a" / "run"
    before = os.umask(0)
    try:
        make_directory(str(path))
        make_directory(str(path))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    """Others could put a socket there."""
    tmp_path.chmod(0o770)
    with pytest.raises(SegmentError, match="open to others"):
        check_directory(str(tmp_path))


def test_a_symlink_to_a_directory_is_refused(tmp_path: Path) -> None:
    """It may point elsewhere a moment later."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(SegmentError, match="symlink"):
        check_directory(str(tmp_path / "link"))


def test_a_file_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    """It is not removed either."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SegmentError, match="not a directory"):
        make_directory(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner could take away what lies in it."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(SegmentError, match="belongs to user"):
        check_directory(str(tmp_path))


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(SegmentError, match="No such file"):
        check_directory(str(tmp_path / "none"))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file stands in the way of its parent."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SegmentError, match="Not a directory"):
        make_directory(str(tmp_path / "file" / "run"))
