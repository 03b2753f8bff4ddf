"""The examples of scripts/examples do what they say, tell it, and leave nothing behind (tests/conftest.py looks)."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import heapd_client as hc
from tests.harness import Daemon

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path for path in (ROOT / "scripts" / "examples").glob("*.py") if path.name[0] != "_")


def run(name: str, *options: str, status: int = 0) -> str:
    """What an example prints, run as its reader would run it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    command = [sys.executable, str(ROOT / "scripts" / "examples" / f"{name}.py"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def numbers(pattern: str, text: str) -> list[int]:
    """What the groups of the one match of `pattern` say."""
    match = re.search(pattern, text)
    assert match is not None, text
    return [int(group) for group in match.groups()]


def test_each_example_explains_itself() -> None:
    """Its first line is a sentence, for the list; its command says with --help what it does."""
    for path in EXAMPLES:
        text = path.read_text()
        assert re.match(r'""".{20,116}[.]\n', text), path
        assert re.search(r'\n@(example|click.command.*)\n(@.*\n)*def main\(.*\n    """[^"]{20,}[.]"""\n', text), path
    assert "Grow a binary search tree" in run("search_tree", "--help")


def test_the_script_lists_the_examples() -> None:
    """Without a name, or with a wrong one: usage and every example's first line."""
    for arguments in ([], ["nonsense"], ["_stage"]):
        done = subprocess.run([ROOT / "scripts" / "example", *arguments], capture_output=True, text=True, timeout=20)
        assert done.returncode == 2
        assert all(f"  {path.stem} " in done.stderr for path in EXAMPLES)


def test_a_missing_daemon_is_one_line() -> None:
    """An endpoint at which nobody answers."""
    assert run("counted_class", "-e", "ipc:///tmp/heapd-nowhere/x", status=1).count("\n") == 1


def test_a_linked_list_is_read_and_changed_by_another_process() -> None:
    """It reads all nodes, frees every second one, and the first process sees that."""
    text = run("linked_list", "--nodes", "11")
    pids = re.findall(r"process (\d+): 11 nodes, sum 55: 0 at 0x", text)
    assert len(set(pids)) == 2
    assert numbers(r"process (\d+): 6 nodes, sum 30: 0 at", text) == [int(pids[0])]
    assert "6 blocks are allocated; 0 invariants are broken" in text
    assert "refused: the Node at 0x" in text


def test_a_search_tree_is_read_while_it_grows() -> None:
    """The reader sees it sorted at all sizes it passes through."""
    text = run("search_tree", "--nodes", "300")
    (walks,) = numbers(r"it saw the tree (\d+) times, always sorted", text)
    assert walks > 0
    assert "key 150 lies at 0x" in text
    assert "no such key: None" in text
    assert "300 nodes of 24 bytes" in text


def test_a_counted_class_has_a_heap_while_it_has_instances() -> None:
    """Each class its own, none without instances."""
    lines = run("counted_class").splitlines()
    heaps = [line.split()[-2] for line in lines if line.endswith(" heaps")]
    assert heaps == ["0", "1", "2", "1", "0", "0"]
    places = [set(re.findall(r"0x\w+", line)) for line in lines if line.startswith("  the ")]
    assert [len(found) for found in places] == [4, 2]


def test_components_in_heaps_of_their_own_are_protected() -> None:
    """In one heap both are damaged and the heap is broken; apart, the sound one and its heap are whole."""
    together, apart = run("protected_components").split("each in a heap")
    assert numbers(r"sound component +(\d+) of 500", together)[0] < 500
    assert numbers(r"their heap +(\d+) violations", together)[0] > 0
    assert numbers(r"faulty component +(\d+) of 500", apart)[0] < 500
    assert [int(found) for found in re.findall(r"its heap +(\d+) violations", apart)][1:] == [0]
    assert numbers(r"sound component +(\d+) of 500", apart) == [500]
    assert "goes on: 501 entries" in apart


def test_a_heap_frees_a_structure_at_once() -> None:
    """Faster than node by node, with figures; what was in it is refused."""
    text = run("free_at_once", "--depth", "10")
    assert "two trees of 1023 nodes" in text
    assert numbers(r"heap destroyed: .* ms, (\d+) times as fast", text)[0] >= 2
    assert "refused: the heap" in text


def test_nodes_in_a_heap_of_their_own_lie_in_fewer_pages() -> None:
    """1 of 8 blocks: about an eighth of the pages, by their addresses and by the kernel's count."""
    text = run("locality", "--nodes", "800")
    (mixed, own) = (int(found) for found in re.findall(r"nodes lie in +(\d+) pages", text))
    assert own * 6 < mixed
    touched = [int(found) for found in re.findall(r"touches (\d+) pages", text)]
    if touched:  # a kernel may not tell
        assert touched[0] <= mixed + 12
        assert touched[1] * 3 < touched[0]


def test_reserve_and_commit_are_drawn_page_by_page() -> None:
    """48 pages in each picture; what the kernel gave is what is drawn as committed."""
    rows = re.findall(r"^(.{28}) ([-.os#]{48}) +(\d+) KiB$", run("reserve_commit"), re.MULTILINE)
    pictures = {step.strip(): picture for step, picture, _ in rows}
    assert len(rows) == 11
    assert pictures["create: reserve 48, commit 4"] == "oooo" + "." * 44
    assert pictures["trim"].count("o") == 12
    assert set(pictures["destroy: released"]) == {"-"}
    for step, picture, size in rows:
        assert int(size) == 4 * sum(page in "os#" for page in picture), step


def test_code_runs_in_an_executable_heap_alone() -> None:
    """42 from one, SIGSEGV from the other; both heaps stay sound."""
    if platform.machine() != "x86_64":
        pytest.skip("the machine code of the example is x86-64's")
    good, bad = run("executable_heap").split("executable=False")
    assert "twice 21 is 42" in good
    assert "ended with 0" in good
    assert "twice" not in bad
    assert "ended with SIGSEGV" in bad
    assert (good + bad).count("broken invariants of the heap: 0") == 2


def test_the_heaps_of_this_process_are_enumerated() -> None:
    """The process heap and another one, every block with its size."""
    first, second = run("enumerate_heaps").split("\nheap ")[1:]
    assert "the process heap" in first
    for heap, sizes in ((first, [10, 100, 1000]), (second, [5000, 2_000_000])):
        assert [int(found) for found in re.findall(r"0x\w+ +(\d+) bytes$", heap, re.MULTILINE)] == sizes
        assert f"{len(sizes)} blocks allocated, {sum(sizes)} bytes" in heap


def test_the_heaps_of_another_process_are_enumerated(daemon: Daemon, session: hc.Session) -> None:
    """By its pid: all its heaps, all its blocks; a process that is no client, or none, is one line."""
    blocks = [*session.default_heap.alloc_many(48, 30), session.create_heap("named").alloc(70_000)]
    text = run("enumerate_heaps", str(os.getpid()), "-e", daemon.endpoint)
    found = re.findall(r"(0x\w+) +(\d+) bytes$", text, re.MULTILINE)
    assert sorted((int(address, 16), int(size)) for address, size in found) == sorted(
        (block.address, block.size) for block in blocks
    )
    assert text.count("\nheap ") == 2
    missing = 2**22 + 1
    assert (
        run("enumerate_heaps", "1", "-e", daemon.endpoint, status=1) == "Error: process 1 is no client of the daemon\n"
    )
    assert run("enumerate_heaps", str(missing), "-e", daemon.endpoint, status=1) == f"Error: no process {missing}\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_example_that_is_interrupted_leaves_nothing(number: int, status: int) -> None:
    """Neither its daemon nor its other process; and no traceback."""
    command = [sys.executable, "-u", str(ROOT / "scripts" / "examples" / "search_tree.py"), "--nodes", "200000"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert "walks the tree" in process.stdout.readline()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, complaints = process.communicate(timeout=30)
    assert process.returncode == status
    assert complaints.strip() in ("", "Aborted!")
