"""Records: views of blocks, of one type, refused once the block is free."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from ctypes import c_int32, c_int64
from multiprocessing import get_context
from typing import Any

import pytest

import heapd_client as hc
from heapd_client.errors import (
    ClosedError,
    HeapDestroyedError,
    InvalidArgumentError,
    NotABlockError,
    StaleHandleError,
    WrongHeapError,
)
from heapd_client.structs import Record, Text
from tests.client.programs import in_child


class Animal(Record):
    _fields_ = [("legs", c_int32), ("name", Text(20))]

    @property
    def is_insect(self) -> bool:
        return bool(self.legs == 6)


class Dog(Animal):
    _fields_ = [("tricks", c_int64)]


class Pair(Record):
    _fields_ = [("first", Animal), ("second", Animal)]


def test_a_record_takes_a_block_of_its_size(heap: hc.Heap) -> None:
    """One block; the values given are there, its address is the block's."""
    ant = Animal.alloc(heap, legs=6, name="ant")
    assert (ant.legs, ant.name, ant.is_insect) == (6, "ant", True)
    assert (ant.block.size, ant.block.address) == (Animal.sizeof, ant.address)
    assert heap.statistics().busy_blocks == 1
    ant.free()
    assert heap.statistics().busy_blocks == 0


def test_wrong_values_allocate_nothing(heap: hc.Heap) -> None:
    """The error names the field, or those that there are."""
    with pytest.raises(InvalidArgumentError, match=r"Animal\.legs: 'six' is no"):
        Animal.alloc(heap, name="ant", legs="six")
    with pytest.raises(InvalidArgumentError, match="no field 'wings'; its fields: legs, name"):
        Animal.alloc(heap, wings=2)
    with pytest.raises(InvalidArgumentError, match="in a Heap, not in 5"):
        Animal.alloc(5)  # type: ignore[arg-type]
    assert heap.statistics().busy_blocks == 0


def test_a_mistyped_field_is_an_attribute_error(heap: hc.Heap) -> None:
    """It never makes an attribute that nobody else sees."""
    ant = Animal.alloc(heap)
    with pytest.raises(AttributeError):
        ant.leg = 5
    with pytest.raises(AttributeError):
        print(ant.leg)


def test_a_record_of_a_block_and_one_of_an_address_are_the_same(heap: hc.Heap) -> None:
    """Equal, of equal hash; what one writes the other reads."""
    ant = Animal.alloc(heap, legs=6)
    for same in (Animal(ant.block), Animal.at(heap, ant.address), pickle.loads(pickle.dumps(ant))):
        same.legs += 1
        assert same == ant
        assert hash(same) == hash(ant)
        assert same.legs == ant.legs
    assert ant.legs == 9
    assert ant != Animal.alloc(heap, legs=9)
    assert ant != "ant"


def test_a_block_that_does_not_fit_is_refused(heap: hc.Heap, session: hc.Session) -> None:
    """Too small, no block, nothing at the address, of another heap."""
    with pytest.raises(InvalidArgumentError, match="has 10 bytes; Animal takes 24"):
        Animal(heap.alloc(10))
    with pytest.raises(InvalidArgumentError, match="in a Block"):
        Animal(heap)  # type: ignore[arg-type]
    ant = Animal.alloc(heap)
    with pytest.raises(NotABlockError):
        Animal.at(heap, ant.address + 16)
    with pytest.raises(WrongHeapError):
        Animal.at(session.create_heap(), ant.address)
    block = heap.alloc(100)
    record = Animal(block)
    block.realloc(8)
    with pytest.raises(InvalidArgumentError, match="has 8 bytes"):
        print(record.legs)


def test_a_block_that_moves_takes_its_record_along(heap: hc.Heap) -> None:
    """Resized through its own block object, the record is where the block is."""
    ant = Animal.alloc(heap, legs=6)
    ant.block.realloc(50_000)
    assert (ant.legs, ant.address) == (6, ant.block.address)


def test_a_base_record_comes_first(heap: hc.Heap) -> None:
    """Its fields keep their offsets, so that a Dog can be read as an Animal."""
    dog = Dog.alloc(heap, legs=4, tricks=7)
    assert list(Dog.fields) == ["legs", "name", "tricks"]
    assert Dog.legs.offset == Animal.legs.offset
    assert (Animal(dog.block).legs, dog.tricks) == (4, 7)
    with pytest.raises(InvalidArgumentError, match="'legs' cannot name a field"):
        type("Bug", (Animal,), {"_fields_": [("legs", c_int32)]})
    with pytest.raises(InvalidArgumentError, match="'size' cannot name a field"):
        type("Bug", (Animal,), {"_fields_": [("size", c_int32)], "size": property(len)})
    with pytest.raises(InvalidArgumentError, match="one base record"):
        type("Both", (Dog, Pair), {})


