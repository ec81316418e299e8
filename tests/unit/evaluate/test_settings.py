"""Names of benchmarks and of sets of them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dpa.evaluate.settings import PAPER, EvaluateSettings, expand_names


def test_sets_become_their_benchmarks_once_each() -> None:
    assert expand_names(["lab", "paper"]) == ("lab", *PAPER)
    assert expand_names(["mmvp", "all", "lab"]) == ("mmvp", *(name for name in PAPER if name != "mmvp"), "lab")
    assert EvaluateSettings.model_validate({"benchmarks": ["paper"]}).benchmarks == PAPER
    assert EvaluateSettings.model_validate({"benchmarks": "mmvp,lab"}).benchmarks == ("mmvp", "lab")
    assert EvaluateSettings().benchmarks == ()


@pytest.mark.parametrize("value", [["nothing"], [3], "paper,"])
def test_unknown_names_are_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        EvaluateSettings.model_validate({"benchmarks": value})


def test_a_written_recipe_reads_the_same() -> None:
    settings = EvaluateSettings(benchmarks=PAPER, blind=False)
    assert EvaluateSettings.model_validate(settings.model_dump(mode="json")) == settings
