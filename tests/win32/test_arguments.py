"""Arguments of any kind: the wrong type is a TypeError, a wrong value the function's failure, NULL has many forms."""

from __future__ import annotations

import ctypes
import inspect
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import pytest

from heapd_client import win32
from tests.client.programs import in_child
from tests.harness import wait_until
from tests.win32.tools import BEYOND, SENTINEL, Elsewhere, busy, expect, new_heap, walk

FUNCTIONS = [
    function
    for function in (getattr(win32, name) for name in win32.__all__ if name[0].isupper())
    if inspect.isfunction(function) and inspect.signature(function).parameters
]
ZERO = int(win32.HEAP_ZERO_MEMORY)
ENTRY_NAMES = {"lpEntry", "lphl", "lphe", "lpSummary"}
HANDLE_NAMES = {"hHeap", "HeapHandle", "hMem", "pMem", "lpMem", "hSnapshot", "hObject", "th32HeapID"}
BUFFER_NAMES = {"HeapInformation", "ReturnLength", "ProcessHeaps"}


def test_the_functions_are_all_there() -> None:
    """Forty-three, by their names, with a sentence each."""
    names = {
        *("GetProcessHeap", "GetProcessHeaps", "HeapCreate", "HeapAlloc", "HeapReAlloc", "HeapSize", "HeapFree"),
        *("HeapDestroy", "HeapValidate", "HeapCompact", "HeapLock", "HeapUnlock", "HeapWalk", "HeapSetInformation"),
        *("HeapQueryInformation", "HeapSummary", "CreateToolhelp32Snapshot", "Heap32ListFirst", "Heap32ListNext"),
        *("Heap32First", "Heap32Next", "CloseHandle", "GetLastError", "SetLastError", "memory", "pointer"),
        *(
            f"{family}{name}"
            for family in ("Global", "Local")
            for name in ("Alloc", "ReAlloc", "Size", "Free", "Lock", "Unlock", "Flags", "Handle", "Discard")
        ),
    }
    assert names <= set(win32.__all__)
    for name in names:
        assert inspect.getdoc(getattr(win32, name)), name


