"""Every shipped recipe of the paper and its ablations: read, and rehearsed (``--dry-run``) on its data in miniature."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dpa
from dpa.models.families import FAMILIES
from dpa.pipeline import dry_run
from dpa.recipe import Recipe
from dpa.testing.parts import write_tiny_llm, write_tiny_tower
from dpa.testing.tiny_families import TinyFamily

RECIPES = Path(__file__).parents[3] / "recipes"
PAPER = sorted(path for path in (RECIPES / "paper").glob("*/*.yaml") if path.parent.name != "data")
ABLATIONS = sorted((RECIPES / "ablations").rglob("*.yaml"))
TINY: dict[str, TinyFamily] = {"Qwen/Qwen2.5": "qwen2", "meta-llama/Llama-3.1": "llama3", "google/gemma-2": "gemma2"}
PIXMO_URL = "https://example.com/1.jpg"


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES).with_suffix(""))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the paper's recipes expect to be started in, with two pictures and a few rows per data set."""
    root = tmp_path_factory.mktemp("work")
    for family in TINY.values():
        write_tiny_llm(root / "llm" / family, family)
    write_tiny_tower(root / "tower", "clip")
    data = root / "data"
    picture(data / "LLaVA-Pretrain/images/00000/000000010.jpg")
    write(
        data / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        [record("00000/000000010.jpg", "Describe.", f"circle {number}") for number in range(4)],
    )
    shared = ["coco/train2017/1.jpg", "sam/images/sa_1.jpg", "llava/llava_pretrain/images/00000/000000010.jpg"]
    for name in shared:
        picture(data / "ShareGPT4V-PT/images" / name)
    write(
        data / "ShareGPT4V-PT/share_gpt4v_instruct_gpt4-vision_cap_100k.json",
        [record(name, "What is in it?", "A long caption.") for name in shared],
    )
    picture(data / "pixmo-cap/images" / hashlib.sha256(PIXMO_URL.encode()).hexdigest())
    table = pa.table({"image_url": [PIXMO_URL] * 3, "caption": ["A", "B", "C"], "transcripts": [["x"], [], None]})
    (data / "pixmo-cap/data").mkdir()
    pq.write_table(table, data / "pixmo-cap/data/train-00000-of-00001.parquet")
    picture(data / "Cambrian-10M/images/coco/train2017/2.jpg")
    turns = [record(name, "What colour?", "Red.") for name in ("coco/train2017/2.jpg", "images/coco/train2017/2.jpg")]
    write(data / "Cambrian-10M/jsons/Cambrian737k.json", [*turns, record(None, "Two plus two?", "Four.")] * 2)
    return root


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), (90, 0, 40)).save(path, format="JPEG")


def record(image: str | None, question: str, answer: str) -> dict[str, Any]:
    said = [("human", question if image is None else f"<image>\n{question}"), ("gpt", answer)]
    turns = {"conversations": [{"from": who, "value": text} for who, text in said]}
    return turns if image is None else {"image": image, **turns}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")


def rehearsed(path: Path, work: Path, *overrides: str) -> tuple[Recipe, list[dict[str, Any]]]:
    """The recipe as it stands, with a tiny LLM of the same family, and its stages' rows."""
    llm = dpa.load_recipe(path).model.llm
    assert llm is not None
    family = next(tiny for start, tiny in TINY.items() if llm.startswith(start))
    assert family in FAMILIES
    parts = [f"model.llm={work / 'llm' / family}", f"model.vision_tower={work / 'tower'}"]
    recipe = dpa.load_recipe(path, [*parts, *overrides])
    return recipe, dry_run(recipe).rows


def test_all_are_here() -> None:
    models = {"qwen2.5-7b", "llama3.1-8b", "gemma2-9b"}
    assert {name_of(path) for path in PAPER} == {
        *(f"paper/{model}/{data}" for model in models for data in ("blip558k", "sharegpt4v", "pixmo")),
        *(f"paper/qwen2.5-{size}/sharegpt4v" for size in ("1.5b", "3b", "14b", "32b")),
    }
    names = [dpa.load_recipe(path).name for path in PAPER + ABLATIONS]
    assert len(set(names)) == len(names), "two recipes would write into one run's folder"


@pytest.mark.parametrize("path", PAPER, ids=name_of)
def test_paper(path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    recipe, rows = rehearsed(path, work)
    assert [row["stage"] for row in rows] == ["proxy", "pretrain", "finetune"]
    assert [row["samples"] for row in rows] == [4 if path.stem == "blip558k" else 3] * 2 + [6], "none was left out"
    stages = recipe.stages
    # section 4.1 and the table of hyper-parameters; docs/method.md
    assert [stages.proxy.learning_rate, stages.pretrain.learning_rate, stages.finetune.learning_rate] == [
        4e-5,
        2e-3,
        4e-5,
    ]
    assert {stages.proxy.global_batch, stages.pretrain.global_batch, stages.finetune.global_batch} == {256}
    assert (stages.proxy.lora.rank, stages.proxy.lora.alpha) == (256, 512)
    assert (stages.pretrain.image_mode, stages.finetune.image_mode) == ("crop", "pad")
    assert (stages.pretrain.max_length, stages.finetune.max_length) == (8192, 2048)


@pytest.mark.parametrize("method", ["vanilla", "cal", "pmo", "cmo"])
def test_every_method_by_an_override(method: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    _, rows = rehearsed(RECIPES / "paper/qwen2.5-7b/blip558k.yaml", work, f"method={method}")
    assert [row["stage"] for row in rows] == (["proxy"] if method == "pmo" else []) + ["pretrain", "finetune"]


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_ablation(path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    _, rows = rehearsed(path, work)
    assert {row["stage"] for row in rows} == {"proxy", "pretrain", "finetune"}


@pytest.mark.parametrize("name", ["cmo-stages", "data-scale", "delta", "lora-rank", "model-scale"])
def test_an_ablations_points_differ(name: str) -> None:
    points = [dpa.load_recipe(path).model_dump_json(exclude={"name"}) for path in ABLATIONS if path.parent.name == name]
    assert len(set(points)) == len(points) >= 4
