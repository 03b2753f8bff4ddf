"""Fields of records: laid out as ctypes does it, and every value checked before a byte of it is stored."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest

import heapd_client as hc
from heapd_client.errors import InvalidArgumentError
from heapd_client.structs import Record, Ref, Text

INTEGERS = [getattr(ctypes, f"c_{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


class Point(Record):
    _fields_ = [("x", ctypes.c_double), ("y", ctypes.c_float)]


class Sample(Record):
    """One field of every kind, in an order that needs padding."""

    _fields_ = [
        ("flag", ctypes.c_bool),
        ("count", ctypes.c_uint16),
        ("name", Text(9)),
        ("next", Ref("Sample")),
        ("byte", ctypes.c_char),
        ("where", Point),
        ("raw", ctypes.c_char * 5),
        ("values", ctypes.c_int16 * 3),
        ("path", Point * 2),
        ("links", Ref("Sample") * 2),
        ("words", Text(4) * 2),
        ("grid", ctypes.c_uint8 * 2 * 2),
    ]


class CPoint(ctypes.Structure):
    _fields_ = [("x", ctypes.c_double), ("y", ctypes.c_float)]


class CSample(ctypes.Structure):
    _fields_ = [
        ("flag", ctypes.c_bool),
        ("count", ctypes.c_uint16),
        ("name", ctypes.c_char * 9),
        ("next", ctypes.c_uint64),
        ("byte", ctypes.c_char),
        ("where", CPoint),
        ("raw", ctypes.c_char * 5),
        ("values", ctypes.c_int16 * 3),
        ("path", CPoint * 2),
        ("links", ctypes.c_uint64 * 2),
        ("words", ctypes.c_char * 4 * 2),
        ("grid", ctypes.c_uint8 * 2 * 2),
    ]


@pytest.fixture
def sample(heap: hc.Heap) -> Any:
    return Sample.alloc(heap)


def test_a_record_is_laid_out_as_ctypes_does_it() -> None:
    """Every offset and size, and the size of the whole, are those of the equal ctypes structure."""
    assert Sample.sizeof == ctypes.sizeof(CSample) == ctypes.sizeof(Sample.ctype)
    for name, field in Sample.fields.items():
        expected = getattr(CSample, name)
        assert (field.offset, field.size) == (expected.offset, expected.size), name
        assert getattr(Sample, name) is field


def test_what_is_stored_is_what_c_would_read(sample: Any) -> None:
    """A ctypes structure over the block's bytes sees the values, and what it stores is read back."""
    sample.count, sample.name, sample.flag, sample.values = 513, "né", True, [-1, 2, -3]
    sample.path[1].x = 0.5
    seen = CSample.from_buffer(sample.block.view)
    assert (seen.count, seen.name, seen.flag, list(seen.values)) == (513, "né".encode(), True, [-1, 2, -3])
    assert seen.path[1].x == 0.5
    seen.where.y = 0.25
    assert sample.where.y == 0.25


def test_a_new_record_is_zero(sample: Any) -> None:
    """Numbers 0, links None, texts empty, whatever the memory held before."""
    assert (sample.flag, sample.count, sample.name, sample.next, sample.raw) == (False, 0, "", None, b"")
    assert (sample.values[:], sample.links[:], sample.words[:]) == ([0, 0, 0], [None, None], ["", ""])
    sample.block.view[:] = b"\xff" * Sample.sizeof
    heap = sample.block.heap
    sample.free()
    assert Sample.alloc(heap).values[:] == [0, 0, 0]


@pytest.mark.parametrize("ctype", INTEGERS)
def test_an_integer_holds_its_range_and_no_more(heap: hc.Heap, ctype: Any) -> None:
    """Both ends of the range are stored and read back; one beyond is refused, not cut off."""
    kind = type("One", (Record,), {"_fields_": [("value", ctype)]})
    one: Any = kind.alloc(heap)  # type: ignore[attr-defined]
    bits, is_signed = 8 * ctypes.sizeof(ctype), ctype(-1).value < 0
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    for value in (low, high):
        one.value = value
        assert one.value == value
    for value in (low - 1, high + 1, 2**100, 1.0, "1", None, b"1"):
        with pytest.raises(InvalidArgumentError, match=r"One\.value: .* is no c_"):
            one.value = value
    assert one.value == high


def test_floats_truth_values_and_bytes(sample: Any) -> None:
    """Doubles are exact, infinities kept, truth values bool, a c_char one byte."""
    sample.where.x = math.pi
    sample.where.y = -math.inf
    sample.flag = 1
    sample.byte = b"x"
    assert (sample.where.x, sample.where.y, sample.flag, sample.byte) == (math.pi, -math.inf, True, b"x")
    for name, wrong in (("flag", "no"), ("flag", None), ("byte", b"xy"), ("byte", "x")):
        with pytest.raises(InvalidArgumentError, match=f"Sample.{name}"):
            setattr(sample, name, wrong)
    for wrong in ("1", None, 1e300):
        with pytest.raises(InvalidArgumentError, match=r"Point\.y"):
            sample.where.y = wrong


def test_a_text_is_utf8_of_at_most_its_size(sample: Any) -> None:
    """Its size is counted in bytes; a shorter one leaves nothing of a longer one before it."""
    for text in ("ninebytes", "ä" * 4, "", "x"):
        sample.name = text
        assert sample.name == text
    for wrong in ("tenletters", "ä" * 5, "a\0b", "\ud800", b"bytes", None, 5):
        with pytest.raises(InvalidArgumentError, match=r"Sample\.name"):
            sample.name = wrong
    assert sample.name == "x"
    sample.block.view[Sample.name.offset] = 0xFF
    with pytest.raises(InvalidArgumentError, match="no UTF-8"):
        print(sample.name)


