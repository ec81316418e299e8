"""Stage 2 with weights that the data gives (objective ``spans``): the lab's true visual words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dpa
from dpa.errors import DataError, RecipeError
from dpa.lab.make import make_lab
from dpa.recipe import Recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spans") / "lab"
    make_lab(folder, caption_scenes=8, instruction_scenes=2, heldout_scenes=2, questions_per_scene=1)
    return folder


def recipe(captions: Path, output: Path, *overrides: str) -> Recipe:
    tree = {
        "name": "spans",
        "method": "pmo",
        "output": str(output),
        "model": {"llm": "lab:llm", "vision_tower": "lab:tower"},
        "data": {
            "captions": {"path": str(captions)},
            "instructions": {"path": str(captions.with_name("instructions.json"))},
            "workers": 0,
        },
        "stages": {
            "proxy": {"max_steps": 1, "global_batch": 2, "micro_batch": 2, "learning_rate": 0.01, "max_length": 256},
            "pretrain": {"global_batch": 8, "micro_batch": 8, "max_steps": 1, "max_length": 256, "objective": "spans"}
            | {"minimum": 0, "maximum": 1},
        },
        "train": {"threads": 1, "trackers": []},
    }
    output.mkdir(exist_ok=True)
    path = output / "recipe.json"
    path.write_text(json.dumps(tree))
    return dpa.load_recipe(path, list(overrides))


def test_only_visual_words_weigh(data: Path, tmp_path: Path) -> None:
    result = dpa.run(recipe(data / "captions_b.json", tmp_path / "run"), until="pretrain")
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row.get("stage") == "pretrain" and "loss" in row)
    captions = json.loads((data / "captions_b.json").read_text())
    words = sum(len(caption["visual_spans"]) for caption in captions)
    assert row["samples"] == len(captions)
    visual = row["mean_weight"] * row["tokens"]
    assert visual == pytest.approx(round(visual), abs=1e-3)
    assert words <= round(visual) < row["tokens"] / 2  # a word is one token or more
    assert row["loss"] != pytest.approx(row["nll"], rel=0.05)


def test_captions_without_marks_are_named(data: Path, tmp_path: Path) -> None:
    captions = json.loads((data / "captions_b.json").read_text())
    for caption in captions[2:]:
        del caption["visual_spans"]
    bare = data / "bare.json"
    bare.write_text(json.dumps(captions))
    with pytest.raises(DataError, match="not marked: objective spans needs visual_spans"):
        dpa.run(recipe(bare, tmp_path / "run"), until="pretrain")


def test_only_stage_2_reads_marks(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stages\.finetune.objective spans: only stage 2's captions are marked"):
        recipe(data / "captions_b.json", tmp_path / "run", "stages.finetune.objective=spans")
    with pytest.raises(RecipeError, match=r"set stages\.pretrain\.format=plain"):
        recipe(data / "captions_b.json", tmp_path / "run", "stages.pretrain.format=chat")
