"""Holding a heap's lock from user code: `with heap.lock():`, or `heap.lock()` ... `heap.unlock()`.

Ctrl-C may strike between any two steps, and the lock must then be held if and only if the `with` block is running.
CPython looks for signals when a Python function begins and after each call of a C function, so:

    heap.lock()     is Python, takes the mutex last, and undoes it on an exception; nothing is called after that
    __enter__       must be C, or its first instruction could raise with the mutex held and no `with` to give it up
    __exit__        must be C, or it could raise before it has given the mutex up
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING
from weakref import ref

__all__ = ["HeldLock"]


class HeldLock(partial[None]):
    """A heap's lock, held by the calling thread; leaving `with` gives it up.

    It is the unlocking C function itself, bound to its mutex: so `__exit__` can be what calls that. `__enter__` is the
    descriptor of a slot, so that `with` calls what the slot holds: a weak reference, which gives this object.

    Attributes: recovered (True: the previous holder died holding it, so what it was changing may be half done; heapd's
    own structures are not).
    """

    recovered: bool
    mapping: object  # the mutex must stay mapped while it is held
    if TYPE_CHECKING:

        def __enter__(self) -> HeldLock: ...

        def __exit__(self, *exception: object) -> None: ...

    else:
        __slots__ = ("__enter__", "mapping", "recovered")
        __exit__ = partial.__call__

    @classmethod
    def of(cls, unlock: Callable[..., None], mapping: object) -> HeldLock:
        """The object for a lock about to be taken. Args: unlock (`__exit__` of mutex.held), mapping (it lies in)."""
        lock = cls(unlock)
        lock.recovered = False
        lock.mapping = mapping
        lock.__enter__ = ref(lock)  # type: ignore[method-assign, assignment]
        return lock

    def __repr__(self) -> str:
        return f"<HeldLock recovered={self.recovered}>"
