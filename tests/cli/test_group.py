"""The command group: what it loads, what its options mean, and how a command's end becomes an exit status."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from heapd import __version__, errors
from heapd.cli import COMMANDS, LazyGroup, main
from heapd.cli.exit_codes import exit_code_of
from heapd.cli.params import SizeType, endpoint_option
from heapd.wire import Endpoint


def run(*arguments: str, **environ: str) -> Any:
    return CliRunner().invoke(main, arguments, env=environ)


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`ending(outcome)`: run a command that returns or raises `outcome`."""

    def end(outcome: Any) -> Any:
        @click.command()
        def command() -> Any:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(LazyGroup, "get_command", lambda self, ctx, name: command)
        return run("anything")

    return end


# -- commands ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_explains_itself(name: str) -> None:
    """What the table names is there."""
    answer = run(name, "--help")
    assert answer.exit_code == 0, answer.output
    assert "usage:" in answer.output.lower()


def test_help_lists_commands_and_exit_statuses() -> None:
    """Each with a line."""
    answer = run("--help")
    for name, (_, line) in COMMANDS.items():
        assert f"{name}  " in answer.output
        assert line in answer.output
    for code in (0, 1, 2, 3, 4, 5, 6, 130):
        assert re.search(rf"^ +{code} +\w", answer.output, re.MULTILINE)


def test_help_loads_no_command() -> None:
    """Nor zmq, nor rich: it answers at once."""
    program = (
        "import sys\n"
        "from heapd.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(str([name for name in ('zmq', 'rich', 'heapd.cli.serve') if name in sys.modules]))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "[]"


def test_version_is_the_packages() -> None:
    """As `heapd, version ...`."""
    assert run("--version").output == f"heapd, version {__version__}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    """Exit status 2."""
    answer = run("nope")
    assert answer.exit_code == 2
    assert "No such command 'nope'" in answer.output


# -- exit statuses -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (True, 0), ("text", 0)])
def test_an_int_that_a_command_returns_is_its_exit_status(ending: Any, returned: Any, status: int) -> None:
    """Nothing else is."""
    assert ending(returned).exit_code == status


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.NoSuchHeapError("x"), 1),
        (errors.SegmentError("x"), 1),
        (errors.DaemonNotFoundError("x"), 3),
        (errors.DaemonLostError("x"), 4),
        (errors.DaemonStoppedError("x"), 4),
        (errors.SessionLostError("x"), 4),
        (errors.VersionError("x"), 4),
        (errors.AccessError("x"), 4),
        (errors.DaemonRunningError("x"), 5),
        (errors.HeapFullError("x"), 6),
        (errors.BlockTooLargeError("x"), 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_and_its_status(ending: Any, error: errors.HeapdError, status: int) -> None:
    """Never a traceback."""
    answer = ending(error)
    assert (answer.exit_code, answer.stderr) == (status, "heapd: x\n")
    assert exit_code_of(error) == status


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), click.Abort()], ids=["ctrl-c", "abort"])
def test_an_interruption_ends_with_130(ending: Any, interruption: BaseException) -> None:
    """As shells have it."""
    answer = ending(interruption)
    assert answer.exit_code == 130
    assert "Traceback" not in answer.output


def test_ctrl_c_in_a_real_command_leaves_no_traceback() -> None:
    """Whatever it was doing."""
    program = """
import signal, sys
import heapd_client as hc
from heapd.cli import main
hc.daemon_status = lambda *_, **__: (print('asking', flush=True), signal.pause())
main(['status', 'nobody'])
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=10)
    assert process.returncode == 130
    assert complaints.strip() == ""


def test_a_program_may_call_the_group_itself() -> None:
    """Without an exit."""
    assert main(["--version"], standalone_mode=False) == 0


# -- options -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("text", "size"), [("4096", 4096), ("64KiB", 65536), ("64k", 65536), ("1.5 GiB", 3 << 29)])
def test_sizes_have_units(text: str, size: int) -> None:
    """Binary ones."""
    assert SizeType().convert(text, None, None) == size
    assert SizeType().convert(size, None, None) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "4QiB", "99999999999999TiB", "1KiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Nor one below the minimum."""
    with pytest.raises(click.BadParameter):
        SizeType(minimum=2048).convert(text, None, None)


@pytest.mark.parametrize(
    ("arguments", "environ", "endpoint"),
    [
        (["-e", "ipc:///run/a/b"], {"HEAPD_ENDPOINT": "ipc:///run/x/y"}, "ipc:///run/a/b"),
        (["--endpoint", "b"], {"HEAPD_RUNTIME_DIR": "/run/a"}, "ipc:///run/a/b"),
        ([], {"HEAPD_ENDPOINT": "ipc:///run/x/y"}, "ipc:///run/x/y"),
        ([], {"HEAPD_RUNTIME_DIR": "/run/a"}, "ipc:///run/a/default"),
    ],
)
def test_an_endpoint_comes_from_the_option_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environ: dict[str, str], endpoint: str
) -> None:
    """In this order."""
    monkeypatch.delenv("HEAPD_ENDPOINT", raising=False)
    seen: list[Endpoint] = []

    @click.command()
    @endpoint_option
    def command(endpoint: Endpoint) -> None:
        seen.append(endpoint)

    answer = CliRunner().invoke(command, arguments, env=environ)
    assert answer.exit_code == 0, answer.output
    assert str(seen[0]) == endpoint


@pytest.mark.parametrize("command", ["status", "stop", "metrics"])
def test_two_daemons_on_one_command_line_are_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, runtime_dir: Path, command: str
) -> None:
    """As an argument and as an option, unless they are the same one; the argument goes before the environment."""
    answer = run(command, "a", "-e", "b")
    assert answer.exit_code == 2
    assert f"two daemons are named, ipc://{runtime_dir}/a and ipc://{runtime_dir}/b" in answer.output
    assert run(command, "a", "-e", f"ipc://{runtime_dir}/a").exit_code == 3
    monkeypatch.setenv("HEAPD_ENDPOINT", "b")
    assert f"{runtime_dir}/a" in run(command, "a").output


@pytest.mark.parametrize("reserve", ["0", "1", "15MiB", "-1", "x"])
def test_a_reserve_that_is_too_small_is_a_usage_error(runtime_dir: Path, reserve: str) -> None:
    """Before anything is made."""
    answer = run("serve", "--reserve", reserve)
    assert answer.exit_code == 2
    assert "--reserve" in answer.output
    assert list(runtime_dir.iterdir()) == []


def test_an_endpoint_that_is_none_is_a_usage_error() -> None:
    """With what one is."""
    answer = run("status", "-e", "a b")
    assert answer.exit_code == 2
    assert "ipc://DIRECTORY/NAME" in answer.output
