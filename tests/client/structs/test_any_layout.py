"""Whatever is declared, ctypes agrees: where each field lies, and what its bytes mean."""

from __future__ import annotations

import ctypes
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import heapd_client as hc
from heapd_client.structs import Record, Text

NUMBERS = [
    ctypes.c_bool, ctypes.c_byte, ctypes.c_ubyte, ctypes.c_short, ctypes.c_ushort, ctypes.c_int, ctypes.c_uint,
    ctypes.c_long, ctypes.c_ulong, ctypes.c_longlong, ctypes.c_ulonglong, ctypes.c_size_t, ctypes.c_float,
    ctypes.c_double,
]  # fmt: skip


def values_of(ctype: Any) -> st.SearchStrategy[Any]:
    """Values that a number of that type holds exactly."""
    if ctype is ctypes.c_bool:
        return st.booleans()
    if ctype in (ctypes.c_float, ctypes.c_double):
        return st.floats(width=8 * ctypes.sizeof(ctype), allow_nan=False)
    bits = 8 * ctypes.sizeof(ctype)
    return (
        st.integers(-(1 << bits - 1), (1 << bits - 1) - 1) if ctype(-1).value < 0 else st.integers(0, (1 << bits) - 1)
    )


@st.composite
def fields(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """(what a record declares, what ctypes declares, a value) of one field."""
    kind = draw(st.sampled_from(["number", "array", "bytes", "text"]))
    if kind == "number":
        ctype = draw(st.sampled_from(NUMBERS))
        return ctype, ctype, draw(values_of(ctype))
    count = draw(st.integers(1, 9))
    if kind == "array":
        ctype = draw(st.sampled_from(NUMBERS))
        return ctype * count, ctype * count, draw(st.lists(values_of(ctype), min_size=count, max_size=count))
    data = draw(st.binary(max_size=count).filter(lambda data: 0 not in data))
    if kind == "bytes":
        return ctypes.c_char * count, ctypes.c_char * count, data
    text = draw(st.text(max_size=count).filter(lambda text: "\0" not in text and len(text.encode()) <= count))
    return Text(count), ctypes.c_char * count, text


def plain(value: Any) -> Any:
    """A value as it can be compared: lists of what arrays hold."""
    return list(value) if hasattr(value, "__len__") and not isinstance(value, (str, bytes)) else value


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(declared=st.lists(fields(), min_size=1, max_size=8))
def test_a_record_is_what_ctypes_makes_of_it(session: hc.Session, declared: list[tuple[Any, Any, Any]]) -> None:
    """Offsets and size; values stored by the one are read by the other; and each comes back as it went in."""
    names = [f"field{number}" for number in range(len(declared))]
    kinds, ctypes_, given_ = zip(*declared, strict=True)
    kind: Any = type("Any", (Record,), {"_fields_": list(zip(names, kinds, strict=True))})
    ctype: Any = type("CAny", (ctypes.Structure,), {"_fields_": list(zip(names, ctypes_, strict=True))})
    values = dict(zip(names, given_, strict=True))
    record = kind.alloc(session.default_heap, **values)
    seen = ctype.from_buffer(record.block.view)
    assert kind.sizeof == ctypes.sizeof(ctype)
    for name, value in values.items():
        ours, theirs = getattr(kind, name), getattr(ctype, name)
        assert (ours.offset, ours.size) == (theirs.offset, theirs.size)
        assert plain(getattr(record, name)) == value
        assert plain(getattr(seen, name)) == (value.encode() if isinstance(value, str) else value)
    copy = kind.alloc(session.default_heap)
    for name in names:
        setattr(copy, name, getattr(record, name))
    assert bytes(copy.block.view) == bytes(record.block.view)
    del seen
    record.free()
    copy.free()
