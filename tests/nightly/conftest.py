"""What takes minutes is collected only where it is asked for: `pytest -m nightly`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out of a run that does not speak of nightly tests."""
    return None if "nightly" in config.option.markexpr else True
