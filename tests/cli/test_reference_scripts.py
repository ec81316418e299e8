"""The reference's own way in: its data layout in miniature, its three scripts in turn, its results' names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpa.testing.parts import write_tiny_llm, write_tiny_tower

ROOT = Path(__file__).parents[2]
RECIPE = """
name: reference
model: {llm: meta-llama/Llama-3.1-8B-Instruct, vision_tower: openai/clip-vit-large-patch14-336}
data:
  captions: {path: data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json, images: data/LLaVA-Pretrain/images}
  instructions: {path: data/Cambrian-10M/jsons/Cambrian737k.json, images: data/Cambrian-10M}
"""
SMALL = [
    *(
        f"stages.{stage}.{key}"
        for stage in ("proxy", "pretrain", "finetune")
        for key in ("global_batch=4", "micro_batch=2")
    ),
    *(
        f"stages.{stage}.{key}"
        for stage in ("proxy", "pretrain", "finetune")
        for key in ("max_steps=2", "max_length=128")
    ),
    "stages.proxy.lora.rank=4",
    "stages.proxy.lora.alpha=8",
    "train.threads=1",
    "train.trackers=[]",
    "data.workers=0",
]
STAGE_1 = "Tiny-Llama-pretrain-lora_r4_alpha8-blip558k"
STAGE_2 = f"llavanext-tiny-clip-{STAGE_1}-pretrain-pma_mlp-blip558k"
STAGE_3 = f"{STAGE_2}-replaced_llm-finetune-dpa_mlp_lm-cambrian737k"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WORK_DIR as the reference's README asks for, with six pictures; a space in its path."""
    root = tmp_path_factory.mktemp("work dir")
    write_tiny_llm(root / "models" / "Tiny-Llama", "llama3")
    write_tiny_tower(root / "models" / "tiny-clip", "clip")
    names = [f"{index:05d}/{index:09d}.jpg" for index in range(6)]
    for folder in ("data/LLaVA-Pretrain/images", "data/Cambrian-10M/images", "data/Cambrian-10M/jsons"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate(names):
        for folder, path in (("LLaVA-Pretrain/images", name), ("Cambrian-10M", f"images/{name}")):
            place = root / "data" / folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + index, 30), (40 * index, 0, 90)).save(place)
    captions = [
        turns(name, "Describe the image.", f"a small red circle {number}.") for number, name in enumerate(names)
    ]
    write(root / "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", captions)
    instructions = [turns(f"images/{name}", "how many objects are there?", "two.") for name in names]
    instructions += [turns(None, "what colour is the circle?", "red.") for _ in range(2)]
    write(root / "data/Cambrian-10M/jsons/Cambrian737k.json", instructions)
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return root


def turns(image: str | None, question: str, answer: str) -> dict[str, Any]:
    said = [("human", question if image is None else f"<image>\n{question}"), ("gpt", answer)]
    record = {"id": image or "text", "conversations": [{"from": who, "value": text} for who, text in said]}
    return record if image is None else {**record, "image": image}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records), encoding="utf-8")


def script(name: str, work: Path, *settings: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "WORK_DIR": str(work),
        "RECIPE": str(work / "recipe.yaml"),
        "LLM_VERSION": str(work / "models" / "Tiny-Llama"),
        "VISION_MODEL_VERSION": str(work / "models" / "tiny-clip"),
        "NUM_GPUS": "1",
        "PYTHON": sys.executable,
        **more,
    }
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *SMALL, *settings],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        check=False,
    )


def tree(folder: Path) -> list[str]:
    return sorted(str(place.relative_to(folder)) for place in folder.glob("*/*"))


