"""The evaluation during stage 3: what it writes, and that the training does not notice."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpa
from dpa.analyze.runs import read_run
from dpa.errors import RecipeError, UserError
from dpa.models.digest import digest_of_model
from dpa.pipeline import dry_run
from dpa.pipeline import during as module
from dpa.pipeline.during import undisturbed
from dpa.testing.project import write_project
from dpa.train.metrics import read_metrics
from tests.stages import untimed


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The tiny project, and four questions about its pictures; the recipe's path."""
    recipe = write_project(tmp_path / "project")
    folder = recipe.parent
    questions = [
        {
            "id": f"q{n}",
            "scene": f"s{n}",
            "image": f"images/deep/{n} picture.jpg",
            "question": f"what is it {n}?",
            "answer": "red",
            "kind": "colour",
            "choices": ["red", "blue"],
        }
        for n in range(4)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    return recipe


def trained(recipe: Path, name: str, **more: Any) -> tuple[list[dict[str, Any]], str, list[dict[str, Any]]]:
    """Rows of steps, digest of the checkpoint, lines of evaluations; each run has a store of its own."""
    settings = {"name": name, "method": "vanilla", "output": str(recipe.parent / name), **more}
    result = dpa.run(dpa.load_recipe(recipe, settings))
    path = result.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    evaluations = [line for line in lines if "kind" in line]
    assert len(read_metrics(path)) == len(lines) - len(evaluations)
    assert read_run(result.folder).metrics("vanilla") == read_metrics(path)
    return untimed(read_metrics(path)), digest_of_model(result.checkpoint), evaluations


def evaluating(recipe: Path) -> dict[str, Any]:
    return {
        "evaluate.benchmarks": ["lab"],
        "evaluate.data": str(recipe.parent),
        "evaluate.max_new_tokens": 3,
        "evaluate.blind": False,
        "evaluate.every_steps": 2,
        "evaluate.every_limit": 3,
    }


class Careless:
    """An evaluation that draws from all generators and forgets what it found."""

    def __init__(self) -> None:
        self.real = module.run_benchmarks

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        found = self.real(*arguments, **settings)
        torch.rand(3), random.random(), np.random.rand(3)
        torch.use_deterministic_algorithms(False)
        torch.set_grad_enabled(False)
        return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_the_same_to_the_bit(project: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"train.precision": precision, "stages.finetune.gradient_checkpointing": True}
    rows, weights, none = trained(project, "without", **plain)
    monkeypatch.setattr(module, "run_benchmarks", Careless())
    with_rows, with_weights, evaluations = trained(project, "with", **plain, **evaluating(project))
    assert (with_rows, with_weights) == (rows, weights)
    assert none == []
    (line,) = evaluations  # 3 steps, every 2; stage 2 has none
    assert (line["step"], line["stage"], line["kind"]) == (2, "finetune", "evaluation")
    assert line["benchmarks"]["lab"]["n"] == 3
    assert 0 <= line["benchmarks"]["lab"]["accuracy"] <= 1


def test_all_is_put_back() -> None:
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with suppress(KeyError), undisturbed(torch.device("cpu")):
            assert not torch.is_grad_enabled()
            torch.rand(3), random.random(), np.random.rand(3)
            raise KeyError
        assert torch.is_grad_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_what_cannot_be_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"every_steps needs evaluate\.benchmarks"):
        dpa.load_recipe(project, {"evaluate.every_steps": 2})
    recipe = dpa.load_recipe(project, {**evaluating(project), "parallel": "fsdp"})
    dry_run(recipe)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="every_steps with parallel fsdp on 2 ranks"):
        dry_run(recipe)
