"""Endpoints: what the text means, and which paths follow from it."""

from __future__ import annotations

import os

import pytest

from heapd.errors import InvalidArgumentError
from heapd.wire import Endpoint, runtime_directory


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


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_name_of_dots_is_refused(name: str) -> None:
    """Its log would be `..log`, and its directory's own name."""
    for make in (lambda: Endpoint("/run/x", name), lambda: Endpoint.parse(name, {})):
        with pytest.raises(InvalidArgumentError, match="more than dots"):
            make()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ipc://run/demo", f"ipc://{os.getcwd()}/run/demo, perhaps"),
        ("ipc://./demo", f"ipc://{os.getcwd()}/demo, perhaps"),
        ("ipc://~/run/demo", f"ipc://{os.path.expanduser('~')}/run/demo, perhaps"),
    ],
)
def test_a_relative_directory_is_refused(text: str, meant: str) -> None:
    """It would be another daemon in each directory; the text says how to write what was meant."""
    with pytest.raises(InvalidArgumentError) as caught:
        Endpoint.parse(text, {})
    assert meant in str(caught.value)


def test_a_wildcard_is_refused() -> None:
    """ZeroMQ knows them; here it would be a directory named so."""
    with pytest.raises(InvalidArgumentError, match="no wildcards"):
        Endpoint.parse("ipc:///tmp/*/demo", {})


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
