"""heapd.arena.segment by itself: who may map it, and who alone removes it."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from heapd.arena import Segment, remove_segment, segment_exists
from heapd.errors import SegmentError
from heapd.units import GIB, MIB, PAGE_SIZE, TIB
from tests.harness import RUN_VARIABLE, unique_name, wait_until

SHM = Path("/dev/shm")


@pytest.fixture
def name() -> Iterator[str]:
    """A name in /dev/shm that is free, and free again afterwards."""
    name = f"heapd-{unique_name()}"
    yield name
    (SHM / name).unlink(missing_ok=True)


@pytest.fixture
def segment(name: str) -> Iterator[Segment]:
    """A segment of 1 MiB."""
    segment = Segment.create(name, MIB)
    yield segment
    segment.close()


# -- create, attach, remove --------------------------------------------------------------------------------------------
def test_a_new_segment_is_sparse_private_and_zero(segment: Segment, name: str) -> None:
    """Mode 0600, no memory behind it, reads as zeros where it is committed."""
    status = os.stat(SHM / name)
    assert status.st_mode & 0o7777 == 0o600
    assert segment.allocated_bytes == 0
    os.posix_fallocate(segment.fd, PAGE_SIZE, PAGE_SIZE)
    assert segment.allocated_bytes == PAGE_SIZE
    assert bytes(segment.buffer[PAGE_SIZE : 2 * PAGE_SIZE]) == bytes(PAGE_SIZE)


def test_terabytes_can_be_reserved_for_nothing(name: str) -> None:
    """Address space is free: the size says nothing about memory."""
    segment = Segment.create(name, TIB)
    assert segment.size == TIB
    assert segment.allocated_bytes == 0
    segment.close()


def test_creating_twice_is_refused_and_the_first_is_untouched(segment: Segment, name: str) -> None:
    """Two daemons never share a segment unawares."""
    os.posix_fallocate(segment.fd, 0, PAGE_SIZE)
    segment.words[5] = 77
    with pytest.raises(SegmentError, match=name):
        Segment.create(name, 2 * MIB)
    assert segment_exists(name)
    assert os.stat(SHM / name).st_size == MIB
    assert segment.words[5] == 77


def test_a_segment_that_cannot_be_made_leaves_nothing(name: str) -> None:
    """A size the system refuses is a SegmentError, and no name stays behind."""
    with pytest.raises(SegmentError):
        Segment.create(name, 1 << 62)
    assert not segment_exists(name)


def test_what_one_mapping_writes_the_other_reads(segment: Segment, name: str) -> None:
    """Attach maps the same memory at the same offsets."""
    other = Segment.attach(name)
    os.posix_fallocate(segment.fd, 0, MIB)
    segment.words[1000] = 2**64 - 1
    assert other.words[1000] == 2**64 - 1
    assert other.size == MIB
    other.close()


def test_attaching_to_what_is_not_there_is_refused(name: str) -> None:
    """A missing segment has an error that names it."""
    with pytest.raises(SegmentError, match=name):
        Segment.attach(name)


def test_an_unlinked_segment_works_on_until_it_is_unmapped(segment: Segment, name: str) -> None:
    """Clients keep reading and writing their blocks when the daemon has gone."""
    os.posix_fallocate(segment.fd, 0, PAGE_SIZE)
    segment.unlink()
    assert not segment_exists(name)
    segment.words[3] = 9
    assert segment.words[3] == 9
    assert os.fstat(segment.fd).st_nlink == 0


def test_removing_says_whether_there_was_anything(segment: Segment, name: str) -> None:
    """True once, False after; no error for a name that is gone."""
    assert segment_exists(name)
    assert remove_segment(name) is True
    assert remove_segment(name) is False
    segment.unlink()


def test_closing_with_a_live_view_leaves_the_mapping_and_is_silent(segment: Segment) -> None:
    """A view that somebody still holds goes on working; the kernel unmaps at the end of the process."""
    os.posix_fallocate(segment.fd, 0, PAGE_SIZE)
    view = segment.buffer[8:16]
    segment.close()
    view[:] = b"still ok"
    assert bytes(view) == b"still ok"


def test_closing_with_an_export_of_the_words_is_silent_too(segment: Segment) -> None:
    """An array made of the words, as numpy would, counts as a view as well."""
    export = pickle.PickleBuffer(segment.words)
    segment.close()
    assert export.raw().nbytes == MIB


def test_closing_twice_does_nothing(segment: Segment) -> None:
    """The fixture closes it once more."""
    segment.close()
    segment.close()


def test_a_closed_segment_leaves_no_descriptor(name: str) -> None:
    """Neither creating nor attaching leaks a file descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    segment = Segment.create(name, MIB)
    other = Segment.attach(name)
    other.close()
    segment.close()
    assert len(os.listdir("/proc/self/fd")) == before


