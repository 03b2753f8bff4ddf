"""docs/win32.md says of every fact how it is kept, and what it says is so."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from heapd_client import win32
from tests.win32.facts import all_facts

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "win32.md").read_text()
ROWS = {
    cells[0]: (cells[1], cells[2])
    for line in DOCUMENT.splitlines()
    if re.match(r"\| [A-Z][A-Z-]*-\d\d \|", line)
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
GRADES = dict(
    line.split()
    for line in (Path(__file__).parent / "facts.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
CHECKS = {id_: [fact for fact in all_facts() if id_ in fact.ids] for id_ in GRADES}


def test_every_fact_has_one_row() -> None:
    """The list of facts and the table name the same ones, each once."""
    named = Counter(re.findall(r"^\| ([A-Z][A-Z-]*-\d\d) \|", DOCUMENT, re.MULTILINE))
    assert named == Counter(GRADES.keys())
    assert len(GRADES) == 329
    assert set(GRADES.values()) == set("=~x-")


def test_what_a_program_may_rely_on_is_held() -> None:
    """A fact graded = is neither an own number nor out of scope."""
    assert [id_ for id_, grade in GRADES.items() if grade == "=" and ROWS[id_][0] != "held"] == []


def test_what_is_held_is_checked() -> None:
    """By checks whose names the row tells, or by a file that quotes the id."""
    for id_, (status, text) in ROWS.items():
        if status == "held":
            files = re.findall(r"`(tests/[\w/]+\.py)`", text)
            for file in files:
                assert re.search(rf"\b{id_}\b", (ROOT / file).read_text()), id_
            assert files or CHECKS[id_], id_
            assert all(fact.name.replace("_", " ") in text for fact in CHECKS[id_]), id_


def test_what_is_not_held_has_a_reason() -> None:
    """A row that is no check's says something."""
    for id_, (status, text) in ROWS.items():
        assert status in ("held", "own", "n/a"), id_
        assert len(text) >= 6, id_


def test_every_check_is_of_a_fact() -> None:
    """No check quotes an id that there is not."""
    assert {id_ for fact in all_facts() for id_ in fact.ids} <= GRADES.keys()


def test_every_function_is_named() -> None:
    """Those of Windows are listed, all and no other."""
    listed = set(
        re.findall(r"\b\w+", DOCUMENT.split("and, because")[0].split("errors, over the heaps of a daemon:")[1])
    )
    functions = {name for name in win32.__all__ if name[0].isupper() and callable(getattr(win32, name))}
    classes = {name for name in functions if isinstance(getattr(win32, name), type)}
    assert listed == functions - classes
