"""heapd.mutex by itself: real processes and threads over one mutex in a mapped file."""

from __future__ import annotations

import ctypes
import dis
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heapd.errors import LockNotHeldError, LockTimeoutError, SegmentError
from heapd.mutex import MUTEX_SIZE, Mutex, fault, held, init, make_ready
from tests.harness import wait_until
from tests.interrupts import interrupts

# Answers each line, an expression, with its value or the error's name; so a test says step by step what it does.
PUPPET = """
import ctypes, mmap, os, signal, sys, threading
from heapd.mutex import Mutex, held
file = open(sys.argv[1], "r+b")
mapping = mmap.mmap(file.fileno(), 4096)
base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
mutex, other = Mutex(base), Mutex(base + 64)

def depth_in_forked_child():
    pid = os.fork()
    if pid == 0:
        os._exit(mutex.depth() * 10 + (mutex.trylock() == 0))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except BaseException as error:
        print(type(error).__name__, flush=True)
"""


class Puppet:
    """A process that has the mutexes mapped and does what it is told."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PUPPET, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, expression: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, expression: str) -> str:
        self.tell(expression)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def die_holding(self) -> None:
        """Be killed with the mutex taken, twice at that."""
        self.ask("[mutex.acquire(), mutex.acquire()]")
        self.kill()

    def end(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class Shared:
    """A page in a file with two mutexes; `pointer` is where it is mapped here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 4096)
        self.pointer = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        init(self.pointer)
        init(self.pointer + MUTEX_SIZE)
        self.mutex = Mutex(self.pointer)
        self.other = Mutex(self.pointer + MUTEX_SIZE)


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared(tmp_path / "page")


@pytest.fixture
def puppet(shared: Shared) -> Iterator[Puppet]:
    process = Puppet(shared.path)
    yield process
    process.end()


def in_thread(work: Callable[[], object]) -> object:
    """What `work` returns, or the exception it raises, in a thread of its own."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


def lose(shared: Shared, puppet: Puppet) -> None:
    """Have the mutex beyond recovery: who takes it from the dead gives it up unrepaired."""
    puppet.die_holding()
    assert shared.mutex.trylock() == errno.EOWNERDEAD
    assert shared.mutex.unlock() == 0


# -- one thread --------------------------------------------------------------------------------------------------------
def test_the_same_thread_may_take_it_again(shared: Shared) -> None:
    """The mutex is recursive: each acquire needs its own release."""
    for depth in (1, 2, 3):
        assert shared.mutex.acquire() is False
        assert shared.mutex.depth() == depth
    for depth in (2, 1, 0):
        shared.mutex.release()
        assert shared.mutex.depth() == depth
    assert shared.mutex.owner_tid() == 0
    assert shared.mutex.holder() is None


def test_release_of_a_free_mutex_is_refused(shared: Shared) -> None:
    """Who does not hold it cannot give it up, and is told that nobody does."""
    with pytest.raises(LockNotHeldError, match="nobody") as caught:
        shared.mutex.release()
    assert caught.value.details == {"holder_pid": None, "holder_tid": None}


def test_trylock_and_unlock_are_the_c_calls(shared: Shared) -> None:
    """The hot path's bound calls return 0 or an errno value and count like acquire and release."""
    assert shared.mutex.trylock() == 0
    assert shared.mutex.depth() == 1
    assert shared.mutex.unlock() == 0
    assert shared.mutex.unlock() == errno.EPERM


def test_unwind_goes_back_to_the_mark(shared: Shared) -> None:
    """Whatever was taken after the mark is given up, what was held before stays; twice does no harm."""
    free = shared.mutex.mark()
    shared.mutex.acquire()
    once = shared.mutex.mark()
    shared.mutex.acquire()
    shared.mutex.acquire()
    for mark, depth in ((once, 1), (once, 1), (free, 0), (free, 0), (0, 0)):
        shared.mutex.unwind(mark)
        assert shared.mutex.depth() == depth


def test_a_lease_gives_it_up_without_a_call(shared: Shared) -> None:
    """`del lease.held` is pthread_mutex_unlock, once each; in the interpreter's bytecode no call, and so no signal."""
    mutex = shared.mutex
    lease = mutex.lease()
    mutex.acquire()
    mutex.acquire()
    del lease.held
    assert mutex.depth() == 1

    def give_up() -> None:
        del lease.held

    give_up()
    assert mutex.depth() == 0
    assert not [each for each in dis.get_instructions(give_up) if "CALL" in each.opname]


