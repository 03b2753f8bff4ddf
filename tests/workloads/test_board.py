"""The stress clients' board: rows, guards and mailboxes do not touch each other."""

from __future__ import annotations

import pytest

from heapd.workloads.board import LANES, Board, Phase, Row, board_size, neighbours


def _board(clients: int = 3, heaps: int = 2) -> tuple[Board, memoryview]:
    view = memoryview(bytearray(board_size(clients, heaps)))
    return Board(view, clients, heaps), view


def test_each_word_is_its_own() -> None:
    """Every word of every row and guard can be set without changing another."""
    board, _ = _board()
    for client in range(3):
        for word in Row:
            board.put(client, word, 100 * client + word + 1)
    for heap in range(2):
        for _ in range(heap + 5):
            board.raise_guard(heap)
    assert [[board.get(client, word) for word in Row] for client in range(3)] == [
        [100 * client + word + 1 for word in Row] for client in range(3)
    ]
    assert [board.guard(heap) for heap in range(2)] == [5, 6]
    assert list(board.column(Row.ERRORS)) == [3, 103, 203]


def test_a_letter_arrives_once_and_whole() -> None:
    """Each lane carries its own letter; a taken one is gone, and the lane is free again."""
    board, _ = _board()
    letters = {(sender, lane): bytes([sender, lane]) * 20 + b"!" for sender in range(3) for lane in range(LANES)}
    for (sender, lane), letter in letters.items():
        assert board.is_empty(sender, lane)
        board.send(sender, lane, letter)
        assert not board.is_empty(sender, lane)
    for (sender, lane), letter in letters.items():
        assert board.receive(sender, lane) == letter
        assert board.receive(sender, lane) is None
        assert board.is_empty(sender, lane)


def test_half_a_letter_is_not_believed() -> None:
    """A letter whose bytes are not all there yet is left where it is until they are."""
    board, view = _board()
    board.send(1, 0, b"x" * 41)
    place = bytes(view).index(b"x" * 41)
    view[place] = 0
    assert board.receive(1, 0) is None
    view[place] = ord("x")
    assert board.receive(1, 0) == b"x" * 41


def test_the_phase_of_all_is_the_slowest() -> None:
    """All have reached a phase when the last one has."""
    board, _ = _board()
    for client in range(3):
        board.put(client, Row.PHASE, Phase.RUNNING)
    board.put(2, Row.PHASE, Phase.READY)
    assert not board.all_reached(Phase.RUNNING)
    assert board.all_reached(Phase.RUNNING, [0, 1])
    board.put(2, Row.PHASE, Phase.ENDED)
    assert board.all_reached(Phase.RUNNING)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 6, 7, 50, 500])
def test_neighbours_are_others_and_each_once(clients: int) -> None:
    """No client hands blocks to itself, none twice to one; every client has as many senders as receivers."""
    incoming = [0] * clients
    for client in range(clients):
        found = neighbours(client, clients)
        assert client not in found
        assert len(set(found)) == len(found) <= LANES
        for receiver in found:
            incoming[receiver] += 1
    assert set(incoming) == {len(neighbours(0, clients))}
    assert incoming[0] > 0 or clients == 1
