"""A stress client that may be killed at any instant: the process started in its place takes over what it held."""

from __future__ import annotations

import sys

import heapd_client as hc
from heapd.errors import HeapdError
from heapd.workloads.board import Row
from heapd.workloads.checked import CheckError, check
from heapd.workloads.estate import Asset, Estate, estate_name
from heapd.workloads.stress_client import Held, Plan, StressClient, run_client

__all__ = ["ChaosClient", "run_chaos_client"]

_SEQUENCES_A_LIFE = 1 << 32


class ChaosClient(StressClient):
    """A client with an estate; see there."""

    def __init__(self, plan: Plan, number: int, session: hc.Session, control: hc.Heap) -> None:
        super().__init__(plan, number, session, control)
        life = self._board.get(number, Row.LIVES)
        self._board.add(number, Row.LIVES)
        self._random.seed(f"{plan.seed}/{number}/{life}")
        self._sequence = life * _SEQUENCES_A_LIFE
        self._estate = Estate(control.lookup(estate_name(number)).view, plan.heaps)
        self._places: dict[Held, int] = {}
        for place, asset in list(self._estate.assets()):
            self._inherit(place, asset)

    def _inherit(self, place: int, asset: Asset) -> None:
        """Take over a block of the process before: it must be there, and as it was."""
        self._board.add(self.number, Row.CHECKED)
        try:
            block = self._session.block_at(asset.address)
            check(block.view, asset.stamp)
        except (HeapdError, CheckError) as error:
            self._board.add(self.number, Row.LOST, asset.length)
            self._estate.strike(place)
            self._fail(f"a block of the process killed before: {type(error).__name__}: {error}")
            return
        held = Held(block, asset.stamp, asset.heap)
        self._places[held] = place
        self._held.append(held)
        self._bytes += block.size

    def _settle(self, held: Held) -> None:
        asset = Asset(held.heap, held.block.address, held.stamp, held.block.size)
        self._places[held] = self._estate.enter(asset)

    def _unsettle(self, held: Held) -> None:
        place = self._places.pop(held, None)
        if place is not None:
            self._estate.strike(place)

    def _receive(self) -> None:
        if not self._estate.is_full:
            super()._receive()

    def _raise_guard(self, heap: int) -> None:
        super()._raise_guard(heap)
        self._estate.count_guard(heap)

    def _fail(self, text: str) -> None:
        super()._fail(text)
        print(self.report.errors[-1], file=sys.stderr, flush=True)  # a report goes with its process


def run_chaos_client(plan: Plan, number: int) -> int:
    """All that a client process does. Returns: its exit code; why it is not 0 stands on stderr."""
    return run_client(plan, number, ChaosClient)
