"""Relevance maps on a stage's way: where and what they are, and that the training does not notice them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dpa
from dpa.analyze.maps import read_maps
from dpa.analyze.runs import MAPS, read_run
from dpa.errors import ModelError
from dpa.launch import Launch
from dpa.models.legacy import read_connector
from dpa.pipeline import maps
from dpa.pipeline import stages as stage_table
from dpa.pipeline.explain import explain_samples
from dpa.pipeline.stages import Made, StageRun
from dpa.recipe import STAGES, StageName, load_recipe
from dpa.store import Store
from dpa.testing.project import write_project
from dpa.train.ranks import Ranks


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its LLM has dropout, so that a number drawn too much or a flag left behind changes the weights."""
    path = write_project(tmp_path_factory.mktemp("maps") / "project")
    config = path.parent / "llm" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.3}))
    return path


def made(project: Path, name: str, **given: Any) -> Path:
    store = str(project.parent / f"store-{name}")
    settings = {"name": name, "store": store, "methods": ["dpa"], "stages.pretrain.max_steps": 7}
    return dpa.run(load_recipe(project, settings | given)).folder


@pytest.fixture(scope="module")
def watched(project: Path) -> Path:
    return made(project, "watched", **{"evaluate.maps": 2})


def test_moments() -> None:
    assert [sorted(maps.moments(steps)) for steps in (0, 1, 3, 5)] == [[], [1], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert sorted(maps.moments(2181)) == [1, 546, 1091, 1636, 2181]


def test_the_training_does_not_notice(project: Path, watched: Path) -> None:
    plain = made(project, "plain", **{"evaluate.maps": 0})
    assert not (plain / MAPS).exists()
    keys = [
        {name: stage["key"] for name, stage in read_run(folder).summary["methods"]["dpa"]["stages"].items()}
        for folder in (watched, plain)
    ]
    assert keys[0] == keys[1]
    first, second = (read_connector(folder / "connector" / "mm_projector.bin") for folder in (watched, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole = [load_file(folder / "checkpoint" / "model.safetensors") for folder in (watched, plain)]
    assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[0])


def test_what_is_kept(watched: Path) -> None:
    stages = read_maps(read_run(watched).lines("dpa", MAPS))
    assert [(stage.stage, stage.objective) for stage in stages] == [("pretrain", "cmo"), ("finetune", "cmo")]
    pretrain, finetune = stages
    for sample in pretrain.samples:
        assert [step for step, _ in sample.steps] == [1, 3, 4, 5, 7]
        assert sample.pictures[0][0].startswith("data:image/png;base64,")
        texts = {tuple(token.text for token in tokens) for _, tokens in sample.steps}
        assert len(texts) == 1
    assert finetune.samples[0].prompts[0].startswith("what is it")
    # the last step's numbers are those of the stage's model, and the samples are dpa explain's
    rows = explain_samples([str(watched)], samples=2)
    for (explanation,), sample in zip(rows, pretrain.samples, strict=True):
        assert explanation.sample == sample.name
        for told, kept in zip(explanation.tokens, sample.steps[-1][1], strict=True):
            assert kept.text == told.text
            assert kept.logp_with == pytest.approx(told.logp_with, abs=2e-5)  # stored with five decimals
            assert kept.relevance == pytest.approx(told.relevance, abs=2e-5)


@pytest.mark.parametrize(
    ("parallel", "stages"), [("ddp", ["pretrain", "finetune"]), ("zero2", ["pretrain"]), ("fsdp", ["pretrain"])]
)
def test_a_stage_of_whole_copies_has_maps(
    project: Path, parallel: str, stages: list[StageName], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``parallel`` shards stage 3 alone."""
    monkeypatch.setattr(stage_table, "watch_relevance", lambda *_, **__: print)
    recipe = load_recipe(project, {"parallel": parallel})
    entry, ranks = Store(project.parent / "store").entry("any", {}), Ranks(Launch(rank=0, world=2, local_rank=0), None)
    found = []
    for stage in STAGES:
        given: Any = (recipe, "dpa", stage, None, None, {}, entry, project.parent, ranks)
        vlm: Any = None if stage == "proxy" else object()
        if stage_table._hooks(StageRun(*given), Made(torch.nn.Linear(1, 1), vlm), steps=3):
            found.append(stage)
    assert found == stages


def test_a_map_that_cannot_be_made_stops_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("no text-only pass")

    monkeypatch.setattr(maps, "explain_drawn", refuse)
    folder = made(project, "refused", methods=["vanilla"])
    assert not (folder / MAPS).exists()
    assert "no relevance maps" in caplog.text
