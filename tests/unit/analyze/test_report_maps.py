"""The report's sections that show how a run got there: relevance maps, accuracy on the way, the lab's words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from dpa.analyze.explain import Explanation, Token, rule_of
from dpa.analyze.maps import head_line, read_maps, step_line, write_maps
from dpa.analyze.report_maps import TOKENS, maps_of
from dpa.analyze.runs import MAPS, METRICS, PROBES
from tests.unit.analyze.test_report import page


def explanation(gain: float, *, sample: str = "s1", words: int = 3, kind: str = "cmo") -> Explanation:
    """Each token had 0.25 without the image; the second is visual, the last one unknown without it."""
    tokens = [
        Token(f" <w{place}>", math.log(0.25 + gain * place), math.log(0.25), gain * place, 0.2, 0, place == 1)
        for place in range(words - 1)
    ]
    last = Token(" end", -1.0, None, None, 0.05, 0, False)
    return Explanation("m", rule_of(kind), sample, ("",), (Image.new("RGB", (8, 8)),), "crop", (*tokens, last))


def write(path: Path, stage: str, objective: str, at: dict[int, list[Explanation]]) -> None:
    for step, found in at.items():
        write_maps(path, head_line(stage, objective, found), step_line(stage, step, found, seconds=0.1))


def test_a_continued_stage_replaces_its_lines(tmp_path: Path) -> None:
    path = tmp_path / MAPS
    write(path, "pretrain", "cmo", {1: [explanation(0.0)], 5: [explanation(0.1)], 9: [explanation(0.2)]})
    write(path, "pretrain", "cmo", {5: [explanation(0.3)]})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (stage,) = read_maps(lines)
    ((name, found),) = [(sample.name, sample.steps) for sample in stage.samples]
    assert name == "s1"
    assert [step for step, _ in found] == [1, 5]
    assert found[1][1][1].relevance == pytest.approx(0.3, abs=1e-5)  # five decimals of a log-probability
    assert found[1][1][2].relevance is None
    write(path, "pretrain", "cmo", {7: [explanation(0.3, sample="other")]})
    (stage,) = read_maps([json.loads(line) for line in path.read_text().splitlines()])
    assert [(sample.name, len(sample.steps)) for sample in stage.samples] == [("other", 1)]


def test_cal_is_shown_in_the_same_unit(tmp_path: Path) -> None:
    path = tmp_path / MAPS
    write(path, "pretrain", "cal", {1: [explanation(0.2, kind="cal")]})
    stages = read_maps([json.loads(line) for line in path.read_text().splitlines()])
    maps = maps_of({"cal": stages})
    assert maps.scale == 0.2
    assert maps.unknown
    assert maps.truth
    assert not maps.signed
    ((step,),) = [of.steps for of in maps.samples[0].methods]
    assert step.summary == "visual +0.200, other 0.000"


def test_sections_of_the_report(run_folder: Path) -> None:
    plain = page(run_folder).text
    for heading in ("Where relevance appears", "Accuracy on the way", "Visual and linguistic words"):
        assert heading not in plain
    write(run_folder / MAPS, "pretrain", "cmo", {1: [explanation(0.0)], 40: [explanation(0.4, words=TOKENS + 9)]})
    write(run_folder / MAPS, "pretrain", "cmo", {1: [explanation(0.0, words=200)], 40: [explanation(0.004, words=200)]})
    write(run_folder / "vanilla" / MAPS, "pretrain", "uniform", {1: [explanation(0.0)], 40: [explanation(-0.1)]})
    asked = {"lab": {"accuracy": 0.5, "n": 64}}
    with open(run_folder / METRICS, "a", encoding="utf-8") as file:
        for step in (10, 20):
            file.write(
                json.dumps({"kind": "evaluation", "stage": "finetune", "step": step, "benchmarks": asked}) + "\n"
            )
    probe = {f"{name}_{of}": 0.5 for of in "ab" for name in ("visual_logp", "linguistic_logp", "auc_cmo", "auc_cal")}
    (run_folder / PROBES).write_text("".join(json.dumps({"step": step, **probe}) + "\n" for step in (1, 40)))
    found = page(run_folder)
    assert found.open == []
    for words in (
        "Where relevance appears",
        "<w1>",
        "step 40",
        f"The first {TOKENS} of 200 tokens.",
        "visual −0.100, other 0.000",
        "Accuracy on the way",
        "lab, 64 questions",
        "Visual and linguistic words",
        "ROC-AUC of cal, captions in B",
    ):
        assert words in found.text, words
    assert "ROC-AUC of prior" not in found.text
    labels = [of.get("aria-label") or "" for tag, of in found.tags if of.get("class", "").startswith("t")]  # type: ignore[union-attr]
    assert any("step 40: relevance −0.100" in label and "weight" not in label for label in labels), "uniform has none"
    assert any("weight 0.200" in label and "visual word" in label for label in labels)
