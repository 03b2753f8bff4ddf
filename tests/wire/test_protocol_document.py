"""PROTOCOL.md says what the code does: every operation, field, default, record, error and limit."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import heapd.wire
from heapd import errors, records
from heapd.wire import CONTROL_OPS, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, OPS, PROTOCOL_VERSION, Request

DOCUMENT = (Path(heapd.wire.__file__).parent / "PROTOCOL.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCUMENT.splitlines() if line[:2] == "| "]

RECORDS = {
    "grant": records.Grant,
    "heap": records.HeapInfo,
    "session": records.SessionInfo,
    "entry": records.Entry,
    "violation": records.Violation,
    "publication": records.Publication,
    "heap statistics": records.HeapStatistics,
    "arena statistics": records.ArenaStatistics,
}


def row_of(cell: str, column: int = 0) -> list[str]:
    """The table row that has `cell` in a column."""
    (row,) = [row for row in ROWS if row[column] == cell]
    return row


def default_of(field: dataclasses.Field[object]) -> str:
    """How the document writes a field's default, "" for none."""
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()}"
    if field.default is dataclasses.MISSING:
        return ""
    if field.default is None:
        return " = nil"
    return f" = {field.default:,}" if type(field.default) is int else f" = {field.default}".lower()


def field_names(record: type) -> list[str]:
    if dataclasses.is_dataclass(record):
        return [field.name for field in dataclasses.fields(record)]
    return list(record._fields)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [*CONTROL_OPS.values(), *OPS.values()], ids=lambda kind: kind.name)
def test_every_operation_is_documented_with_its_fields(kind: type[Request]) -> None:
    """Number, name, fields in order with their defaults; a question carries its mark."""
    number, _, fields, _ = row_of(f"`{kind.name}`", 1)
    assert number == f"{kind.op}" + "?" * kind.is_idempotent
    without_notes = re.sub(r" \([^)]*\)", "", fields)
    assert without_notes == ", ".join(field.name + default_of(field) for field in dataclasses.fields(kind))


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_is_documented_with_its_fields(name: str) -> None:
    """In the order in which they cross."""
    assert row_of(", ".join(field_names(RECORDS[name])), 1)[0] == name


def test_every_error_is_documented_with_its_code() -> None:
    """And no other."""
    documented = {(row[1], int(row[0])) for row in ROWS if row[1].endswith("Error")}
    leaves = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
    assert documented == {(leaf.__name__, leaf.code) for leaf in leaves if leaf is not errors.HeapdError}


def test_the_limits_are_those_of_the_code() -> None:
    """In the units that the document uses."""
    assert f"# The heapd protocol, version {PROTOCOL_VERSION}" in DOCUMENT
    assert row_of("request frame")[1] == f"{MAX_REQUEST_BYTES:,} bytes"
    assert row_of("answer frame")[1] == f"{MAX_REPLY_BYTES >> 20} MiB"