def test_the_three_scripts_one_after_the_other(work: Path) -> None:
    first = script("pretrain.sh", work)
    assert first.returncode == 0, first.stderr
    assert tree(work / "checkpoints") == [f"llm/{STAGE_1}"]
    adapter = work / "checkpoints" / "llm" / STAGE_1
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4

    second = script("pretrain_lvlm.sh", work)
    assert second.returncode == 0, second.stderr
    assert "stage proxy: finished before" in second.stderr
    assert tree(work / "checkpoints") == [f"llm/{STAGE_1}", f"projectors/{STAGE_2}"]
    projector = torch.load(work / "checkpoints" / "projectors" / STAGE_2 / "mm_projector.bin", weights_only=True)
    assert len(projector) == 4

    third = script("finetune_lvlm.sh", work)
    assert third.returncode == 0, third.stderr
    assert "stage pretrain: finished before" in third.stderr
    assert tree(work / "checkpoints") == [f"finetune/{STAGE_3}", f"llm/{STAGE_1}", f"projectors/{STAGE_2}"]
    checkpoint = work / "checkpoints" / "finetune" / STAGE_3
    assert json.loads((checkpoint / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    assert load_file(checkpoint / "model.safetensors")


def test_stage_1_reads_the_text_only_file_where_it_is(work: Path) -> None:
    beside = work / "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k_text_only.json"
    write(beside, [turns(None, "Describe the image.", "one blue square.") for _ in range(5)])
    try:
        planned = script("pretrain_lvlm.sh", work, "--dry-run", "--json", TEXT_ONLY=str(beside.relative_to(work)))
    finally:
        beside.unlink()
    assert planned.returncode == 0, planned.stderr
    stages = {row["stage"]: row["samples"] for row in json.loads(planned.stdout)["stages"]}
    assert stages == {"proxy": 5, "pretrain": 6}


def test_a_setting_that_would_move_the_results_is_refused(work: Path) -> None:
    done = script("pretrain.sh", work, "output=elsewhere")
    assert done.returncode == 2
    assert "RUN_NAME" in done.stderr


def stand_in(work: Path, codes: dict[str, int]) -> Path:
    """For PYTHON: writes down what it is asked for and ends with the code of the first of ``codes`` that is in it."""
    path = work / "python"
    cases = "".join(f'  *"{words}"*) exit {code} ;;\n' for words, code in codes.items())
    path.write_text(f'#!/bin/bash\necho "$*" >> "{work}/asked"\ncase "$*" in\n{cases}esac\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("gpus", "codes", "code", "named", "asked"),
    [
        ("1", {"dpa run": 2}, 2, "stage pretrain: dpa run ended with exit code 2", ["-m dpa run"]),
        ("1", {"reference": 7}, 7, "stage pretrain: dpa reference ended", ["-m dpa run", "-m dpa reference"]),
        ("1", {}, 0, "", ["-m dpa run", "-m dpa reference"]),
        # torchrun ends with 1 whatever its ranks say
        ("2", {"--dry-run": 2, "torch": 1}, 2, "stage pretrain: dpa run --dry-run ended", ["-m dpa run"]),
        ("2", {"torch": 1}, 1, "stage pretrain: dpa run ended", ["-m dpa run", "-m torch.distributed.run"]),
        ("2", {}, 0, "", ["-m dpa run", "-m torch.distributed.run", "-m dpa reference"]),
        ("two", {}, 2, "stage pretrain: NUM_GPUS is two: give a number", []),
    ],
)
def test_a_stage_that_fails_is_named_and_its_exit_code_passed_on(
    tmp_path: Path, gpus: str, codes: dict[str, int], code: int, named: str, asked: list[str]
) -> None:
    done = script("pretrain_lvlm.sh", tmp_path, NUM_GPUS=gpus, PYTHON=str(stand_in(tmp_path, codes)))
    assert done.returncode == code, done.stderr
    assert named in done.stderr
    said = tmp_path / "asked"
    lines = said.read_text().splitlines() if said.exists() else []
    assert len(lines) == len(asked)
    assert all(line.startswith(start) for line, start in zip(lines, asked, strict=True))


def test_a_dry_run_is_one_process_and_links_nothing(tmp_path: Path) -> None:
    python = stand_in(tmp_path, {})
    assert script("pretrain.sh", tmp_path, "--dry-run", NUM_GPUS="8", PYTHON=str(python)).returncode == 0
    (line,) = (tmp_path / "asked").read_text().splitlines()
    assert line.startswith("-m dpa run")
    assert line.count("--dry-run") == 1


def test_a_working_folder_that_is_not_there(tmp_path: Path) -> None:
    done = script("pretrain.sh", tmp_path / "gone")
    assert done.returncode == 2
    assert f"stage proxy: WORK_DIR {tmp_path}/gone is not a folder" in done.stderr


def test_model_and_data_name_a_recipe_of_the_paper(work: Path) -> None:
    done = script("pretrain.sh", work, RECIPE="", MODEL="no-such-model", DATA="sharegpt4v")
    assert done.returncode == 2
    assert f"{ROOT}/recipes/paper/no-such-model/sharegpt4v.yaml" in done.stderr


def test_the_readmes_install_line_works() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "train" in extras
