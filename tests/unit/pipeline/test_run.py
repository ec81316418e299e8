"""Whole runs on tiny random parts: what they leave, what they reuse, what they refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dpa
from dpa.errors import DataError, ModelError, RecipeError, UserError
from dpa.models.digest import digest_of_llm, digest_of_model
from dpa.pipeline import dry_run
from dpa.testing.project import write_project


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose recipe (dpa and vanilla) has been run; the recipe's path."""
    recipe = write_project(tmp_path_factory.mktemp("run") / "project")
    dpa.run(dpa.load_recipe(recipe))
    return recipe


def store(recipe: Path) -> set[str]:
    return {item.name for item in (recipe.parent / "runs" / ".store").iterdir() if (item / "manifest.json").is_file()}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_runs_folder(finished: Path) -> None:
    folder = finished.parent / "runs" / "project"
    for name in ("recipe.yaml", "manifest.json", "summary.json", "metrics.jsonl", "report.html"):
        assert (folder / name).is_file(), name
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert (folder / "connector" / "mm_projector.bin").is_file()
    assert (folder / "proxy" / "adapter_model.safetensors").is_file()
    assert (folder / "vanilla" / "checkpoint" / "config.json").is_file()
    assert not (folder / "vanilla" / "proxy").exists()
    assert not (folder / "current").exists()
    assert dpa.load_recipe(folder / "recipe.yaml") == dpa.load_recipe(finished)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in ("proxy", "pretrain", "finetune") for step in (1, 2, 3)
    ]
    summary = read(folder / "summary.json")
    assert list(summary["methods"]) == ["dpa", "vanilla"]
    assert list(summary["methods"]["dpa"]["stages"]) == ["proxy", "pretrain", "finetune"]
    assert list(summary["methods"]["vanilla"]["stages"]) == ["pretrain", "finetune"]


def test_stage_3_starts_from_the_original_llm_and_the_proxy_is_not_in_it(finished: Path) -> None:
    runs = finished.parent / "runs" / "project"
    manifest = read(runs / "manifest.json")
    original = digest_of_llm(finished.parent / "llm", cast=torch.float32)
    for method in ("dpa", "vanilla"):
        stage = manifest["methods"][method]["finetune"]
        assert stage["llm_at_start"] == stage["llm_original"] == original
        assert (
            stage["llm_at_end"] == digest_of_llm(runs / ("" if method == "dpa" else method) / "checkpoint") != original
        )


def test_the_same_command_again_trains_nothing(finished: Path) -> None:
    before = store(finished)
    weights = digest_of_model(finished.parent / "runs" / "project" / "checkpoint")
    result = dpa.run(dpa.load_recipe(finished))
    assert store(finished) == before
    assert digest_of_model(result.checkpoint) == weights
    assert all(stage["reused"] for of in result.summary["methods"].values() for stage in of["stages"].values())


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.finetune.learning_rate=1e-4", {"finetune": 2}),
        ("stages.pretrain.window=1", {"pretrain": 1, "finetune": 1}),  # vanilla's weights have no window
        ("stages.proxy.lora.rank=2", {"proxy": 1, "pretrain": 1, "finetune": 1}),
        ("stages.finetune.save_steps=7", {}),
        ("model.connector=linear", {"pretrain": 2, "finetune": 2}),
        ("model.connector=pooled", {"pretrain": 2, "finetune": 2}),
        ("seed=1", {"proxy": 1, "pretrain": 2, "finetune": 2}),
        ("method=pmo", {"pretrain": 1, "finetune": 1}),  # PMO shares DPA's proxy
        ("train.threads=2", {}),
    ],
)
def test_a_changed_setting_redoes_what_depends_on_it(finished: Path, override: str, stages: dict[str, int]) -> None:
    plan = dry_run(dpa.load_recipe(finished, [override]))
    new = [row["stage"] for row in plan.rows if row["state"] == "new"]
    assert {stage: new.count(stage) for stage in dict.fromkeys(new)} == stages
    assert "stage" in plan.text()


def test_a_changed_caption_redoes_everything_a_moved_folder_nothing(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.parent, copy, ignore=shutil.ignore_patterns("runs"))
    there = {
        "data.captions.path": str(copy / "captions.json"),
        "data.captions.images": str(copy / "images"),
        "data.instructions.path": str(copy / "instructions.jsonl"),
        "data.instructions.images": str(copy / "images"),
        "model.llm": str(copy / "llm"),
        "model.vision_tower": str(copy / "tower"),
    }
    assert {row["state"] for row in dry_run(dpa.load_recipe(finished, there)).rows} == {"finished"}
    captions = copy / "captions.json"
    captions.write_text(captions.read_text().replace("small red", "small blue"))
    assert {row["state"] for row in dry_run(dpa.load_recipe(finished, there)).rows} == {"new"}


def test_until_stops_and_goes_on(tmp_path: Path) -> None:
    path = write_project(tmp_path / "project")
    recipe = dpa.load_recipe(path, ["method=dpa"])
    result = dpa.run(recipe, until="2")
    assert list(result.summary["methods"]["dpa"]["stages"]) == ["proxy", "pretrain"]
    assert not result.checkpoint.exists()
    again = dpa.run(recipe)
    assert [stage["reused"] for stage in again.summary["methods"]["dpa"]["stages"].values()] == [True, True, False]
    assert again.checkpoint.is_dir()
    with pytest.raises(RecipeError, match="no such stage; choose proxy, pretrain, finetune"):
        dpa.run(recipe, until="stage2")