def test_raw_bytes_end_at_the_first_nul(sample: Any) -> None:
    """As `c_char * n` does in ctypes."""
    for data in (b"12345", b"1", b""):
        sample.raw = data
        assert sample.raw == data
    for wrong in (b"123456", b"1\x002", "12345", 5):
        with pytest.raises(InvalidArgumentError, match=r"Sample\.raw"):
            sample.raw = wrong


def test_an_array_is_a_sequence_in_place(sample: Any) -> None:
    """Length, negative and slice indices, iteration; an element is stored where it lies."""
    values = sample.values
    sample.values = (5, 6, 7)
    values[-1] = 9
    assert (len(values), list(values), values[1:], 9 in values) == (3, [5, 6, 9], [6, 9], True)
    assert repr(values) == "[5, 6, 9]"
    sample.words[1] = "vier"
    sample.grid[1][0] = 3
    assert (sample.words[:], sample.grid[1][:]) == (["", "vier"], [3, 0])


def test_an_index_that_an_array_does_not_have_is_refused_with_what_it_has(sample: Any) -> None:
    """The error names the index, the array and its length; a wrong type of index is a TypeError, as of a list."""
    values, address = sample.values, f"{sample.address + Sample.values.offset:#x}"
    for index in (3, -4, 99, 10**30):
        why = f"no element {index} in the array at {address}, part of a Sample: it has 3, so use 0 to 2, or -1 to -3"
        with pytest.raises(IndexError, match=why):
            values[index] = 1
        with pytest.raises(IndexError, match=why):
            print(values[index])
    for wrong in ("1", 1.0, None):
        with pytest.raises(TypeError, match=f"an int or a slice, not {type(wrong).__name__}"):
            values[wrong] = 1
    with pytest.raises(TypeError, match="one by one"):
        values[:2] = (1, 2)
    assert values[:] == [0, 0, 0]


def test_an_array_is_stored_whole_or_not_at_all(sample: Any) -> None:
    """One wrong element, or a wrong number of them, and nothing has changed."""
    sample.values = [1, 2, 3]
    for wrong, why in (([7, 8], "2 values"), ([7, 8, 40_000], "element 2: 40000"), (5, "no sequence")):
        with pytest.raises(InvalidArgumentError, match=why):
            sample.values = wrong
    with pytest.raises(InvalidArgumentError, match="element 0"):
        sample.values[0] = "x"
    assert sample.values[:] == [1, 2, 3]


def test_a_record_within_a_record_is_one_of_its_fields(sample: Any) -> None:
    """Read and written in place; assigned from another of its type, or from a dict; never half."""
    sample.where = {"x": 1.5, "y": 2.5}
    sample.path = [sample.where, {"x": 4.0}]
    assert [(point.x, point.y) for point in sample.path] == [(1.5, 2.5), (4.0, 0.0)]
    assert sample.path[1].address == sample.address + Sample.path.offset + Point.sizeof
    for wrong, why in (
        ({"x": 1.0, "z": 2.0}, "no field 'z'"),
        ({"x": "1"}, r"Point\.x"),
        (sample, "no Point"),
        (7, "7"),
    ):
        with pytest.raises(InvalidArgumentError, match=why):
            sample.where = wrong
    assert (sample.where.x, sample.where.y) == (1.5, 2.5)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ([("p", ctypes.c_void_p)], "use Ref"),
        ([("p", ctypes.POINTER(ctypes.c_int))], "use Ref"),
        ([("p", ctypes.c_char_p)], "use Ref"),
        ([("o", ctypes.py_object)], "no type of a field"),
        ([("n", ctypes.c_int32.__ctype_be__)], "no type of a field"),
        ([("n", int)], "no type of a field"),
        ([("s", CPoint)], "declare it as a Record"),
        ([("bits", ctypes.c_int, 3)], "a field is"),
        (["key"], "a field is"),
        ([(5, ctypes.c_int)], "a field is"),
        ([("two words", ctypes.c_int)], "cannot name"),
        ([("free", ctypes.c_int)], "cannot name"),
        ([("_block", ctypes.c_int)], "cannot name"),
        ([("fields", ctypes.c_int)], "cannot name"),
        ([("a", ctypes.c_int), ("a", ctypes.c_int)], "cannot name"),
    ],
)
def test_a_declaration_that_cannot_be_shared_is_refused(fields: Any, why: str) -> None:
    """Pointers, objects, bit fields, foreign byte orders, names that are taken: told when the class is made."""
    with pytest.raises(InvalidArgumentError, match=f"Wrong.*{why}"):
        type("Wrong", (Record,), {"_fields_": fields})


def test_sizes_of_fields_are_positive_numbers() -> None:
    """Of texts and of arrays."""
    for wrong in (0, -1, "3", None):
        with pytest.raises(InvalidArgumentError):
            Text(wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError):
            Point * wrong  # type: ignore[operator]


def test_options_of_ctypes_that_records_lack_are_refused() -> None:
    """Better than to ignore `_pack_`; and fields that come too late, or twice."""
    with pytest.raises(InvalidArgumentError, match="_pack_"):
        type("Packed", (Record,), {"_pack_": 1, "_fields_": [("n", ctypes.c_int)]})
    with pytest.raises(InvalidArgumentError, match="Ref"):
        Point._fields_ = [("z", ctypes.c_int)]
    with pytest.raises(InvalidArgumentError, match="final"):
        Point.x = 5
