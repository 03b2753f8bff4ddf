"""Which directories are trusted, whom they are open to, and which files belong to a daemon there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from heapd.errors import SegmentError
from heapd.wire import Access, check_directory, make_directory
from tests.server.strangers import GROUP, NOBODY, needs_root, run_as


def test_a_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    """Whatever the umask; making it again is no error."""
    path = tmp_path / "run"
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


@pytest.mark.parametrize("path", ["a/run", "a/b/c/run"])
def test_only_the_last_directory_of_a_path_is_made(tmp_path: Path, path: str) -> None:
    """A mistyped path leaves nothing behind; the first directory that is missing is named."""
    with pytest.raises(SegmentError, match=f"{tmp_path}/a does not exist"):
        make_directory(str(tmp_path / path))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file stands in the way of its parent."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SegmentError, match="Not a directory"):
        make_directory(str(tmp_path / "file" / "run"))


# -- groups --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "is_open"),
    [(0o700, False), (0o750, True), (0o710, None), (0o770, None), (0o755, None), (0o705, None), (0o740, None)],
    ids=lambda value: f"{value:o}" if type(value) is int else None,
)
def test_a_directory_is_private_or_open_to_its_group_or_refused(
    tmp_path: Path, mode: int, is_open: bool | None
) -> None:
    """Nothing between: each permission that is not one of the two is a mistake."""
    tmp_path.chmod(mode)
    if is_open is None:
        with pytest.raises(SegmentError, match=rf"mode {mode:04o}.*chmod 700"):
            check_directory(str(tmp_path))
    else:
        found = check_directory(str(tmp_path))
        assert found == Access(os.getuid(), tmp_path.stat().st_gid if is_open else None)


@needs_root
def test_a_directory_is_opened_to_one_group(common_place: Path) -> None:
    """Opening it again is no error; to a second group it is one."""
    path = common_place / "run"
    for _ in range(2):
        assert make_directory(str(path), GROUP) == Access(0, GROUP)
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (GROUP, 0o750)
    with pytest.raises(SegmentError, match=rf"open to group {GROUP} already"):
        make_directory(str(path), GROUP + 1)
    assert path.stat().st_gid == GROUP


@needs_root
def test_a_directory_that_a_group_could_not_reach_is_not_opened(tmp_path: Path) -> None:
    """Its parent is somebody's alone, as /run/user/UID is; the error names it."""
    tmp_path.chmod(0o700)
    with pytest.raises(SegmentError, match=rf"{tmp_path} is its owner's alone; choose another"):
        make_directory(str(tmp_path / "run"), GROUP)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700


@needs_root
def test_only_a_member_opens_a_directory_to_a_group(common_place: Path) -> None:
    """Giving it to a group that one is not in is the system's to refuse."""
    common_place.chmod(0o777)
    body = """
    from heapd.wire import make_directory
    attempt(lambda: make_directory(sys.argv[1], int(sys.argv[2])).gid)
    """
    answers = [
        run_as(NOBODY, body, str(common_place / f"run{count}"), str(GROUP), groups=groups)
        for count, groups in enumerate(([], [GROUP]))
    ]
    assert "be a member of it" in answers[0][0]
    assert answers[1] == [f"did {GROUP}"]


@needs_root
def test_another_users_directory_is_trusted_only_through_a_group_of_ours(common_place: Path) -> None:
    """And never where this user's own would be: in /tmp anybody could have made that first."""
    theirs = common_place / "heapd"
    theirs.mkdir(mode=0o750)
    os.chown(theirs, -1, GROUP)
    body = """
    from heapd.wire import check_directory
    os.environ["XDG_RUNTIME_DIR"] = sys.argv[2]
    attempt(lambda: check_directory(sys.argv[1]).gid)
    """
    told = [
        run_as(NOBODY, body, str(theirs), own, groups=groups)[0]
        for groups, own in (([GROUP], "/run/user/65534"), ([], "/run/user/65534"), ([GROUP], str(common_place)))
    ]
    assert told[0] == f"did {GROUP}"
    assert "belongs to user 0" in told[1]
    assert "belongs to user 0" in told[2]


@pytest.mark.parametrize(
    ("mode", "admitted"), [(0o600, "both"), (0o660, "group"), (0o640, "group"), (0o666, "none"), (0o604, "none")]
)
def test_a_file_is_the_daemons_if_nobody_beside_the_group_can_open_it(tmp_path: Path, mode: int, admitted: str) -> None:
    """Of its user, and without permissions for others; with the group's only where that group is meant."""
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    status = path.stat()
    assert Access(status.st_uid).admits(status) == (admitted == "both")
    assert Access(status.st_uid, status.st_gid).admits(status) == (admitted in ("both", "group"))
    assert not Access(status.st_uid, status.st_gid + 1).admits(status) or admitted == "both"
    assert not Access(status.st_uid + 1, status.st_gid).admits(status)