def test_held_releases_after_an_error(shared: Shared) -> None:
    """`with held(...)` holds the mutex in the block only, and lets the block's error through."""

    def fail_inside() -> None:
        with held(shared.mutex) as lock:
            assert shared.mutex.depth() == 1
            assert lock.recovered is False
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert shared.mutex.depth() == 0
    with held(shared.mutex), held(shared.mutex):
        assert shared.mutex.depth() == 2
    assert shared.mutex.depth() == 0


# -- two threads -------------------------------------------------------------------------------------------------------
def test_another_thread_is_kept_out(shared: Shared) -> None:
    """A thread is a holder of its own: it can neither take, nor release, nor count what another one holds."""
    with held(shared.mutex):
        assert in_thread(shared.mutex.trylock) == errno.EBUSY
        assert in_thread(shared.mutex.depth) == 0
        refused = in_thread(shared.mutex.release)
    assert isinstance(refused, LockNotHeldError)
    assert refused.details["holder_tid"] == threading.get_native_id()


def test_threads_exclude_each_other(shared: Shared) -> None:
    """A waiting thread lets the holder run, and no two are inside at once."""
    total = [0]
    waits: list[int] = []
    mutex = Mutex(shared.pointer, lambda waited_ns, recovered: waits.append(waited_ns))

    def add() -> None:
        for _ in range(200):
            with held(mutex):
                before = total[0]
                time.sleep(0)  # lets another thread in, if anything would
                total[0] = before + 1

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total == [800]
    assert all(waited_ns > 0 for waited_ns in waits)


def has_sleeper(shared: Shared) -> bool:
    """Somebody sleeps in the kernel until the mutex is given up."""
    return ctypes.c_uint32.from_address(shared.pointer).value >> 31 == 1


