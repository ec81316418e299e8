"""All three stages with other families, towers and connectors; multi-image and text-only samples among the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpa.pipeline.run import run
from dpa.recipe import load_recipe
from dpa.testing.parts import TinyFamily, TowerKind
from dpa.testing.project import write_project


@pytest.mark.parametrize(
    ("family", "tower", "connector", "tokens"),
    [
        ("qwen3", "clip_full", "pooled", 4),
        ("phi3", "siglip_full", "linear", 16),
        ("gemma3", "dinov2_registers", "mlp2x_gelu", 18),
    ],
)
def test_three_stages(tmp_path: Path, family: TinyFamily, tower: TowerKind, connector: str, tokens: int) -> None:
    path = write_project(tmp_path / "project", family=family, tower=tower, samples=8)
    add_several_images(tmp_path / "project" / "instructions.jsonl")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["methods"] = ["dpa"]
    recipe["model"]["connector"] = connector
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run(load_recipe(path))
    checkpoint = tmp_path / "project" / "runs" / "project" / "checkpoint"
    native, loading = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert [value for value in loading.values() if value] == []
    processor = AutoProcessor.from_pretrained(checkpoint)
    picture = next((tmp_path / "project" / "images" / "deep").iterdir())
    turns = [{"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what?"}]}]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == native.config.image_token_id).sum()) == tokens
    with torch.no_grad():
        assert torch.isfinite(native(**inputs).logits).all()


def add_several_images(path: Path) -> None:
    """Two pictures in the first sample's first turn, one in its second."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[0]["image"] = [rows[0]["image"], rows[1]["image"], rows[2]["image"]]
    rows[0]["conversations"][0]["value"] = "<image>\nand <image>?"
    rows[0]["conversations"][2]["value"] = "and here <image>?"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
