"""Where CPython 3.12 and 3.13 let an interrupt out of a `try` or `with` that it happened in.

A loop in it whose body ends with an `if`, or a comprehension with an `if`, has a jump back that no handler covers; and
that is where the interpreter looks for signals. What must be undone then is done in a function that the loop calls.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

import heapd_client

_FOLDER = Path(heapd_client.__file__).parent
_HARMLESS = {
    "Connection._ask_again",  # the rest is asked again by the next call
    "stop_daemon",  # it only suppresses errors, as do the next ones
    "Session.close",
    "AllocatingHeap._alloc",  # of what is suppressed: not where a block is held
    "OpenHeap.alloc",  # jumps back without a block only
}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _gaps(code: CodeType) -> bool:
    """Whether a jump back into what a handler covers is not covered itself."""
    handlers = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    instructions = {one.offset: one for one in dis.get_instructions(code)}

    def covering(offset: int) -> set[int]:
        return {one.target for one in handlers if one.start <= offset < one.end}

    def leads_out(target: int) -> bool:
        """A handler that is a `try`'s or `with`'s, or one of an inlined comprehension that such a one covers."""
        return instructions[target].opname == "PUSH_EXC_INFO" or any(map(leads_out, covering(target)))

    return any(
        leads_out(target)
        for one in instructions.values()
        if one.opname == "JUMP_BACKWARD"
        for target in covering(one.argval) - covering(one.offset)
    )


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no such gaps")
def test_no_interrupt_escapes_a_handler_that_undoes_something() -> None:
    """But where that is known to be harmless."""
    found = {
        code.co_qualname
        for path in _FOLDER.rglob("*.py")
        for code in _codes(compile(path.read_text(), str(path), "exec"))
        if _gaps(code)
    }
    assert found - _HARMLESS == set()