# -- names in /dev/shm that are somebody else's ------------------------------------------------------------------------
def test_a_symlink_is_not_attached_to(name: str, tmp_path: Path) -> None:
    """Another user may have made the name first, to lead us to a file of theirs, or of ours."""
    target = tmp_path / "target"
    target.write_bytes(bytes(MIB))
    (SHM / name).symlink_to(target)
    with pytest.raises(SegmentError):
        Segment.attach(name)
    with pytest.raises(SegmentError):
        Segment.create(name, MIB)
    assert target.read_bytes() == bytes(MIB)


def test_a_dangling_symlink_is_not_created_through(name: str, tmp_path: Path) -> None:
    """Create never makes the file that a planted link points to."""
    (SHM / name).symlink_to(tmp_path / "made")
    with pytest.raises(SegmentError):
        Segment.create(name, MIB)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_segment_that_others_may_write_is_refused(segment: Segment, name: str, mode: int) -> None:
    """Whoever may write it may scribble on our blocks."""
    os.chmod(SHM / name, mode)
    with pytest.raises(SegmentError):
        Segment.attach(name)


def test_a_directory_or_fifo_of_that_name_is_refused(name: str) -> None:
    """Only a regular file is a segment; opening a fifo would even wait for ever."""
    os.mkfifo(SHM / name, 0o600)
    with pytest.raises(SegmentError):
        Segment.attach(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_segment_of_another_user_is_refused(segment: Segment, name: str) -> None:
    """A stranger's segment may change under us at any time."""
    os.chown(SHM / name, 65534, -1)
    with pytest.raises(SegmentError):
        Segment.attach(name)


def test_an_empty_file_of_that_name_is_refused(name: str) -> None:
    """What a daemon leaves that was killed between making the name and sizing it."""
    (SHM / name).touch(0o600)
    with pytest.raises(SegmentError):
        Segment.attach(name)


def test_a_client_that_cannot_map_it_does_not_remove_it(segment: Segment, name: str) -> None:
    """multiprocessing unlinks what it could not map, even another's: here the address space is limited."""
    body = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28))
try:
    open_it()
except OSError as error:
    print(type(error).__name__)
"""
    os.truncate(SHM / name, GIB)
    assert run_python(body, "attach", name).stdout == "SegmentError\n"
    assert segment_exists(name)


# -- the resource tracker ----------------------------------------------------------------------------------------------
PRELUDE = """
import os, signal, sys, time
from multiprocessing import resource_tracker, shared_memory
from heapd.arena import Segment
create, name = sys.argv[1] == "create", sys.argv[2]
def open_it():
    return Segment.create(name, 1 << 20) if create else Segment.attach(name)
