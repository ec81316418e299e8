"""A tiny LLM that has read nothing, and captions of which some repeat a phrase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpa.analyze.conflict import Caption
from dpa.models.settings import ModelSettings
from dpa.testing.parts import write_tiny_llm

_SUBJECTS = ("a red circle", "a blue square", "two green stars", "a ring", "the cross", "three tiny boxes")
_TAILS = ("on the left.", "near the top", "in the middle of a dark background!", "")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    return ModelSettings(llm=str(write_tiny_llm(tmp_path_factory.mktemp("conflict") / "llm")))


def captions(count: int) -> list[Caption]:
    """Different ones, the even ones with "behold the" in them."""
    found = []
    for number in range(count):
        subject, tail = _SUBJECTS[number % len(_SUBJECTS)], _TAILS[number % len(_TAILS)]
        middle = "we see, behold the wonder" if number % 2 == 0 else "there is"
        found.append(Caption(f"c{number}", f"{subject} {middle} {number} {tail}".strip(), f"captions, record {number}"))
    return found


def write(path: Path, records: list[object]) -> Path:
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
