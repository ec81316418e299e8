"""The benchmarks in miniature."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpa.testing.benchmarks import write_benchmarks


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not change it; copy what a test changes."""
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))