def test_a_part_lives_and_dies_with_the_whole(heap: hc.Heap) -> None:
    """It cannot be freed by itself, and is refused when the whole was freed."""
    pair = Pair.alloc(heap, second={"legs": 8})
    second = pair.second
    assert pickle.loads(pickle.dumps(second)) == second
    assert pair.first != second
    with pytest.raises(InvalidArgumentError, match="part of another"):
        second.free()
    pair.free()
    for access in (lambda: second.legs, lambda: setattr(second, "legs", 1), lambda: pair.first):
        with pytest.raises(ClosedError, match="was freed"):
            access()


@pytest.mark.parametrize("is_serialized", [True, False])
def test_a_freed_record_is_refused(session: hc.Session, is_serialized: bool) -> None:
    """By every object that stands for it, before its memory is used again and after."""
    heap = session.create_heap(serialize=is_serialized)
    ant = Animal.alloc(heap, legs=6)
    other = Animal.at(heap, ant.address)
    third = pickle.loads(pickle.dumps(ant))
    other.free()
    for _ in range(2):
        with pytest.raises(ClosedError, match=r"the Animal at .* was freed"):
            print(other.legs)
        for stale in (ant, third):
            with pytest.raises(StaleHandleError, match="was freed by somebody else"):
                print(stale.legs)
            with pytest.raises(StaleHandleError):
                stale.legs = 3
            assert "was freed" in repr(stale)
        again = Animal.alloc(heap, legs=8)
    assert again.legs == 8
    assert heap.validate() == []


def test_a_record_whose_page_was_given_back_is_refused_untouched(session: hc.Session) -> None:
    """The look at a freed record does not bring its memory back."""
    heap = session.create_heap()
    records = [Animal.alloc(heap) for _ in range(500)]
    others = [Animal.at(heap, record.address) for record in records]
    for record in records:
        record.free()
    heap.compact()
    committed = session.statistics().committed
    for other in others:
        with pytest.raises(StaleHandleError):
            print(other.name)
    assert session.statistics().committed == committed
    heap.destroy()
    with pytest.raises(HeapDestroyedError):
        print(others[0].name)


def grow_a_leg(ant: Any) -> tuple[int, str]:
    """In another process: change the record in place."""
    ant.legs += 1
    return ant.legs, ant.name


def free_it(ant: Any) -> None:
    """In another process: free the record."""
    ant.free()


def test_records_travel_between_processes(heap: hc.Heap) -> None:
    """Pickled to a spawned process, which reads, changes and frees it in place."""
    ant = Animal.alloc(heap, legs=6, name="ant")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(grow_a_leg, ant).result(30) == (7, "ant")
        assert ant.legs == 7
        pool.submit(free_it, ant).result(30)
    with pytest.raises(StaleHandleError):
        print(ant.legs)


def test_a_forked_child_goes_on_with_its_parents_records(heap: hc.Heap) -> None:
    """It reads and changes them; what it frees is found out in the parent."""
    ant, bee = Animal.alloc(heap, legs=6), Animal.alloc(heap, legs=6)

    def work() -> None:
        ant.legs += 1
        bee.free()
        assert Animal.alloc(heap, legs=ant.legs).legs == 7

    assert in_child(work) == 0
    assert ant.legs == 7
    with pytest.raises(StaleHandleError):
        print(bee.legs)
    assert heap.validate() == []


def test_a_closed_session_closes_its_records(session: hc.Session) -> None:
    """As it does blocks; the error says so."""
    with hc.connect(session.endpoint, autostart=False) as other:
        ant = Animal.alloc(other.create_heap(), legs=6)
    for access in (lambda: ant.legs, lambda: setattr(ant, "legs", 1), ant.free, lambda: Animal(ant.block)):
        with pytest.raises(ClosedError):
            access()


def test_repr_shows_the_fields(heap: hc.Heap) -> None:
    """Address and values; of nested records too."""
    pair = Pair.alloc(heap, first={"legs": 2, "name": "hen"})
    text = repr(pair)
    assert text.startswith(f"<Pair at {pair.address:#x} first=<Animal at {pair.address:#x} legs=2 name='hen'>")
    assert repr(Animal.name) == "<Field Animal.name offset=4 size=20>"
