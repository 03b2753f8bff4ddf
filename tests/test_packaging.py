"""The distribution: one version everywhere, typed packages, scripts that can be run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
