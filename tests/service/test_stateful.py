"""The service against a model of plain dicts, whatever clients do: a short run of what nightly tests do for long."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.service.machine import ServiceMachine

SHORT = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_a_thousand_operations_leave_everything_as_the_model_has_it() -> None:
    """Sessions, heaps, blocks, names, waits, jobs; and between them deaths, restarts, full memory, misuse, garbage."""
    before = ServiceMachine.operations
    run_state_machine_as_test(ServiceMachine, settings=SHORT)
    assert ServiceMachine.operations - before > 1000
