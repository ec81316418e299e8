"""A tiny LLaVA of random weights, and a folder of lab questions about random pictures."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.evaluate import scoring_stub

if importlib.util.find_spec("dpa.evaluate.scoring") is None:
    sys.modules["dpa.evaluate.scoring"] = scoring_stub

from dpa.models.settings import ModelSettings
from dpa.models.vlm import Vlm, build_vlm
from dpa.testing.benchmarks import write_benchmarks
from dpa.testing.parts import SIDE, TinyFamily, write_tiny_llm, write_tiny_tower

WORDS = ("red", "blue", "top left", "two", "yes", "no", "what", "colour", "is the", "circle", "square", "there")


def tiny_vlm(folder: Path, family: TinyFamily) -> Vlm:
    settings = ModelSettings(
        llm=str(write_tiny_llm(folder / family, family)), vision_tower=str(write_tiny_tower(folder / "tower"))
    )
    vlm = build_vlm(settings, seed=1)
    _make_talkative(vlm)
    return vlm


@torch.no_grad()
def _make_talkative(vlm: Vlm) -> None:
    """Answers that differ from question to question, in letters: random weights repeat one byte for ever."""
    for name, parameter in vlm.model.model.language_model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            parameter.mul_(4)
    head = vlm.model.lm_head.weight
    letters = [
        all("a" <= letter <= "z" for letter in vlm.tokenizer.decode([row]).strip() or "-") for row in range(len(head))
    ]
    head[~torch.tensor(letters)] = 0  # other tokens never win: some letter's logit is above 0


def write_pictures(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + 5, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    """Do not change it."""
    return tiny_vlm(tmp_path_factory.mktemp("parts"), "lab")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmarks in miniature. Do not change it; copy what a test changes."""
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture
def lab_folder(tmp_path: Path) -> Path:
    """Six questions about three scenes."""
    folder = tmp_path / "lab"
    write_pictures(folder / "images", 3)
    records = [
        {
            "id": f"q{number}",
            "scene": f"scene-{number // 2}",
            "image": f"images/{number // 2}.png",
            "question": f"what is {WORDS[number]}?",
            "answer": "red" if kind == "colour" else "yes",
            "kind": kind,
            "choices": ["red", "blue", "green", "yellow"] if kind == "colour" else ["yes", "no"],
        }
        for number, kind in enumerate(["colour", "existence"] * 3)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder
