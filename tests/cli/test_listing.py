"""The commands that look: heaps, walk, validate, locks. Their JSON is what scripts build on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from rich.console import Console

import heapd_client as hc
from heapd.cli.tables import opened
from tests.cli.conftest import Heapd
from tests.client.tools import count_requests
from tests.harness import Daemon


def test_heaps_lists_every_heap_with_options_and_statistics(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """A heap is listed with name, id, options as words, and statistics whose parts add up."""
    heap = session.create_heap("frames", maximum=1 << 20, persistent=True)
    heap.alloc(1000)
    session.create_heap(serialize=False)
    frames, anonymous = heapd("heaps", "--json", "-e", daemon.endpoint).json
    assert (frames["name"], frames["heap_id"], frames["maximum"]) == ("frames", heap.id, 1 << 20)
    assert frames["options"] == ["serialized", "persistent"]
    found = frames["statistics"]
    assert (found["busy"], found["busy_blocks"]) == (1000, 1)
    assert found["committed"] == sum(found[part] for part in ("busy", "padding", "cached", "free", "overhead"))
    assert (anonymous["name"], anonymous["options"]) == (None, [])
    heap.destroy()


def test_heaps_of_a_process_starts_with_its_default_heap(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """--pid narrows the list to what one process has open, its default heap first."""
    session.create_heap("other")
    default = session.default_heap
    listed = heapd("heaps", "--pid", os.getpid(), "--json", "-e", daemon.endpoint).json
    assert listed[0]["heap_id"] == default.id
    assert heapd("heaps", "--pid", 2**22 + 1, "--json", "-e", daemon.endpoint).json == []


def test_heaps_as_a_table_names_each_heap(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """The table shows named, anonymous and default heaps; an empty daemon says so."""
    assert heapd("heaps", "-e", daemon.endpoint).out == "no heaps\n"
    session.create_heap("frames")
    session.create_heap()
    assert session.default_heap.id
    out = heapd("heaps", "-e", daemon.endpoint).out
    assert "frames" in out
    assert "(no name)" in out
    assert f"(default of {session.number})" in out


def test_heaps_with_blocks_lists_every_allocated_block(
    heapd: Heapd, daemon: Daemon, session: hc.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heap by heap, address and size of each, and their sum; those of one process with --pid."""
    monkeypatch.setattr("heapd.cli.heaps._LINES_AT_ONCE", 2)
    expected = {}
    for heap, sizes in ((session.default_heap, [10, 20, 300_000]), (session.create_heap("h"), [64] * 5)):
        expected[heap.id] = sorted((block.address, block.size) for block in heap.alloc_many(sizes))
        heap.alloc(64).free()
    found = heapd("heaps", "--pid", os.getpid(), "--blocks", "--json", "-e", daemon.endpoint).json
    listed = {heap["heap_id"]: [(block["address"], block["size"]) for block in heap["blocks"]] for heap in found}
    assert listed == expected
    lines = heapd("heaps", "--blocks", "-e", daemon.endpoint).out.splitlines()
    shown = [line.split() for line in lines if line.startswith("  ") and " 0x" in line]
    assert [(int(address, 16), int(size)) for address, size in shown] == [
        b for found in expected.values() for b in found
    ]
    assert lines[-1] == "  5 blocks, 320 B"
    assert "blocks" not in heapd("heaps", "--json", "-e", daemon.endpoint).json[0]


