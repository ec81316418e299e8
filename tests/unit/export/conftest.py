"""Finished runs on tiny parts, one per family, once per test process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dpa
from dpa.testing.parts import TinyFamily
from dpa.testing.project import write_project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyFamily], Path]:
    """``finished("llama2")`` is the folder of a run of method dpa. Not to be changed."""
    made: dict[TinyFamily, Path] = {}

    def run(family: TinyFamily) -> Path:
        if family not in made:
            recipe = write_project(tmp_path_factory.mktemp("export") / "project", family=family)
            made[family] = dpa.run(dpa.load_recipe(recipe, ["method=dpa"])).folder
        return made[family]

    return run
