"""The documents in docs/ say what is there: every metric and log field, every permission."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from heapd.service.exposition import _COUNTERS, _GAUGES

DOCS = Path(__file__).parent.parent / "docs"
MONITORING = (DOCS / "monitoring.md").read_text()


@pytest.mark.parametrize(
    "name", [*(name for name, _ in _GAUGES.values()), *(f"{n}_total" for n, _ in _COUNTERS.values())]
)
def test_every_metric_is_documented(name: str) -> None:
    """By the name that a scrape shows."""
    assert f"`{name}`" in MONITORING


def test_no_other_metric_is_documented() -> None:
    """A name in the table or in an alert is one that exists."""
    known = {name for name, _ in _GAUGES.values()} | {f"{name}_total" for name, _ in _COUNTERS.values()}
    known |= {"heapd_info", "heapd_request_duration_seconds", "heapd_request_duration_seconds_bucket"}
    assert set(re.findall(r"\bheapd_\w+", MONITORING)) <= known
