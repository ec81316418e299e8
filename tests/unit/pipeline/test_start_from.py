"""Stage 3 from a whole checkpoint: somebody else's, and one of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import dpa
from dpa.errors import ModelError, RecipeError
from dpa.models.digest import digest_of_llm
from dpa.pipeline import dry_run
from dpa.testing.llava_hf import write_tiny_llava_hf
from dpa.testing.project import write_project


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe without parts, beside a checkpoint in llava-hf's layout."""
    path = write_project(tmp_path_factory.mktemp("start") / "project")
    checkpoint = write_tiny_llava_hf(path.parent / "llava-hf")
    text = path.read_text().replace(f"llm: {path.parent / 'llm'}\n", f"start_from: {checkpoint}\n")
    path.write_text(text.replace(f"  vision_tower: {path.parent / 'tower'}\n", ""))
    return path


def test_stage_3_alone(project: Path) -> None:
    start = project.parent / "llava-hf"
    recipe = dpa.load_recipe(project)
    assert [row["stage"] for row in dry_run(recipe).rows] == ["finetune", "finetune"]
    result = dpa.run(recipe)
    assert list(result.summary["methods"]["dpa"]["stages"]) == ["finetune"]
    stage = read(result.folder / "manifest.json")["methods"]["dpa"]["finetune"]
    assert stage["llm_at_start"] == stage["llm_original"] == digest_of_llm(start, cast=torch.float32)
    assert stage["start_from"] == {"source": str(start), "files": stage["inputs"]["start_from"]}
    assert stage["llm_at_end"] == digest_of_llm(result.checkpoint) != stage["llm_at_start"]
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(at, dtype=torch.float32) for at in (start, result.checkpoint)
    )
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])}
    assert not any("vision_tower" in name for name in moved)
    assert any("linear_1" in name for name in moved)
    assert after.config.image_token_index == before.config.image_token_index
    assert after.config.text_config.vocab_size == before.config.text_config.vocab_size
    assert read(result.checkpoint / "preprocessor_config.json")["do_pad"] is True, "the stage's image mode"
    assert read(result.checkpoint / "preprocessor_config.json")["image_mean"] == [0.4, 0.5, 0.6], "its own colours"
    assert dpa.load_recipe(result.folder / "recipe.yaml") == recipe
    assert (result.folder / "report.html").is_file()


def test_a_result_of_ours_goes_on(project: Path) -> None:
    first = dpa.run(dpa.load_recipe(project)).checkpoint
    recipe = dpa.load_recipe(project, [f"model.start_from={first}", "name=second", "method=vanilla"])
    second = dpa.run(recipe)
    stage = read(second.folder / "manifest.json")["methods"]["vanilla"]["finetune"]
    assert stage["llm_at_start"] == read(first.parent / "manifest.json")["methods"]["dpa"]["finetune"]["llm_at_end"]


def test_prior_asks_the_checkpoints_llm(project: Path) -> None:
    overrides = ["method=dpa", "name=prior", "stages.finetune.objective=prior"]
    result = dpa.run(dpa.load_recipe(project, overrides))
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["mean_weight"] < 1 for row in rows)


def test_captions_are_not_needed(project: Path) -> None:
    text = project.read_text()
    start, end = text.index("  captions:"), text.index("  instructions:")
    (project.parent / "short.yaml").write_text(text[:start] + text[end:])
    rows = dry_run(dpa.load_recipe(project.parent / "short.yaml")).rows
    assert {row["stage"] for row in rows} == {"finetune"}
    with pytest.raises(RecipeError, match=r"data\.captions is missing"):
        dpa.load_recipe(project.parent / "short.yaml", ["model.start_from=null"])


def test_refusals(project: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stages 1 and 2 do not run"):
        dpa.run(dpa.load_recipe(project), until="pretrain")
    with pytest.raises(RecipeError, match=r"model: start_from brings its own llm"):
        dpa.load_recipe(project, ["model.llm=org/name"])
    with pytest.raises(RecipeError, match=r"start_from brings its own connector_from"):
        dpa.load_recipe(project, ["model.connector_from=mm_projector.bin"])
    with pytest.raises(ModelError, match="does not exist"):
        dpa.run(dpa.load_recipe(project, [f"model.start_from={tmp_path / 'gone'}"]))
