"""Running the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from click.testing import CliRunner

from heapd.cli import main


@dataclass(frozen=True)
class Answer:
    """What a command did: status, out and err as text."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Heapd = Callable[..., Answer]


@pytest.fixture
def heapd() -> Heapd:
    """`heapd("heaps", "--json", status=0)`: run a command and check its exit status; no command shows a traceback."""

    def run(*arguments: object, status: int = 0) -> Answer:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        answer = Answer(result.exit_code, result.stdout, result.stderr)
        assert answer.status == status, answer
        assert "Traceback" not in answer.out + answer.err
        return answer

    return run