def test_walk_lists_entries_that_tile_the_region(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """The JSON entries after a region's own follow each other without gap, up to its end."""
    heap = session.create_heap("w")
    heap.alloc_many([64] * 10)
    region, *entries = heapd("walk", "w", "--json", "-e", daemon.endpoint).json
    assert region["kind"] == "region"
    at = region["address"]
    for entry in entries:
        assert entry["address"] == at
        at += entry["extent"]
    assert at == region["address"] + region["extent"]
    assert [entry["kind"] for entry in entries].count("busy") == 10


def test_walk_stops_at_the_limit(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """--limit bounds the entries, over as many pages as the daemon sends."""
    session.create_heap("w").alloc_many([16] * 3000)
    assert len(heapd("walk", "w", "--json", "--limit", 7, "-e", daemon.endpoint).json) == 7
    assert len(heapd("walk", "w", "--json", "--limit", 2500, "-e", daemon.endpoint).json) == 2500
    busy = [e for e in heapd("walk", "w", "--json", "-e", daemon.endpoint).json if e["kind"] == "busy"]
    assert len(busy) == len({entry["address"] for entry in busy}) == 3000


def test_walk_as_text_ends_with_sums(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """The text has one line an entry and the sums of each kind at the end."""
    heap = session.create_heap("w")
    heap.alloc_many([1000] * 5)
    lines = heapd("walk", heap.id, "-e", daemon.endpoint).out.splitlines()
    assert lines[0].split() == ["kind", "address", "size", "extent", "session", "generation"]
    assert sum(line.startswith("busy") for line in lines) == 5
    assert "5 busy, 5 KiB" in lines


def test_a_heap_can_be_looked_at_while_somebody_holds_its_lock(
    heapd: Heapd, daemon: Daemon, session: hc.Session
) -> None:
    """walk, map and locks of a held heap answer at once: that is when one needs them."""
    heap = session.create_heap("held")
    heap.alloc(10)
    with heap.lock():
        assert "1 busy" in heapd("walk", "held", "-e", daemon.endpoint).out
        assert "region 0" in heapd("map", "held", "-e", daemon.endpoint).out
        (lock,) = heapd("locks", "--json", "-e", daemon.endpoint).json
        assert (lock["holder"]["pid"], lock["holder"]["tid"]) == (os.getpid(), threading.get_native_id())
        assert str(os.getpid()) in heapd("locks", "-e", daemon.endpoint).out


def test_a_daemon_that_is_lost_while_one_looks_is_waited_for_once(daemon: Daemon) -> None:
    """The heap is not closed first, which would take as long again."""
    with hc.connect(daemon.endpoint, autostart=False, timeout=0.3) as looking:
        looking.create_heap("x")
        counts = count_requests(looking)
        with suppress(hc.DaemonLostError), opened(looking, "x") as found:
            daemon.kill()
            found.statistics()
    assert counts["heap.statistics"] == 1
    assert counts["heap.close"] == 0


def test_locks_counts_what_waiting_cost(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """A lock nobody holds shows no holder; acquisitions are counted; an unserialized heap is told apart."""
    heap = session.create_heap("a")
    session.create_heap("b", serialize=False)
    for _ in range(3):
        with heap.lock():
            pass
    first, second = heapd("locks", "--json", "-e", daemon.endpoint).json
    assert (first["heap"], first["holder"], first["serialized"], first["contended"]) == ("a", None, True, 0)
    assert first["acquisitions"] >= 3
    assert (second["heap"], second["serialized"], second["acquisitions"]) == ("b", False, 0)


def test_validate_of_a_clean_heap_ends_with_0(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """A clean heap: exit status 0, an empty JSON list, a sentence with the count of blocks."""
    session.create_heap("v").alloc_many([64] * 3)
    assert heapd("validate", "v", "--json", "-e", daemon.endpoint).json == []
    assert heapd("validate", "v", "-e", daemon.endpoint).out == "heap v: no violations, 3 blocks\n"


def test_validate_of_a_scribbled_heap_ends_with_1(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """A state word that a client scribbled over is listed with its address, and the exit status is 1."""
    heap = session.create_heap("v")
    block = heap.alloc(64)
    words = session.arena.words
    before = words[block.slot]
    words[block.slot] = 2**64 - 1
    found = heapd("validate", "v", "--json", "-e", daemon.endpoint, status=1).json
    assert found
    assert set(found[0]) == {"what", "address", "session", "detail"}
    assert f"{len(found)} violations" in heapd("validate", "v", "-e", daemon.endpoint, status=1).out
    words[block.slot] = before


@pytest.mark.parametrize("command", ["walk", "validate", "map"])
def test_an_unknown_heap_is_named_beside_those_that_exist(
    heapd: Heapd, daemon: Daemon, session: hc.Session, command: str
) -> None:
    """One line on stderr that says which heap is missing and which there are."""
    session.create_heap("here")
    answer = heapd(command, "there", "-e", daemon.endpoint, status=1)
    assert answer.err == "heapd: there is no heap 'there' by name or id; heaps here: here\n"


@pytest.mark.parametrize("command", [("heaps",), ("walk", "x"), ("validate", "x"), ("map",), ("locks",)])
@pytest.mark.usefixtures("runtime_dir")
def test_without_a_daemon_the_message_says_how_to_start_one(heapd: Heapd, command: tuple[str, ...]) -> None:
    """Exit status 3 and the command that would start a daemon; none is started by looking."""
    answer = heapd(*command, "-e", "nobody", status=3)
    assert "no daemon answers" in answer.err
    assert "heapd serve" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("heaps", "--pid", "x"),
        ("heaps", "--pid", "0"),
        ("heaps", "--pid", str(2**31)),
        ("walk",),
        ("walk", "x", "--limit", "-1"),
        ("validate",),
    ],
)
def test_a_wrong_command_line_ends_with_2(heapd: Heapd, arguments: tuple[str, ...]) -> None:
    """Click's usage error, not a traceback."""
    assert "Usage:" in heapd(*arguments, status=2).err


def test_looking_imports_neither_numpy_nor_the_server() -> None:
    """The listing commands start fast: nothing of the daemon's own is loaded for them."""

    code = "import sys, heapd.cli.heaps, heapd.cli.walk; print({'numpy', 'heapd.server'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_table_of_heaps_fits_80_columns(
    heapd: Heapd, daemon: Daemon, session: hc.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heap with every option takes one line; the letters of its options are explained below."""
    session.create_heap(
        "frames", maximum=1 << 28, persistent=True, executable=True, generate_exceptions=True, orphans="free"
    ).alloc(1_000_000)  # fmt: skip
    session.create_heap(serialize=False)
    monkeypatch.setattr("heapd.cli.heaps.console", lambda: Console(highlight=False, width=80))
    lines = heapd("heaps", "-e", daemon.endpoint).out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.split()[1:2] and line.split()[1].isdigit()]
    assert [(row[0], row[2], row[4:7]) for row in rows[:1]] == [("frames", "spxeo", ["256", "MiB", "fixed"])]
    assert "p persistent" in lines[-1]
    session.open_heap("frames").destroy()


def test_heaps_without_a_name_have_none_in_json(heapd: Heapd, daemon: Daemon, session: hc.Session) -> None:
    """Scripts get null, the table something to read."""
    session.create_heap()
    assert session.default_heap.id
    for command in ("heaps", "locks"):
        found = heapd(command, "--json", "-e", daemon.endpoint).json
        assert [heap.get("name", heap.get("heap")) for heap in found] == [None, None]
    assert "(no name)" in heapd("locks", "-e", daemon.endpoint).out
