"""heapd.arena.budget by itself: the cap is asked before every commit, and every refusal says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from heapd.arena import Budget, Headroom, budget, default_commit_limit
from heapd.errors import HeapFullError
from heapd.units import GIB, MIB

PLENTY = Headroom(1 << 50, "memory")


class Machine:
    """A machine whose headroom the test sets; counts the readings."""

    def __init__(self, size: int, source: str = "shm") -> None:
        self.room = Headroom(size, source)
        self.readings = 0

    def __call__(self) -> Headroom:
        self.readings += 1
        return self.room


# -- the configured limit ----------------------------------------------------------------------------------------------
def test_the_limit_can_be_reached_to_the_byte_but_not_passed() -> None:
    """The last byte is granted, the one after it refused."""
    purse = Budget(10_000, measure=lambda: PLENTY)
    purse.take(10_000)
    with pytest.raises(HeapFullError):
        purse.take(1)
    assert purse.committed == 10_000


def test_a_refusal_counts_nothing_and_tells_its_figures() -> None:
    """`requested`, `used`, `limit` and `bound` are those of the refused commit, and the text names the option."""
    purse = Budget(100, measure=lambda: PLENTY)
    purse.take(60)
    with pytest.raises(HeapFullError, match="--commit-limit") as refused:
        purse.take(41)
    error = refused.value
    assert (error.bound, error.requested, error.used, error.limit) == ("commit", 41, 60, 100)
    assert purse.committed == 60
    purse.take(40)


def test_what_is_given_back_may_be_taken_again() -> None:
    """`committed` goes down with every give, `peak` never."""
    purse = Budget(100, measure=lambda: PLENTY)
    purse.take(100)
    purse.give(70)
    assert (purse.committed, purse.peak) == (30, 100)
    purse.take(70)
    assert (purse.committed, purse.peak) == (100, 100)


# -- the machine -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "advice"),
    [("shm", "docker run --shm-size"), ("cgroup", "docker run --memory"), ("memory", "end other programs")],
)
def test_a_machine_without_room_refuses_and_the_advice_fits_the_bound(source: str, advice: str) -> None:
    """Whatever is short, the text names the knob for it, and the limit shown is what is used plus what is left."""
    machine = Machine(5 * MIB, source)
    purse = Budget(GIB, measure=machine)
    purse.take(2 * MIB)
    machine.room = Headroom(3 * MIB, source)
    with pytest.raises(HeapFullError, match=advice) as refused:
        purse.take(4 * MIB)
    error = refused.value
    assert (error.bound, error.requested, error.used, error.limit) == ("memory", 4 * MIB, 2 * MIB, 5 * MIB)
    assert purse.committed == 2 * MIB


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The module's clock, in a list of one: it stands still at 1 s until the test moves it."""
    now = [1_000_000_000]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic_ns=lambda: now[0]))
    return now


@pytest.mark.usefixtures("now")
def test_a_reading_is_good_for_many_small_commits() -> None:
    """The machine is not asked for each of a thousand pages: a reading costs as much as a commit."""
    machine = Machine(GIB)
    purse = Budget(GIB, measure=machine)
    for _ in range(1000):
        purse.take(4096)
    assert machine.readings == 1


@pytest.mark.usefixtures("now")
def test_a_reading_is_not_good_for_more_than_it_found() -> None:
    """With 1 MiB left the 257th page is refused, however fresh the reading."""
    machine = Machine(MIB)
    purse = Budget(GIB, measure=machine)
    for _ in range(256):
        purse.take(4096)
    machine.room = Headroom(0, "shm")
    with pytest.raises(HeapFullError):
        purse.take(4096)


@pytest.mark.usefixtures("now")
def test_a_large_commit_is_always_measured() -> None:
    """One that exceeds what the last reading may be spent for asks the machine again."""
    machine = Machine(GIB)
    purse = Budget(4 * GIB, measure=machine)
    purse.take(4096)
    machine.room = Headroom(100 * MIB, "cgroup")
    with pytest.raises(HeapFullError, match="cgroup"):
        purse.take(200 * MIB)


def test_an_old_reading_is_not_trusted(now: list[int]) -> None:
    """Other programs use memory, too: after a tenth of a second the machine is asked again."""
    machine = Machine(GIB)
    purse = Budget(GIB, measure=machine)
    purse.take(4096)
    machine.room = Headroom(0, "memory")
    purse.take(4096)
    now[0] += 200_000_000
    with pytest.raises(HeapFullError):
        purse.take(4096)


# -- reading the machine -----------------------------------------------------------------------------------------------
Files = Callable[[dict[str, str]], None]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Files:
    """Puts files below a root of the test's own, from where the module reads /proc and /sys from then on."""

    def write(contents: dict[str, str]) -> None:
        for name, text in contents.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(budget, "Path", lambda path: tmp_path / str(path).lstrip("/"))

    return write


