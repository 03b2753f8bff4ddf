"""The distribution: one version everywhere, typed packages, scripts that can be run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import heapd

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_changelog_is_about_this_version() -> None:
    """The newest entry of CHANGELOG.md is the package's version."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == heapd.__version__


def test_the_version_stands_in_one_place() -> None:
    """pyproject.toml takes the version from heapd/__init__.py, and what is installed has it."""
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "heapd.__version__"}
    assert "version" not in PROJECT["project"]
    try:
        installed = metadata.version("heapd")
    except metadata.PackageNotFoundError:
        pytest.skip("heapd is not installed, only on the path")
    assert installed == heapd.__version__


@pytest.mark.parametrize("package", ["heapd", "client/heapd_client"])
def test_the_packages_are_typed(package: str) -> None:
    """Type checkers read both packages' annotations."""
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.nightly
def test_a_type_checker_sees_the_types_from_outside_the_checkout(tmp_path: Path) -> None:
    """In the environment that scripts/setup makes, for a program that lies anywhere."""
    pytest.importorskip("mypy")
    if not (Path(sysconfig.get_path("purelib")) / "heapd-checkout.pth").exists():
        pytest.skip("this environment was not made by scripts/setup")
    (tmp_path / "program.py").write_text(
        "import heapd_client as hc\n"
        "with hc.connect() as session:\n"
        "    reveal_type(session.create_heap().alloc(64).view)\n"
        "    session.create_heap().alloc('64')\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "program.py"],
        cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True, check=False,
    ).stdout  # fmt: skip
    assert 'Revealed type is "memoryview' in told
    assert 'program.py:4: error: Argument 1 to "alloc"' in told
    assert 'has incompatible type "str"; expected "int"' in told
    assert "Found 1 error" in told


def test_the_extras_are_those_the_readme_names() -> None:
    """numpy, plot, metrics, all, dev."""
    assert set(PROJECT["project"]["optional-dependencies"]) == {"numpy", "plot", "metrics", "all", "dev"}


@pytest.mark.parametrize("name", ["setup", "check", "test", "demo", "bench", "example", "enumerate_heaps", "nightly"])
def test_the_scripts_can_be_run(name: str) -> None:
    """They are executable, and bash can parse them."""
    script = ROOT / "scripts" / name
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_importing_the_client_needs_no_extra() -> None:
    """`import heapd_client` loads neither numpy nor another optional package, nor the daemon's side."""
    program = "import sys, heapd_client; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True).stdout.decode().split()
    )
    assert not loaded & {
        "numpy",
        "matplotlib",
        "prometheus_client",
        "click",
        "rich",
        "multiprocessing.resource_tracker",
    }
    assert not {
        name for name in loaded if name.startswith(("heapd.server", "heapd.manager", "heapd.heap", "heapd.arena"))
    }
