"""`heapd chaos`: a short storm, its figures, and what users do wrong."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Heapd


@pytest.mark.usefixtures("runtime_dir")
def test_a_short_storm_loses_nothing(heapd: Heapd) -> None:
    """Clients and the server are killed under load, with this seed soon; every block is accounted for."""
    answer = heapd("chaos", "--minutes", 0.05, "--clients", 3, "--seed", 17, "--json").json
    assert answer["faults"] == []
    assert answer["is_clean"] is True
    assert answer["client_kills"] > 0
    assert answer["server_kills"] == len(answer["recoveries_s"]) > 0
    assert answer["operations"] > 100
    assert answer["blocks_checked"] > 100
    assert (answer["bytes_lost"], answer["pages_leaked"], answer["seed"]) == (0, 0, 17)


@pytest.mark.usefixtures("runtime_dir")
def test_people_are_told_how_to_repeat_it(heapd: Heapd) -> None:
    """The figures as lines, and the command with the seed that was chosen."""
    out = " ".join(heapd("chaos", "--minutes", 0.01, "--clients", 1).out.split())
    for line in ("kills of the server 0", "bytes lost 0", "pages leaked 0", "recoveries none", "nothing was lost"):
        assert line in out
    assert "heapd chaos --minutes 0.01 --clients 1 --seed " in out


@pytest.mark.parametrize("arguments", [("--clients", "201"), ("--minutes", "0"), ("--seed", "-1")])
def test_figures_out_of_range_are_refused(heapd: Heapd, arguments: tuple[str, ...]) -> None:
    """Status 2 and the allowed range, before anything is started."""
    assert "Invalid value" in heapd("chaos", *arguments, status=2).err


@pytest.mark.nightly
@pytest.mark.usefixtures("runtime_dir")
@pytest.mark.timeout(1500)
def test_a_long_storm_loses_nothing(heapd: Heapd) -> None:
    """Ten minutes of it."""
    answer = heapd("chaos", "--minutes", 10, "--clients", 8, "--json").json
    assert answer["faults"] == [], answer["seed"]
    assert answer["server_kills"] > 100
