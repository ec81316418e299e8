"""A whole small project on disk, as a user has one: LLM, tower, JPEGs of many sizes, captions, instructions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dpa.testing.parts import TowerKind, write_tiny_llm, write_tiny_tower
from dpa.testing.tiny_families import TinyFamily

_SIZES = ((16, 16), (40, 24), (23, 61), (128, 16), (7, 9))
_TEXTS = (
    "a small red circle.",
    "Ünïcödé: naïve café — “quotes”, 日本語, emoji 🦊, a zero\u200bwidth and a tab\t.",
    "two lines\nof text, then a long tail " + "again " * 12,
    "العربية and a literal <|im_end|> typed by somebody",
    "x",
)


def write_project(
    folder: Path, *, family: TinyFamily = "qwen2", tower: TowerKind = "clip", samples: int = 10, seed: int = 0
) -> Path:
    """Writes the project and its ``recipe.yaml``; paths in it are absolute. Returns the recipe's path.

    Args:
        folder: made; must not exist.
        family: of the LLM.
        tower: kind of the vision tower.
        samples: captions, and instructions (of which every fourth has no image).
        seed: of pictures and weights.
    """
    rng = random.Random(seed)
    images = folder / "images" / "deep"
    images.mkdir(parents=True)
    names = []
    for index in range(samples):
        colour = tuple(rng.randrange(256) for _ in range(3))
        name = f"deep/{index} picture.jpg"
        Image.new("RGB", _SIZES[index % len(_SIZES)], colour).save(folder / "images" / name)
        names.append(name)
    captions = [_record(f"c{i}", names[i], [("Describe.", _TEXTS[i % len(_TEXTS)])]) for i in range(samples)]
    instructions = [
        _record(f"i{i}", None if i % 4 == 3 else names[i], [(f"what is it {i}?", "red."), ("sure?", "yes.")])
        for i in range(samples)
    ]
    (folder / "captions.json").write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    (folder / "instructions.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in instructions), encoding="utf-8"
    )
    llm = write_tiny_llm(folder / "llm", family, seed=seed)
    vision = write_tiny_tower(folder / "tower", tower, seed=seed)
    stage = {"global_batch": 4, "micro_batch": 2, "max_steps": 3, "max_length": 128, "save_steps": 1}
    recipe = {
        "name": "project",
        "methods": ["dpa", "vanilla"],
        "output": str(folder / "runs"),
        "model": {"llm": str(llm), "vision_tower": str(vision)},
        "data": {
            "captions": {"path": str(folder / "captions.json"), "images": str(folder / "images")},
            "instructions": {"path": str(folder / "instructions.jsonl"), "images": str(folder / "images")},
            "max_bad_share": 0.5,
            "workers": 0,
        },
        "stages": {"proxy": {**stage, "lora": {"rank": 4, "alpha": 8}}, "pretrain": stage, "finetune": stage},
        "train": {"threads": 1, "trackers": []},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _record(name: str, image: str | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if image is not None and number == 0 else ""
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    record: dict[str, Any] = {"id": name, "conversations": conversations}
    return record if image is None else {**record, "image": image}
