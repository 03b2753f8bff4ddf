"""A class whose instances live in a heap of their own: made with the first one, destroyed with the last.

What `operator new` and `operator delete` do for a class in C++ with a heap handle and a counter as static members.
Instances lie side by side, cannot be damaged through those of another class, and leave no memory behind.
"""

from __future__ import annotations

from ctypes import c_double, c_int32
from typing import ClassVar

from _stage import example

import heapd_client as hc
from heapd_client.structs import Record


class Counted(Record):
    """A record type with a heap of its own: `new` and `delete` instead of `alloc` and `free`."""

    heap: ClassVar[hc.Heap | None] = None
    count: ClassVar[int] = 0

    @classmethod
    def new(cls, session: hc.Session, **values: object) -> Counted:
        """Allocate an instance; the first one brings the heap."""
        if cls.heap is None:
            cls.heap = session.create_heap()
        instance = cls.alloc(cls.heap, **values)
        cls.count += 1
        return instance

    def delete(self) -> None:
        """Free the instance; the last one takes the heap along."""
        cls = type(self)
        self.free()
        cls.count -= 1
        if cls.count == 0 and cls.heap is not None:
            cls.heap.destroy()
            cls.heap = None


class Planet(Counted):
    _fields_ = [("moons", c_int32), ("radius", c_double)]


class Comet(Counted):
    _fields_ = [("period", c_double)]


def show(session: hc.Session, what: str) -> None:
    """How many instances and heaps there are now."""
    counts = ", ".join(f"{kind.count} {kind.__name__}s" for kind in (Planet, Comet))
    print(f"{what:<28} {counts:<22} {len(session.heaps())} heaps")


@example
def main(session: hc.Session) -> None:
    """Let the instances of two classes come and go, and their heaps with them."""
    show(session, "at first")
    planets = [Planet.new(session, moons=moons) for moons in (0, 0, 1, 2)]
    show(session, "four planets")
    comets = [Comet.new(session, period=period) for period in (75.3, 6.6)]
    show(session, "and two comets")
    print(f"  the planets' heap: {sorted(f'{planet.address:#x}' for planet in planets)}")
    print(f"  the comets' heap:  {sorted(f'{comet.address:#x}' for comet in comets)}")
    for planet in planets:
        planet.delete()
    show(session, "without planets")
    for comet in comets:
        comet.delete()
    show(session, "without comets")
    Planet.new(session, moons=95).delete()
    show(session, "another planet came and went")


if __name__ == "__main__":
    main()