def test_a_thread_of_the_same_process_is_waited_for_by_trying_again(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the kernel it would be woken at the first unlock, before it can have the GIL, and stop the other thread."""
    monkeypatch.setattr("heapd.mutex._POLL_NS", 60_000_000_000)
    passes = [0, 0]
    slept = is_over = False

    def work(number: int) -> None:
        while not is_over:
            with held(shared.mutex):
                passes[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while min(passes) < 20_000 and not slept and time.monotonic() < deadline:
        slept = has_sleeper(shared)
    is_over = True
    for thread in threads:
        thread.join()
    assert not slept
    assert min(passes) >= 20_000


def test_who_waits_for_long_sleeps_in_the_kernel(shared: Shared, puppet: Puppet) -> None:
    """For a thread of its own process after some turns, for another process at once; it has it at its release."""
    shared.mutex.acquire()
    waiter = threading.Thread(target=lambda: held(shared.mutex, 30).__enter__())
    waiter.start()
    wait_until(lambda: has_sleeper(shared))
    shared.mutex.release()
    waiter.join()
    assert shared.mutex.acquire() is True  # its thread ended with it
    puppet.tell("mutex.acquire(30)")
    wait_until(lambda: has_sleeper(shared))
    shared.mutex.release()
    assert puppet.answer() == "False"


def test_a_poll_ends_at_the_deadline(shared: Shared) -> None:
    """And names the holder, as any wait."""
    shared.mutex.acquire()
    refused = in_thread(lambda: shared.mutex.acquire(0.02))
    assert isinstance(refused, LockTimeoutError)
    assert refused.details["holder_tid"] == threading.get_native_id()
    shared.mutex.release()


def test_a_thread_that_ends_holding_it_counts_as_dead(shared: Shared) -> None:
    """The kernel releases it with the thread, not only with the process."""
    assert in_thread(shared.mutex.acquire) is False
    assert shared.mutex.acquire() is True
    shared.mutex.release()


# -- two processes -----------------------------------------------------------------------------------------------------
def test_another_process_is_kept_out_until_release(shared: Shared, puppet: Puppet) -> None:
    """Both processes see one mutex, at different pointers."""
    assert puppet.ask("mutex.acquire()") == "False"
    assert shared.mutex.trylock() == errno.EBUSY
    assert puppet.ask("mutex.release()") == "None"
    assert shared.mutex.trylock() == 0
    assert puppet.ask("mutex.trylock()") == str(errno.EBUSY)
    assert puppet.ask("mutex.release()") == "LockNotHeldError"
    shared.mutex.release()


def test_a_waiter_gets_it_when_it_is_released(shared: Shared, puppet: Puppet) -> None:
    """A wait ends with the holder's release, long before the deadline, and on_wait hears how long it took."""
    waits: list[tuple[int, bool]] = []
    mutex = Mutex(shared.pointer, lambda waited_ns, recovered: waits.append((waited_ns, recovered)))
    puppet.ask("mutex.acquire()")
    timer = threading.Timer(0.15, puppet.tell, ["mutex.release()"])
    timer.start()
    assert mutex.acquire(30) is False
    timer.join()
    assert puppet.answer() == "None"
    mutex.release()
    [(waited_ns, recovered)] = waits
    assert 100_000_000 < waited_ns < 10_000_000_000
    assert recovered is False


def test_a_timeout_names_the_holder(shared: Shared, puppet: Puppet) -> None:
    """The error says which process and thread holds the mutex, and comes no earlier than asked."""
    puppet.ask("mutex.acquire()")
    started = time.monotonic()
    with pytest.raises(LockTimeoutError, match=r"process \d+ \(thread \d+, command '.+'\)") as caught:
        shared.mutex.acquire(0.25)
    assert 0.25 <= time.monotonic() - started < 10
    assert caught.value.details == {"holder_pid": puppet.process.pid, "holder_tid": puppet.process.pid}
    assert "stopped" not in str(caught.value)


@pytest.mark.parametrize("timeout_s", [0, -1, 0.0])
def test_no_timeout_means_no_wait(shared: Shared, puppet: Puppet, timeout_s: float) -> None:
    """A timeout of 0 or less fails at once when the mutex is held, and succeeds when it is free."""
    puppet.ask("mutex.acquire()")
    with pytest.raises(LockTimeoutError):
        shared.mutex.acquire(timeout_s)
    puppet.ask("mutex.release()")
    assert shared.mutex.acquire(timeout_s) is False
    shared.mutex.release()


def test_the_holders_thread_is_named_within_its_process(shared: Shared) -> None:
    """holder_tid is the thread, holder_pid its process, when the two differ."""
    inside, done = threading.Event(), threading.Event()
    tids: list[int] = []

    def hold() -> None:
        with held(shared.mutex):
            tids.append(threading.get_native_id())
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    with pytest.raises(LockTimeoutError) as caught:
        shared.mutex.acquire(0)
    done.set()
    thread.join()
    assert caught.value.details == {"holder_pid": os.getpid(), "holder_tid": tids[0]}


def test_the_death_of_the_holder_is_told_once(shared: Shared, puppet: Puppet) -> None:
    """kill -9 of the holder frees the mutex; the next to take it is told, the one after is not."""
    waits: list[tuple[int, bool]] = []
    mutex = Mutex(shared.pointer, lambda waited_ns, recovered: waits.append((waited_ns, recovered)))
    puppet.die_holding()
    assert mutex.holder() is None
    assert mutex.acquire(10) is True
    assert mutex.depth() == 1
    mutex.release()
    assert waits == [(0, True)]
    assert mutex.acquire(10) is False
    mutex.release()


def test_the_death_of_the_holder_wakes_a_waiter(shared: Shared, puppet: Puppet) -> None:
    """Who waits when the holder is killed gets the mutex then, and `held` tells it."""
    puppet.ask("mutex.acquire()")
    timer = threading.Timer(0.1, puppet.process.kill)
    timer.start()
    with held(shared.mutex, 30) as lock:
        assert lock.recovered is True
    timer.join()


def test_a_stopped_holder_blocks_its_own_mutex_only(shared: Shared, puppet: Puppet) -> None:
    """Waiting for a stopped process times out and says so; another mutex is free; it goes on after SIGCONT."""
    puppet.ask("mutex.acquire()")
    puppet.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, puppet.process.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(LockTimeoutError, match="stopped"):
        shared.mutex.acquire(0.1)
    assert shared.other.acquire(0) is False
    shared.other.release()
    puppet.process.send_signal(signal.SIGCONT)
    assert puppet.ask("mutex.release()") == "None"
    assert shared.mutex.acquire(10) is False
    shared.mutex.release()


def test_a_forked_child_does_not_hold_it(puppet: Puppet) -> None:
    """The child of a holder holds nothing, cannot take it, and its exit does not release it."""
    puppet.ask("mutex.acquire()")
    assert puppet.ask("depth_in_forked_child()") == "0"
    assert puppet.ask("mutex.depth()") == "1"
    assert puppet.ask("mutex.release()") == "None"


def test_unlocked_unrepaired_is_beyond_recovery(shared: Shared, puppet: Puppet) -> None:
    """If somebody takes it from the dead and gives it up without repair, everybody after gets a clear error."""
    lose(shared, puppet)
    for _ in range(2):
        with pytest.raises(SegmentError, match="beyond recovery"):
            shared.mutex.acquire(0)


# -- for whoever comes next --------------------------------------------------------------------------------------------
def test_a_free_mutex_is_ready_as_it_is(shared: Shared) -> None:
    """It is not touched: somebody may be about to take it."""
    before = ctypes.string_at(shared.pointer, MUTEX_SIZE)
    assert make_ready(shared.pointer)
    assert ctypes.string_at(shared.pointer, MUTEX_SIZE) == before
    assert fault(shared.pointer) == ""


def test_a_held_mutex_cannot_be_made_ready(shared: Shared, puppet: Puppet) -> None:
    """By a thread of another process, or of this one; it stays held."""
    puppet.ask("mutex.acquire()")
    assert not make_ready(shared.pointer)
    assert puppet.ask("mutex.release()") == "None"
    shared.mutex.acquire()
    assert not make_ready(shared.pointer)
    shared.mutex.release()
    assert make_ready(shared.pointer)


def test_the_next_holder_is_not_told_of_a_death_before_its_time(shared: Shared, puppet: Puppet) -> None:
    """What a dead process held is made anew."""
    puppet.die_holding()
    assert make_ready(shared.pointer)
    assert shared.mutex.acquire(0) is False
    assert shared.mutex.depth() == 1
    shared.mutex.release()


def test_a_mutex_beyond_recovery_is_named_and_made_anew(shared: Shared, puppet: Puppet) -> None:
    """Its next user has a good one."""
    lose(shared, puppet)
    assert "beyond recovery" in fault(shared.pointer)
    assert make_ready(shared.pointer)
    assert shared.mutex.acquire(0) is False
    shared.mutex.release()


def test_a_scribbled_mutex_is_named_and_made_anew(shared: Shared) -> None:
    """Whatever was written over it, but that somebody holds it; its links are never followed."""
    for word in range(1, 8):
        ctypes.memset(shared.pointer + word * 8, 0x41, 8)
    ctypes.memset(shared.pointer, 0, 4)
    assert "kind 0x41414141" in fault(shared.pointer)
    assert make_ready(shared.pointer)
    assert fault(shared.pointer) == ""
    assert shared.mutex.acquire(0) is False
    shared.mutex.release()


def test_release_repairs_an_interrupted_takeover(shared: Shared, puppet: Puppet) -> None:
    """A takeover interrupted before it was marked consistent is unwound without losing the mutex for good."""
    puppet.die_holding()
    assert shared.mutex.trylock() == errno.EOWNERDEAD
    assert shared.mutex.depth() == 1
    shared.mutex.unwind(0)
    assert shared.mutex.acquire(0) is False
    shared.mutex.release()


# -- signals -----------------------------------------------------------------------------------------------------------
def test_a_signal_ends_a_wait(shared: Shared, puppet: Puppet) -> None:
    """An exception of a signal handler gets through within a slice to a thread that would wait for ever."""
    puppet.ask("mutex.acquire()")
    started = time.monotonic()
    with interrupts() as attempt:
        assert attempt(0.05, shared.mutex.acquire)
    assert time.monotonic() - started < 5
    assert shared.mutex.depth() == 0
    assert puppet.ask("mutex.release()") == "None"


def test_held_is_exact_under_signals(shared: Shared) -> None:
    """Wherever a signal handler raises in `with held(...)`, the mutex is free after it."""
    seed = 20261122
    delays = random.Random(seed)
    depth = 0
    interrupted_at = [0, 0, 0]  # by depth: counts show that both sides of the acquisition were hit

    def take_twice() -> None:
        nonlocal depth
        while True:
            with held(shared.mutex):
                depth = 1
                with held(shared.mutex):
                    depth = 2
                depth = 1
            depth = 0

    with interrupts() as attempt:
        for _ in range(3000):
            depth = 0
            assert attempt(delays.uniform(1e-6, 60e-6), take_twice)
            interrupted_at[depth] += 1
            assert shared.mutex.depth() == 0, f"seed {seed}, {interrupted_at}"
    assert all(count > 0 for count in interrupted_at)