"""


def trackers() -> set[str]:
    """Process ids of the resource trackers that this test run has started."""
    mark = f"{RUN_VARIABLE}={os.environ[RUN_VARIABLE]}".encode()
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"resource_tracker" in (process / "cmdline").read_bytes():
                found.update({process.name} if mark in (process / "environ").read_bytes() else ())
    return found


def run_python(body: str, how: str, name: str) -> subprocess.CompletedProcess[str]:
    """Run a script that maps the segment; `how` is "create" or "attach". Whatever tracker it started has ended, too."""
    before = trackers()
    script = [sys.executable, "-c", PRELUDE + body, how, name]
    done = subprocess.run(script, capture_output=True, text=True, timeout=30, check=False)
    wait_until(lambda: not trackers() - before, 5, "the trackers end")
    return done


@pytest.fixture(params=["create", "attach"])
def how(request: pytest.FixtureRequest, name: str) -> str:
    """Both ways to have a segment; for "attach" it is there already."""
    if request.param == "attach":
        Segment.create(name, MIB).close()
    value: str = request.param
    return value


def test_an_ordinary_exit_leaves_the_segment_and_says_nothing(how: str, name: str) -> None:
    """No process that ends takes the arena with it, and nothing appears on anybody's stderr."""
    done = run_python("segment = open_it(); view = segment.buffer[:4096]", how, name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert segment_exists(name)


def test_no_tracker_process_is_ever_started(how: str, name: str) -> None:
    """Nobody is left behind who could remove the segment later."""
    body = """
segment = open_it()
children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
print(children, resource_tracker._resource_tracker._pid)
"""
    done = run_python(body, how, name)
    assert (done.stdout, done.stderr) == ("[] None\n", "")


@pytest.mark.parametrize("moment", ["opened", "mapped", "after"])
def test_kill_at_any_moment_leaves_the_segment(how: str, name: str, moment: str) -> None:
    """kill -9 right after the name was opened, right after it was mapped, and at leisure."""
    body = f"""
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
def then_die(call):
    return lambda *arguments, **options: (call(*arguments, **options), die())
if {moment!r} == "opened":
    shared_memory.os.ftruncate = shared_memory.mmap.mmap = die
elif {moment!r} == "mapped":
    shared_memory.mmap.mmap = then_die(shared_memory.mmap.mmap)
segment = open_it()
die()
"""
    assert run_python(body, how, name).returncode == -9
    assert segment_exists(name)


def test_a_tracker_that_runs_already_does_not_hear_of_the_segment(how: str, name: str) -> None:
    """A program that uses SharedMemory of its own has a tracker, which must know of that memory alone."""
    body = """
own = shared_memory.SharedMemory(create=True, size=4096)
segment = open_it()
child = os.fork()
if child == 0:
    if not create:
        Segment.attach(name)
    os._exit(0)
os.waitpid(child, 0)
print(resource_tracker._resource_tracker._pid is not None)
own.close(); own.unlink()
"""
    done = run_python(body, how, name)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert segment_exists(name)


def test_other_shared_memory_is_still_tracked(how: str, name: str) -> None:
    """Only this segment is kept from the tracker: a SharedMemory the user forgot is still cleaned up."""
    body = """
segment = open_it()
forgotten = shared_memory.SharedMemory(create=True, size=4096)
print(forgotten.name)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run_python(body, how, name)
    forgotten = done.stdout.strip()
    wait_until(lambda: not (SHM / forgotten).exists(), 5, "the tracker cleans up")
    assert segment_exists(name)


def test_threads_that_open_and_track_at_once_do_not_mix(name: str) -> None:
    """Keeping one name from the tracker lasts for one call, and only for that name."""
    body = """
import threading
segment = open_it()
tracker = resource_tracker.register
def churn():
    for _ in range(50):
        Segment.attach(name).close()
def track():
    for _ in range(50):
        mine = shared_memory.SharedMemory(create=True, size=4096)
        mine.close(); mine.unlink()
threads = [threading.Thread(target=work) for work in (churn, track, churn, track)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert shared_memory.resource_tracker.register == tracker
"""
    done = run_python(body, "create", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert segment_exists(name)
    assert remove_segment(name)


def test_a_gigabyte_that_was_never_committed_costs_nothing(name: str) -> None:
    """`allocated_bytes` is what the kernel counts, and reading the size does not change it."""
    segment = Segment.create(name, GIB)
    assert len(segment.buffer) == GIB
    assert segment.allocated_bytes == 0
    segment.close()