@pytest.mark.parametrize(("family", "tower"), [("llama3", "siglip"), ("gemma2", "dinov2")])
def test_other_families_and_towers_load_without_dpa(tmp_path: Path, family: Any, tower: Any) -> None:
    path = write_project(tmp_path / "project", family=family, tower=tower)
    result = dpa.run(dpa.load_recipe(path, ["method=dpa"]))
    code = (
        "import sys; sys.modules['dpa'] = None\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "typed = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'what is it?'}]}]\n"
        "plain = [{'role': 'user', 'content': '<image>\\nwhat is it?'}]\n"
        "ids = []\n"
        "for messages in (typed, plain):\n"
        "    text = processor.apply_chat_template(messages, add_generation_prompt=True)\n"
        "    inputs = processor(text=text, images=Image.new('RGB', (40, 24)), return_tensors='pt')\n"
        "    ids.append(inputs['input_ids'].tolist())\n"
        "    print(model.generate(**inputs, max_new_tokens=3).shape)\n"
        "assert ids[0] == ids[1]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(result.checkpoint)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    path = write_project(tmp_path / "project")

    def refused(kind: type[UserError], match: str, *overrides: str) -> None:
        with pytest.raises(kind, match=match):
            dpa.run(dpa.load_recipe(path, overrides))
        assert store(path) == set()

    refused(DataError, "does not exist", "data.captions.path=nowhere.json")
    refused(DataError, "image folder .* does not exist", "data.captions.images=nowhere")
    refused(ModelError, "does not exist", "model.llm=./nowhere")
    refused(ModelError, "does not exist", "model.connector_from=./nowhere.bin")
    refused(UserError, "odd number of tokens", "stages.pretrain.window=2")
    refused(UserError, "is missing", "evaluate.benchmarks=[lab]", f"evaluate.data={tmp_path}")
    (path.parent / "images" / "deep" / "0 picture.jpg").unlink()
    (path.parent / "images" / "deep" / "1 picture.jpg").write_bytes(b"not an image")
    refused(DataError, "image missing", "data.max_bad_share=0")


def test_a_dry_run_asks_what_the_launcher_was_configured_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    with pytest.raises(UserError, match="configured for zero2, the recipe says parallel ddp"):
        dry_run(dpa.load_recipe(write_project(tmp_path / "project")))


def test_prior_weighs_by_the_llm_that_the_stage_starts_from(tmp_path: Path) -> None:
    path = write_project(tmp_path / "project")
    overrides = ["method=dpa", "stages.pretrain.objective=prior", "stages.finetune.objective=prior"]
    result = dpa.run(dpa.load_recipe(path, overrides))
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    weights = [row["mean_weight"] for row in rows if row["stage"] != "proxy"]
    assert len(weights) == 6
    assert all(0 < weight < 1 for weight in weights), "1 - p of a random LLM: below one, far from zero"


def test_a_connector_of_another_llm_is_refused_before_the_proxy_is_trained(tmp_path: Path) -> None:
    path = write_project(tmp_path / "project")
    small, large = torch.zeros(8, 8), torch.zeros(8)
    names = [f"model.mm_projector.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")]
    torch.save(dict(zip(names, (small, large, small, large), strict=True)), tmp_path / "mm_projector.bin")
    with pytest.raises(ModelError, match="wrong LLM for a connector"):
        dpa.run(dpa.load_recipe(path, [f"model.connector_from={tmp_path / 'mm_projector.bin'}"]))
    assert store(path) == set()


def test_a_foreign_folder_is_not_written_into(tmp_path: Path) -> None:
    path = write_project(tmp_path / "project")
    folder = path.parent / "runs" / "project"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no recipe\.yaml of a run"):
        dpa.run(dpa.load_recipe(path))


def test_caches_end_to_end(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stage 2 from a text cache; a second run with other settings of the stage finds it complete."""
    caplog.set_level("INFO", logger="dpa")
    cached = ["method=dpa", "stages.pretrain.text_cache=true"]
    plan = dry_run(dpa.load_recipe(finished, cached))
    assert [row["state"] for row in plan.rows] == ["finished", "new", "new"], "rounded otherwise: a key of its own"
    dpa.run(dpa.load_recipe(finished, [*cached, "name=cached"]), until="2")
    assert "text-only log-probs, " in caplog.text
    assert "0 of 1 parts are there" in caplog.text
    caplog.clear()
    result = dpa.run(dpa.load_recipe(finished, [*cached, "name=other", "stages.pretrain.window=1"]))
    assert result.checkpoint.is_dir()
    assert ": complete" in caplog.text
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    plain = [
        json.loads(line) for line in (finished.parent / "runs" / "project" / "metrics.jsonl").read_text().splitlines()
    ]
    # the first step of stage 2 differs by the window alone, and rounding: its unweighted loss is the same
    first, expected = (next(row for row in of if row["stage"] == "pretrain") for of in (rows, plain))
    assert first["nll"] == pytest.approx(expected["nll"], rel=1e-6)


def test_vision_cache_end_to_end(finished: Path) -> None:
    recipe = dpa.load_recipe(finished, ["method=vanilla", "train.vision_cache=true", "name=features"])
    assert [row["state"] for row in dry_run(recipe).rows] == ["new", "new"]
    assert dpa.run(recipe).checkpoint.is_dir()
    made = finished.parent / "runs" / ".store" / ".cache"
    assert len(list(made.glob("vision-*/about.json"))) == 2, "stage 2 crops, stage 3 pads"


def test_a_text_cache_where_the_llm_is_trained_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match=r"stages\.finetune\.text_cache is true, but stage 3 trains its LLM"):
        dry_run(dpa.load_recipe(finished, ["method=dpa", "stages.finetune.text_cache=true"]))


def test_a_reduced_decode_is_other_data(finished: Path) -> None:
    plan = dry_run(dpa.load_recipe(finished, ["method=dpa", "data.reduced_decode=true"]))
    assert [row["state"] for row in plan.rows] == ["finished", "new", "new"]
