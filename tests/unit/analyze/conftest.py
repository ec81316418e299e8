"""A run's folder as the pipeline leaves it, without a training."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpa.evaluate.scores import PREDICTIONS, Scored, scores_path, write_scores

QUESTIONS = 40


def png(side: int = 8) -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (side, side), (200, 30, 30)).save(file, format="PNG")
        return file.getvalue()


def scored(right: int) -> list[Scored]:
    """The first ``right`` of 40 answers are right; two questions a scene."""
    return [
        Scored(
            id=f"q{number}",
            group=f"s{number // 2}",
            kind="colour" if number % 2 else "count",
            answer="red",
            prediction="red" if number < right else "blue",
            score=float(number < right),
            blind_prediction="blue",
            blind_score=0.0,
        )
        for number in range(QUESTIONS)
    ]


def result(right: int) -> dict[str, Any]:
    accuracy = right / QUESTIONS
    kind = {"n": QUESTIONS // 2, "accuracy": accuracy, "blind_accuracy": 0.25, "chance": 0.25}
    return {
        "accuracy": accuracy,
        "accuracy_interval": [max(accuracy - 0.1, 0), min(accuracy + 0.1, 1)],
        "mean_over_kinds": accuracy,
        "blind_accuracy": 0.25,
        "blind_mean_over_kinds": 0.25,
        "chance": 0.25,
        "by_kind": {"colour": kind, "count": kind},
        "empty_share": 0.025,
        "unparsed_share": 0.0,
        "unfinished_share": 0.0,
        "n": QUESTIONS,
        "scenes": QUESTIONS // 2,
    }


def metrics(method: str) -> list[dict[str, Any]]:
    rows = []
    for stage in ("proxy", "pretrain", "finetune"):
        for step in range(1, 41):
            weighted = stage != "proxy" and method == "dpa"
            rows.append(
                {
                    "stage": stage,
                    "step": step,
                    "loss": 9.9,
                    "nll": 3 / step,
                    "tokens": 100,
                    "mean_weight": 0.2 if weighted else 1.0,
                    "share_at_minimum": 0.4 if weighted else 0.0,
                    "share_at_maximum": 0.1 if weighted else 0.0,
                    "effective_tokens": 60 if weighted else 100,
                }
            )
    return rows if method == "dpa" else [row for row in rows if row["stage"] != "proxy"]


def write_run(folder: Path, right: dict[str, int], *, name: str = "quickstart") -> Path:
    """``right``: method -> number of right answers of 40; the first method is the main one."""
    stage = {
        "key": "ab" * 8,
        "reused": False,
        "steps": 40,
        "seconds": 75.4,
        "trainable_parameters": 1234567,
        "loss_first": 3.0,
        "loss_last": 0.075,
        "tokens": 4000,
    }
    methods = {}
    for number, (method, count) in enumerate(right.items()):
        own = folder if number == 0 else folder / method
        own.mkdir(parents=True, exist_ok=True)
        write_scores(scores_path(own / PREDICTIONS, "lab"), scored(count))
        text = "".join(json.dumps(row) + "\n" for row in metrics(method))
        (own / "metrics.jsonl").write_text(text, encoding="utf-8")
        stages = {"pretrain": stage, "finetune": {**stage, "reused": number > 0}}
        methods[method] = {"stages": stages, "evaluation": {"lab": result(count)}, "checkpoint": "checkpoint"}
    summary = {
        "name": name,
        "main_method": next(iter(right)),
        "fidelity": "exact",
        "seed": 0,
        "methods": methods,
        "versions": {"python": "3.11", "torch": "2.13"},
        "machine": {"cores": 2, "accelerator": None},
        "seconds": 301.2,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"name: {name}\nmodel: {{llm: 'lab:llm', vision_tower: 'lab:tower'}}\n"
        f"evaluate: {{data: {json.dumps(str(folder / 'data'))}}}\n",
        encoding="utf-8",
    )
    (folder / "data").mkdir()
    (folder / "data" / "large.png").write_bytes(png(700))
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    samples = [
        {
            "id": "a",
            "image": uri,
            "question": "what <b>colour</b>?",
            "answer": "red",
            "answers": {"dpa": "red", "vanilla": ""},
        },
        {"id": "b", "image": "large.png", "question": "how many?", "answer": "two", "answers": {"dpa": "two"}},
        {"id": "c", "image": "../summary.json", "question": "where?", "answer": "left", "answers": {"dpa": "left"}},
    ]
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """DPA 30 of 40 right, vanilla 20."""
    return write_run(tmp_path / "quickstart", {"dpa": 30, "vanilla": 20})