def test_cgroup_v2_limit_less_what_is_used_is_left(files: Files) -> None:
    """memory.max - memory.current of the process's own cgroup."""
    files(
        {
            "/proc/self/cgroup": "0::/user.slice/job\n",
            "/sys/fs/cgroup/user.slice/job/memory.max": f"{100 * MIB}\n",
            "/sys/fs/cgroup/user.slice/job/memory.current": f"{30 * MIB}\n",
        }
    )
    assert budget._cgroup_left() == 70 * MIB


def test_the_tightest_cgroup_on_the_way_up_counts(files: Files) -> None:
    """A parent's limit binds its children, even where the child's own says max."""
    files(
        {
            "/proc/self/cgroup": "0::/box/job\n",
            "/sys/fs/cgroup/box/job/memory.max": "max\n",
            "/sys/fs/cgroup/box/job/memory.current": "5\n",
            "/sys/fs/cgroup/box/memory.max": f"{64 * MIB}\n",
            "/sys/fs/cgroup/box/memory.current": f"{60 * MIB}\n",
        }
    )
    assert budget._cgroup_left() == 4 * MIB


def test_cgroup_v1_is_read_as_well(files: Files) -> None:
    """The memory controller among several, its own file names, and its way of saying that there is no limit."""
    files(
        {
            "/proc/self/cgroup": "5:cpu,memory:/docker/abc\n0::/\n",
            "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{32 * MIB}\n",
            "/sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": f"{MIB}\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        }
    )
    assert budget._cgroup_left() == 31 * MIB


@pytest.mark.parametrize(
    "contents",
    [
        {},
        {"/proc/self/cgroup": "3:cpu:/x\n"},
        {"/proc/self/cgroup": "0::/x\n"},
        {
            "/proc/self/cgroup": "0::/x\n",
            "/sys/fs/cgroup/x/memory.max": "max\n",
            "/sys/fs/cgroup/x/memory.current": "1\n",
        },
        {
            "/proc/self/cgroup": "0::/x\n",
            "/sys/fs/cgroup/x/memory.max": "123\n",
            "/sys/fs/cgroup/x/memory.current": "not a number\n",
        },
    ],
    ids=["no proc", "no memory controller", "no files", "max", "nonsense"],
)
def test_without_a_readable_cgroup_limit_there_is_none(files: Files, contents: dict[str, str]) -> None:
    """A missing or unreadable file is no limit, and no error."""
    files(contents)
    assert budget._cgroup_left() is None


def test_available_memory_keeps_a_margin_for_others(files: Files) -> None:
    """MemAvailable less a 32nd of the memory, at least 64 MiB."""
    files({"/proc/meminfo": f"MemTotal: {32 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {10 * MIB} kB\n"})
    assert budget._memory_left() == 10 * GIB - GIB
    files({"/proc/meminfo": f"MemTotal: {MIB} kB\nMemAvailable: {MIB // 2} kB\n"})
    assert budget._memory_left() == 512 * MIB - 64 * MIB


@pytest.mark.parametrize("text", [None, "MemTotal: 5 kB\n", "MemAvailable: x\nMemTotal: y\n"])
def test_an_unreadable_meminfo_is_no_bound(files: Files, text: str | None) -> None:
    """Missing file, missing field, nonsense: the other bounds decide."""
    files({} if text is None else {"/proc/meminfo": text})
    assert budget._memory_left() is None


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ((5, 9, 9), Headroom(5, "shm")),
        ((9, 5, 9), Headroom(5, "cgroup")),
        ((9, 9, 5), Headroom(5, "memory")),
        ((9, None, None), Headroom(9, "shm")),
        ((9, -7, 9), Headroom(0, "cgroup")),
    ],
)
def test_headroom_is_the_tightest_bound_and_never_negative(
    monkeypatch: pytest.MonkeyPatch, left: tuple[int, int | None, int | None], expected: Headroom
) -> None:
    """Where a bound is not there it does not count; one that is passed already leaves nothing."""
    for name, size in zip(("shm_left", "_cgroup_left", "_memory_left"), left, strict=True):
        monkeypatch.setattr(budget, name, lambda size=size: size)
    assert budget.measure_headroom() == expected


def test_the_default_limit_is_what_is_left_less_a_sixteenth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is not told takes all but a margin; where nothing is left, the machine is what refuses."""
    monkeypatch.setattr(budget, "measure_headroom", lambda: Headroom(1600 * MIB, "shm"))
    assert default_commit_limit() == 1500 * MIB
    monkeypatch.setattr(budget, "measure_headroom", lambda: Headroom(0, "shm"))
    assert default_commit_limit() == MIB


def test_this_machine_can_be_measured() -> None:
    """The real files of this machine are understood: there is room, and one of the three bounds is named."""
    room = budget.measure_headroom()
    assert room.size > 0
    assert room.source in ("shm", "cgroup", "memory")