def good_arguments(function: Callable[..., Any], heap: int) -> dict[str, Any]:
    """Arguments of the right types; values that do no harm."""
    values: dict[str, Any] = {
        "hHeap": heap,
        "HeapHandle": heap,
        "lpEntry": win32.PROCESS_HEAP_ENTRY(),
        "lphl": win32.HEAPLIST32(),
        "lphe": win32.HEAPENTRY32(),
        "lpSummary": win32.HEAP_SUMMARY(),
        "HeapInformation": ctypes.c_uint32(),
        "ReturnLength": None,
        "ProcessHeaps": [0],
    }
    return {name: values.get(name, 0) for name in inspect.signature(function).parameters}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_wrong_type_is_a_type_error(heap: int, function: Callable[..., Any]) -> None:
    """Whichever argument it is, and whatever the others are."""
    for name in inspect.signature(function).parameters:
        wrong: list[Any] = ["x", b"x", 1.5, object(), (), {}]
        if name not in HANDLE_NAMES | ENTRY_NAMES | BUFFER_NAMES:
            wrong += [None, []]
        if name in ENTRY_NAMES:
            wrong += [ctypes.c_int(), ctypes.byref(ctypes.c_int()), 5]
        for value in wrong:
            with pytest.raises(TypeError):
                function(**{**good_arguments(function, heap), name: value})
    assert win32.HeapValidate(heap, 0, None)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_wrong_value_is_never_an_exception(
    heap: int, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty times nonsense: the function returns something, and the heap stays in order."""
    monkeypatch.setattr(win32.corruption, "is_fatal", False)  # and again afterwards: HeapSetInformation sets it
    dice = random.Random(function.__name__)
    block = win32.HeapAlloc(heap, 0, 100)
    numbers = [0, 1, 2, 8, 16, 24, 0x40, 0x82, 100, 4_096, 1 << 20, 1 << 33, 2**32, 2**63, -1, -8, BEYOND, BEYOND + 8]
    numbers += [block + 8, block + 16, heap, heap + 1]
    for _ in range(60):
        arguments = {
            name: value if name in (*ENTRY_NAMES, *BUFFER_NAMES) else dice.choice(numbers)
            for name, value in good_arguments(function, heap).items()
        }
        for name in ENTRY_NAMES & arguments.keys():
            text = dice.randbytes(ctypes.sizeof(arguments[name]))
            ctypes.memmove(ctypes.addressof(arguments[name]), text, len(text))
        if arguments.get("HeapInformationLength", 0) > 4:
            arguments["HeapInformationLength"] = 4
        with suppress(win32.StructuredException):
            function(**arguments)
        if not win32.HeapValidate(heap, 0, None):
            heap = win32.HeapCreate(0, 0, 0)  # it was destroyed; that is what it was asked for


@pytest.mark.parametrize("kind", [float, Decimal, Fraction, complex], ids=lambda kind: kind.__name__)
def test_what_equals_an_int_is_none(heap: int, kind: type[Any]) -> None:
    """A number of another type is a TypeError also where a handle, an address, flags or a size equal it."""
    block = win32.HeapAlloc(heap, 0, 100)
    for arguments in ((kind(heap), 0, 64), (heap, kind(0), 64), (heap, 0, kind(64)), (kind(heap), ZERO, 64)):
        with pytest.raises(TypeError):
            win32.HeapAlloc(*arguments)
    for function in (win32.HeapFree, win32.HeapSize, win32.HeapValidate):
        for arguments in ((kind(heap), 0, block), (heap, kind(0), block), (heap, 0, kind(block))):
            with pytest.raises(TypeError):
                function(*arguments)
    assert busy(heap) == [(block, 100)]
    assert win32.HeapFree(heap, 0, block)


def test_what_counts_as_an_int_is_one(heap: int) -> None:
    """As for ctypes: what has an __index__, such as numpy's integers and bool; another int object of the same value."""
    numpy = pytest.importorskip("numpy")
    for kind in (numpy.int64, numpy.uint64, lambda value: int(str(value))):
        for flags in (0, ZERO):
            block = win32.HeapAlloc(kind(heap), kind(flags), kind(1_000))
            assert type(block) is int
            assert win32.HeapSize(kind(heap), kind(0), kind(block)) == 1_000
            assert win32.HeapFree(kind(heap), kind(0), kind(block)) is True
    block = win32.HeapAlloc(heap, False, True)  # type: ignore[arg-type]
    assert win32.HeapSize(heap, 0, block) == 1
    with pytest.raises(TypeError):
        win32.HeapAlloc(heap, 0, numpy.bool_(True))
    assert win32.HeapFree(heap, False, block)
    assert busy(heap) == []


def test_structures_are_taken_in_every_form(heap: int) -> None:
    """The instance, byref and a pointer; NULL as None, 0 and a null pointer."""
    entry = win32.PROCESS_HEAP_ENTRY()
    for form in (entry, ctypes.byref(entry), ctypes.pointer(entry)):
        entry.lpData = 0
        assert win32.HeapWalk(heap, form)
        assert entry.lpData == heap
    for null in (None, 0, ctypes.POINTER(win32.PROCESS_HEAP_ENTRY)()):
        expect(False, win32.ERROR_INVALID_PARAMETER, win32.HeapWalk, heap, null)
    array = (ctypes.c_uint64 * 3)()
    for buffer in (array, ctypes.byref(array), ctypes.pointer(array), [0, 0, 0]):
        assert win32.GetProcessHeaps(3, buffer) == 2
    assert list(array[:2]) == [win32.GetProcessHeap(), heap]
    for wrong in ((ctypes.c_uint32 * 3)(), (0, 0), "x"):
        with pytest.raises(TypeError):
            win32.GetProcessHeaps(2, wrong)


def test_integers_are_taken_modulo_their_width(heap: int) -> None:
    """-1 is the largest SIZE_T, and -1 modulo 2**32 the largest DWORD; an index is an int, too."""
    block = win32.HeapAlloc(heap + 2**64, 2**32, 2**64 + 10)
    assert win32.HeapSize(heap, 0, block) == 10
    assert win32.HeapSize(heap, 0, block - 2**64) == 10
    expect(0, win32.ERROR_NOT_ENOUGH_MEMORY, win32.HeapAlloc, heap, 0, -1)
    assert win32.INVALID_HANDLE_VALUE == 2**64 - 1
    win32.SetLastError(-1)
    assert win32.GetLastError() == 2**32 - 1

    class Index:
        def __index__(self) -> int:
            return 10

    assert win32.HeapSize(heap, 0, win32.HeapAlloc(heap, 0, Index())) == 10  # type: ignore[arg-type]


def test_memory_reaches_any_committed_byte_and_no_other(heap: int) -> None:
    """Past a block's end, writable; beyond what is committed it raises, and commits nothing."""
    from heapd_client import InvalidArgumentError

    block = win32.HeapAlloc(heap, 0, 10)
    view = win32.memory(block, 100)
    view[99] = 7
    assert win32.memory(block + 99, 1)[0] == 7
    assert ctypes.string_at(win32.pointer(block) + 99, 1) == b"\x07"
    uncommitted = walk(heap)[-1].lpData
    for address, size in ((uncommitted, 1), (uncommitted - 1, 2), (BEYOND, 1), (block, 1 << 40), (-1, 1)):
        with pytest.raises(InvalidArgumentError):
            win32.memory(address, size)
    assert walk(heap)[-1].lpData == uncommitted
    assert win32.pointer(0) == 0


def test_ctrl_c_gets_through_to_a_waiting_lock(heap: int) -> None:
    """HeapLock ends with KeyboardInterrupt and is not held then."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        win32.HeapLock(heap)
        held.set()
        done.wait(10)
        win32.HeapUnlock(heap)

    holder = Elsewhere(hold)
    assert held.wait(10)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        win32.HeapLock(heap)
    assert time.monotonic() - started < 5
    timer.join()
    expect(False, win32.ERROR_NOT_LOCKED, win32.HeapUnlock, heap)
    done.set()
    holder.get()
    assert win32.HeapLock(heap)
    assert win32.HeapUnlock(heap)


def test_waiting_for_the_lock_of_a_heap_that_is_destroyed_fails(heap: int) -> None:
    """ERROR_INVALID_HANDLE, once the destroyer has let go; and the next heap's lock is not held by anybody."""
    assert win32.HeapLock(heap)
    waiting = Elsewhere(lambda: (win32.HeapLock(heap), win32.GetLastError()))
    assert waiting.is_waiting()
    assert win32.HeapDestroy(heap)
    assert waiting.get() == (False, win32.ERROR_INVALID_HANDLE)
    with new_heap() as next_:
        assert Elsewhere(lambda: win32.HeapLock(next_) and win32.HeapUnlock(next_)).get()


def test_detaching_under_other_threads_breaks_nothing(attached: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls fail or attach anew; none hangs, none raises anything but DaemonError."""
    monkeypatch.setenv("HEAPD_ENDPOINT", attached)
    is_over = threading.Event()
    rounds = [0, 0]

    def work(number: int) -> None:
        while not is_over.is_set():
            heap = win32.HeapCreate(0, 0, 0)
            block = win32.HeapAlloc(heap, 0, 100)
            win32.HeapWalk(heap, win32.PROCESS_HEAP_ENTRY())
            win32.HeapFree(heap, 0, block)
            win32.HeapDestroy(heap)
            rounds[number] += 1

    threads = [Elsewhere(work, number) for number in range(2)]

    def have_done(count: int) -> bool:
        return min(rounds) >= count or not all(thread.is_alive() for thread in threads)

    for turn in range(15):
        wait_until(partial(have_done, turn // 3))
        time.sleep(0.01)  # so that it strikes in the middle of a round
        win32.detach()
    is_over.set()
    for thread in threads:
        thread.get()


def test_an_interrupted_lock_is_not_held(attached: str) -> None:
    """HeapLock returns with the lock held, or raises without; at whatever instant a signal strikes."""

    class Struck(Exception):
        pass

    is_armed = False

    def strike(*_: object) -> None:
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise Struck

    def work() -> None:
        nonlocal is_armed
        signal.signal(signal.SIGALRM, strike)
        with new_heap() as heap:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
            struck = 0
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                is_held = False
                try:
                    is_armed = True
                    is_held = win32.HeapLock(heap)
                    is_armed = False
                except Struck:
                    struck += 1
                assert win32.HeapUnlock(heap) is is_held
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert struck > 20

    assert in_child(work) == 0


def test_an_interrupted_alloc_or_free_loses_no_block(attached: str) -> None:
    """HeapAlloc returns a block, or raises and there is none; HeapFree frees it, or it is there yet. On the short way
    and on the slow one."""

    class Struck(Exception):
        pass

    is_armed = False

    def strike(*_: object) -> None:
        nonlocal is_armed
        if is_armed:
            is_armed = False
            raise Struck

    def work() -> None:
        nonlocal is_armed
        signal.signal(signal.SIGALRM, strike)
        with new_heap() as heap:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
            struck = turn = 0
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                flags, turn, block = turn % 2, turn + 1, 0  # 1 is HEAP_NO_SERIALIZE, which goes the slow way
                try:
                    is_armed = True
                    block = win32.HeapAlloc(heap, flags, 64)
                    win32.HeapFree(heap, flags, block)
                    is_armed = False
                except Struck:
                    struck += 1
                    win32.HeapFree(heap, 0, block)  # it may be free already
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert struck > 20
            assert win32.HeapValidate(heap, 0, None)
            assert busy(heap) == []

    assert in_child(work) == 0


def test_two_threads_share_a_heap(heap: int) -> None:
    """Blocks that one allocates and the other frees, by address: none is lost, none given out twice."""
    passed: list[int] = []
    rounds = 3_000

    def make() -> None:
        for _ in range(rounds):
            passed.append(win32.HeapAlloc(heap, 0, 48))

    def take() -> None:
        freed = 0
        while freed < rounds:
            if passed:
                assert win32.HeapFree(heap, 0, passed.pop())
                freed += 1
            else:
                time.sleep(0)

    threads = [Elsewhere(make), Elsewhere(take)]
    for thread in threads:
        thread.get(30)
    assert busy(heap) == []
    assert win32.HeapValidate(heap, 0, None)


def test_a_success_keeps_the_last_error(heap: int) -> None:
    """Of all functions; only a failure sets it."""
    win32.SetLastError(SENTINEL)
    block = win32.HeapAlloc(heap, 0, 10)
    block = win32.HeapReAlloc(heap, 0, block, 20_000)
    assert win32.HeapSize(heap, 0, block)
    assert win32.HeapValidate(heap, 0, None)
    assert win32.HeapLock(heap)
    assert win32.HeapUnlock(heap)
    assert win32.HeapFree(heap, 0, block)
    assert win32.HeapCompact(heap, 0)
    assert win32.HeapDestroy(heap)
    assert win32.GetLastError() == SENTINEL
