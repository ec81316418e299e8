"""Tiny model folders, written once per test process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dpa.models.settings import ModelSettings
from dpa.testing.parts import TINY_FAMILIES, TOWER_KINDS, write_tiny_llm, write_tiny_tower


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads cost more than they give at these sizes, and change the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one folder per family and per tower kind."""
    root = tmp_path_factory.mktemp("parts")
    for family in TINY_FAMILIES:
        write_tiny_llm(root / family, family)
    for kind in TOWER_KINDS:
        write_tiny_tower(root / kind, kind)
    return root


@pytest.fixture(scope="session")
def settings(parts: Path) -> Callable[..., ModelSettings]:
    """``settings("gemma2", "siglip", vision_feature_layer=-1)``."""

    def make(llm: str = "qwen2", tower: str = "clip", **more: object) -> ModelSettings:
        return ModelSettings.model_validate({"llm": str(parts / llm), "vision_tower": str(parts / tower), **more})

    return make
