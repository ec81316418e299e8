"""What stage 2 did: probes on its way change nothing; the original LLM with its connector afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dpa
from dpa.analyze.runs import PROBES
from dpa.errors import RecipeError
from dpa.lab.make import make_lab
from dpa.models.legacy import read_connector
from dpa.pipeline.measure import MEASUREMENTS
from dpa.recipe import Recipe

STAGE = {"global_batch": 2, "micro_batch": 2, "max_length": 256, "save_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure") / "lab"
    make_lab(folder, caption_scenes=8, instruction_scenes=8, heldout_scenes=4, questions_per_scene=2)
    return folder


def recipe(data: Path, output: Path, **evaluate: Any) -> Recipe:
    tree = {
        "name": "measured",
        "method": "pmo",
        "output": str(output),
        "model": {"llm": "lab:llm", "vision_tower": "lab:tower"},
        "data": {
            "captions": {"path": str(data / "captions_b.json")},
            "instructions": {"path": str(data / "instructions.json")},
            "workers": 0,
        },
        "stages": {
            "proxy": STAGE | {"max_steps": 2, "learning_rate": 0.01, "lora": {"rank": 4, "alpha": 8}},
            "pretrain": STAGE | {"max_steps": 4, "learning_rate": 0.02},
            "finetune": STAGE | {"max_steps": 1},
        },
        "train": {"threads": 1, "trackers": []},
        "evaluate": {"benchmarks": ["lab"], "data": str(data), **evaluate},
    }
    path = output.with_suffix(".json")
    path.write_text(json.dumps(tree))
    return dpa.load_recipe(path)


def test_probes_and_stage_2_alone(data: Path, tmp_path: Path) -> None:
    watched = dpa.run(recipe(data, tmp_path / "watched", probe_steps=[1, 3], after_pretrain=True), until="pretrain")
    plain = dpa.run(recipe(data, tmp_path / "plain"), until="pretrain")
    first, second = (read_connector(result.folder / "connector" / "mm_projector.bin") for result in (watched, plain))
    assert all(torch.equal(first[name], second[name]) for name in first), "to look changes nothing"
    store = (watched.folder / "connector").resolve().parent
    lines = [json.loads(line) for line in (store / PROBES).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert lines[0]["visual_logp_b"] != lines[1]["visual_logp_b"]
    found = json.loads((watched.folder / MEASUREMENTS).read_text())
    assert all(isinstance(value, int | float) for value in found.values())
    assert 0 <= found["pretrain.lab.accuracy"] <= 1
    assert found["probe.first.visual_logp_b"] == lines[0]["visual_logp_b"]
    assert found["probe.last.step"] == 3
    # the proxy was trained on B, the original LLM was not
    assert found["pretrain.probe.linguistic_logp_blind_b"] != found["probe.last.linguistic_logp_blind_b"]
    assert not (plain.folder / MEASUREMENTS).exists()


def test_the_original_llms_words_alone(data: Path, tmp_path: Path) -> None:
    found = dpa.run(recipe(data, tmp_path / "words", probe_steps=[4], after_pretrain="probe"), until="pretrain")
    measured = json.loads((found.folder / MEASUREMENTS).read_text())
    assert measured["pretrain.probe.linguistic_logp_b"] < 0
    assert measured["probe.last.step"] == 4
    assert not any(name.startswith("pretrain.lab.") for name in measured)
    with pytest.raises(RecipeError, match="probe_steps"):
        recipe(data, tmp_path / "nothing", after_pretrain="probe")
