"""`heapd map`: the picture in the terminal and as SVG."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import heapd_client as hc
from tests.cli.conftest import Heapd
from tests.harness import Daemon

_SVG = "{http://www.w3.org/2000/svg}"


def test_map_of_a_heap_draws_its_regions_with_a_legend(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """Title, scale, a heading a region, glyphs, sums that are the heap's, a legend."""
    heap = session.create_heap("m")
    heap.alloc(300_000)
    out = heapd("map", "m", "-e", daemon.endpoint).out
    assert out.startswith(f"Heap m of {daemon.endpoint}")
    assert "one character is" in out
    assert "region 0 at 0x" in out
    assert "█" in out
    assert "busy 296 KiB" in out
    assert "· reserved" in out


def test_map_of_the_arena_shows_each_heap(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """Every heap's pages are drawn under its name; pages of no heap are only counted."""
    session.create_heap("one").alloc(100)
    session.create_heap("two").alloc(200_000)
    out = heapd("map", "-e", daemon.endpoint).out
    assert "heap one at 0x" in out
    assert "heap two at 0x" in out
    assert "of no heap" in out


def test_map_of_an_empty_arena_says_so(heapd: Heapd, daemon: Daemon) -> None:
    """Nothing reserved: no picture, no division by nothing."""
    assert "nothing is reserved" in heapd("map", "-e", daemon.endpoint).out


def test_looking_at_a_map_commits_nothing(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """The picture is drawn from tables that are committed: reading others would commit them."""
    session.create_heap("one").alloc(100)
    heapd("map", "-e", daemon.endpoint)
    segment = Path("/dev/shm") / session.arena.name
    before = segment.stat().st_blocks
    heapd("map", "-e", daemon.endpoint)
    heapd("map", "one", "-e", daemon.endpoint)
    assert segment.stat().st_blocks == before


def test_map_as_svg_has_title_legend_and_axis(
    heapd: Heapd, daemon: Daemon, session: hc.Session, tmp_path: Path
) -> None:
    """A well-formed file with title, legend, axis labels and shapes; names are escaped."""
    session.create_heap("a<b>&c").alloc(5000)
    for arguments in (("a<b>&c",), ()):
        file = tmp_path / "map.svg"
        assert heapd("map", *arguments, "--svg", file, "-e", daemon.endpoint).out == f"wrote {file}\n"
        root = ElementTree.parse(file).getroot()
        texts = [element.text or "" for element in root.iter(f"{_SVG}text")]
        assert any("a<b>&c" in text for text in texts)
        for expected in ("row begins at", "into the row", "committed, free", "reserved"):
            assert any(expected in text for text in texts), expected
        assert len(list(root.iter(f"{_SVG}rect"))) > 7


def test_an_svg_that_cannot_be_written_is_a_clear_error(heapd: Heapd, daemon: Daemon) -> None:
    """The path and the system's reason, no traceback."""
    answer = heapd("map", "--svg", "/nonexistent/m.svg", "-e", daemon.endpoint, status=1)
    assert "/nonexistent/m.svg" in answer.err
    assert "No such file" in answer.err
