"""The tests of killed clients, with a thousand of them."""

from __future__ import annotations

import pytest

import heapd_client as hc
from tests.harness import Daemon
from tests.kill.scene import BACK_S, Scene, kill_many, quantile

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.mark.parametrize("seed", [2, 3])
def test_a_thousand_killed_clients_leave_nothing_but_orphans(daemon: Daemon, session: hc.Session, seed: int) -> None:
    """Every check of the short run; and what they held was back within a quarter of a second, of 99 in 100."""
    with Scene(daemon, session, seed) as scene:
        kill_many(scene, 1000)
        assert quantile(scene.back_s, 0.99) <= BACK_S, sorted(scene.back_s)[-20:]
