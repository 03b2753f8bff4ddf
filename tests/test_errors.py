"""heapd.errors by itself: codes, kinds, and the way over the wire and through pickle."""

from __future__ import annotations

import builtins
import inspect
import pickle
import re

import pytest

from heapd import errors
from heapd.errors import HeapdError, HeapFullError, error_from_wire, error_to_wire

# Pinned: a code is part of the protocol and never changes its meaning.
CODES = {
    1: "HeapdError",
    2: "InternalError",
    10: "HeapFullError",
    11: "BlockTooLargeError",
    12: "CannotResizeInPlaceError",
    13: "QuotaError",
    20: "InvalidArgumentError",
    21: "NotABlockError",
    22: "WrongHeapError",
    23: "DoubleFreeError",
    24: "StaleHandleError",
    30: "NoSuchHeapError",
    31: "HeapDestroyedError",
    32: "HeapExistsError",
    33: "NoSuchNameError",
    34: "NotPermittedError",
    35: "LimitError",
    40: "WaitTimeoutError",
    41: "LockTimeoutError",
    42: "LockNotHeldError",
    43: "BlockInUseError",
    44: "ClosedError",
    45: "ExecuteError",
    46: "MissingExtraError",
    50: "DaemonError",
    51: "DaemonNotFoundError",
    52: "DaemonLostError",
    53: "DaemonStoppedError",
    54: "SessionLostError",
    55: "VersionError",
    56: "DaemonRunningError",
    57: "AccessError",
    58: "SegmentError",
    60: "MessageError",
    61: "MessageTooLargeError",
    62: "UnknownOpError",
}

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, HeapdError)]
every_error = pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
DETAILS: dict[str, str | int | None] = {"heap": 7, "name": "frames", "holder_pid": None}


def test_codes_are_unique_and_pinned() -> None:
    """Each class has a code of its own, the one it has always had."""
    assert len({kind.code for kind in ALL}) == len(ALL)
    assert {kind.code: kind.__name__ for kind in ALL} == CODES


@every_error
def test_each_class_says_its_own_code(kind: type[HeapdError]) -> None:
    """No class inherits its parent's code by omission, and each is exported."""
    assert "code" in vars(kind)
    assert kind.__name__ in errors.__all__


@every_error
def test_it_pickles(kind: type[HeapdError]) -> None:
    """Through pickle, as multiprocessing sends it: same class, message and details."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(kind("it broke", **DETAILS), protocol))
        assert type(copy) is kind
        assert (copy.message, str(copy), copy.details) == ("it broke", "it broke", DETAILS)


@every_error
def test_it_round_trips_the_wire(kind: type[HeapdError]) -> None:
    """Code, message and details make the same error on the other side."""
    copy = error_from_wire(*error_to_wire(kind("it broke", **DETAILS)))
    assert type(copy) is kind
    assert (str(copy), copy.details) == ("it broke", DETAILS)


@every_error
def test_it_can_be_raised_bare(kind: type[HeapdError]) -> None:
    """Message and details are optional, whatever built-in kind it also is."""
    with pytest.raises(kind) as caught:
        raise kind
    assert (str(caught.value), caught.value.details) == ("", {})


def test_each_is_of_the_built_in_kind_that_the_tree_names() -> None:
    """The tree at the top of errors.py is true: users may catch the kind in brackets."""
    drawn = re.findall(r"\+-- (\w+) \((\w+)\)", errors.__doc__ or "")
    assert len(drawn) > 20
    for name, base in drawn:
        assert issubclass(getattr(errors, name), getattr(builtins, base)), name


def test_the_tree_names_every_error() -> None:
    """No error is missing in the tree; HeapdError is its root, InternalError the daemon's own fault."""
    drawn = set(re.findall(r"(\w+Error)\b", errors.__doc__ or ""))
    assert {kind.__name__ for kind in ALL} - drawn <= {"InternalError"}


@pytest.mark.parametrize("kind", [HeapFullError, errors.DaemonLostError, errors.LockTimeoutError, errors.AccessError])
def test_an_os_errors_errno_does_not_hide_the_message(kind: type[HeapdError]) -> None:
    """Even those that are OSErrors print their message alone."""
    assert str(kind("no room", errno=28)) == "no room"


def test_an_unknown_code_becomes_the_base_error() -> None:
    """A newer daemon's error still arrives, with its message."""
    error = error_from_wire(9999, "something new", {"figure": 3})
    assert type(error) is HeapdError
    assert (str(error), error.details) == ("something new", {"figure": 3})


def test_heap_full_says_its_figures() -> None:
    """Requested, used and limit are in the text and as attributes, before and after the wire."""
    error = HeapFullError.of("commit", requested=65536, used=2**20, limit=2**21, advice="raise --commit-limit")
    assert str(error) == ("64 KiB requested, 1 MiB of 2 MiB used (the daemon's commit limit); raise --commit-limit")
    copy = error_from_wire(*error_to_wire(error))
    assert isinstance(copy, HeapFullError)
    assert (copy.requested, copy.used, copy.limit, copy.bound) == (65536, 2**20, 2**21, "commit")


def test_heap_full_without_figures_reads_as_zero() -> None:
    """The attributes are there even if an older daemon sent no details."""
    error = HeapFullError("full")
    assert (error.requested, error.used, error.limit, error.bound) == (0, 0, 0, "")
