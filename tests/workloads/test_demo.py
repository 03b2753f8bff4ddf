"""The demo's comparison: a difference is found and said."""

from __future__ import annotations

from pathlib import Path

import pytest

import heapd_client as hc
from heapd.workloads import WorkloadError, jobs
from heapd.workloads.corpus import Corpus, Finding, scan
from heapd.workloads.demo import first_difference, run_demo


def _finding(lines: int) -> Finding:
    return Finding(lines, 2, bytes(32))


def test_equal_findings_have_no_difference() -> None:
    """Nothing to say."""
    corpus = Corpus(Path("/"), ["/a", "/b"], [1, 2], 0)
    findings = {0: _finding(1), 1: _finding(2)}
    assert first_difference(corpus, findings, dict(findings), "x") is None


def test_the_first_difference_names_file_and_both_findings() -> None:
    """The file, what each way found, also when one found nothing."""
    corpus = Corpus(Path("/"), ["/a", "/b"], [1, 2], 0)
    expected = {0: _finding(1), 1: _finding(2)}
    text = first_difference(corpus, expected, {0: _finding(1), 1: _finding(3)}, "queue")
    assert text is not None
    assert text.startswith("/b: one process found 2 lines, 2 words")
    assert "queue: 3 lines" in text
    assert "found nothing" not in text
    assert "shared heap: nothing" in str(first_difference(corpus, expected, {1: _finding(2)}, "shared heap"))


def test_every_file_is_a_block_and_every_block_is_accounted_for(tmp_path: Path) -> None:
    """A block a file, one a list, one a result, one for the cursor; the picture's sums are the statistics'."""
    for number in range(70):
        (tmp_path / f"{number:02}").write_bytes(b"line of words\n" * number)
    corpus = scan(tmp_path, sources_only=False)
    outcome = run_demo(corpus, 2, 1, lambda way: lambda count: None)
    assert outcome.difference is None
    lists = 2 + 2  # 64 files and 6, and an end mark for each worker
    assert outcome.runs[2].blocks == 70 + lists + 2 + 1
    heap = outcome.snapshot.heap
    totals = outcome.snapshot.picture.totals()
    assert sum(totals) == heap.reserved
    assert sum(totals[1:]) == heap.committed


def test_a_file_that_grows_or_shrinks_meanwhile_is_read_whole(tmp_path: Path, session: hc.Session) -> None:
    """The block follows the file, not the size that was seen before."""
    file = tmp_path / "f"
    heap = session.create_heap()
    for size, now in ((10, 5000), (5000, 10), (0, 3), (3, 0), (100, 100)):
        file.write_bytes(b"x" * now)
        block, length = jobs._load_file(heap.alloc(size), str(file))
        assert length == now
        assert bytes(block.view[:length]) == b"x" * now


def test_a_file_that_vanishes_is_an_error_that_names_it(tmp_path: Path) -> None:
    """The reader says which; no process and no segment is left (leakcheck)."""
    file = tmp_path / "f"
    file.write_text("x")
    corpus = scan(tmp_path, sources_only=False)
    file.unlink()
    with pytest.raises(WorkloadError, match=str(file)):
        run_demo(corpus, 1, 1, lambda way: lambda count: None)
