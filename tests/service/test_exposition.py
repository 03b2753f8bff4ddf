"""Prometheus text: parsed by Prometheus' own parser, base units, every figure of the status, no label that grows."""

from __future__ import annotations

import builtins
import re
from typing import Any

import pytest

from heapd.errors import MissingExtraError
from heapd.service import Histogram, expose
from heapd.service.exposition import _COUNTERS, _GAUGES

parser = pytest.importorskip("prometheus_client.parser", reason="needs the extra heapd[metrics]")


@pytest.fixture
def status() -> dict[str, Any]:
    """A status with a different figure under every key."""
    histogram = Histogram()
    for duration_ns in (3_000, 5_000, 5_000, 2_000_000, 5_000_000_000):
        histogram.record(duration_ns)
    figures = {key: 1000 + index for index, key in enumerate([*_GAUGES, *_COUNTERS])}
    return {
        "name": 'a"b\\c', "version": "1.2", "python": "3.11", "pid": 4242, **figures, "requests": histogram.count,
        "rpc_total_s": histogram.total_ns / 1e9, "rpc_doublings": histogram.doublings(),
    }  # fmt: skip


def families(text: bytes) -> dict[str, Any]:
    return {family.name: family for family in parser.text_string_to_metric_families(text.decode())}


def test_every_figure_comes_out_as_it_went_in(status: dict[str, Any]) -> None:
    """As a gauge, or as a counter that ends with _total."""
    found = families(expose(status))
    for key, (name, text) in _GAUGES.items():
        [sample] = found[name].samples
        assert (found[name].type, found[name].documentation) == ("gauge", text)
        assert (sample.name, sample.value) == (name, status[key])
    for key, (name, _) in _COUNTERS.items():
        [sample] = found[name].samples
        assert (found[name].type, sample.name, sample.value) == ("counter", f"{name}_total", status[key])


def test_durations_are_a_histogram_in_seconds(status: dict[str, Any]) -> None:
    """Cumulative buckets, ending with all; sum and count beside them."""
    samples = families(expose(status))["heapd_request_duration_seconds"].samples
    buckets = [(float(s.labels["le"]), s.value) for s in samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert buckets[0] == (4096e-9, 1)
    assert dict(buckets)[8192e-9] == 3
    assert buckets[-1] == (float("inf"), 5)
    assert buckets[-2] == (pytest.approx(1.073741824), 4)
    totals = {s.name.rpartition("_")[2]: s.value for s in samples if not s.name.endswith("_bucket")}
    assert totals == {"sum": pytest.approx(5.002013), "count": 5}


def test_labels_do_not_grow_and_name_no_process(status: dict[str, Any]) -> None:
    """Only which daemon this is, and the bounds of buckets: a process id would make a new series with each restart."""
    text = expose(status)
    labels = {label for family in families(text).values() for sample in family.samples for label in sample.labels}
    assert labels == {"name", "version", "python", "le"}
    assert b"4242" not in text
    [about] = families(text)["heapd_info"].samples
    assert about.labels["name"] == 'a"b\\c'


def test_units_are_base_units(status: dict[str, Any]) -> None:
    """Seconds and bytes, said in the name."""
    for name in families(expose(status)):
        assert not re.search(r"_(ms|us|ns|kib|mib|millis\w*|micros\w*|percent)(_|$)", name)


def test_an_older_daemons_status_is_no_error() -> None:
    """What it does not say is left out."""
    assert set(families(expose({"name": "x", "sessions": 3}))) == {"heapd_info", "heapd_sessions"}


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command."""
    load = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'heapd\[metrics\]'"):
        expose({})
