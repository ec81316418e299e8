"""Ranking options against a naive loop over tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dpa.errors import DataError
from dpa.evaluate.benchmarks import run_benchmarks
from dpa.evaluate.checkpoint import CheckpointResult
from dpa.evaluate.generate import Question
from dpa.evaluate.rank import Choices, rank_options
from dpa.evaluate.ranked import options_of, rank_tasks
from dpa.evaluate.scores import read_scores, scores_path
from dpa.evaluate.settings import EvaluateSettings
from dpa.models.vlm import Vlm
from dpa.testing.parts import TinyFamily
from tests.unit.evaluate.conftest import tiny_vlm, write_pictures

OPTIONS = ("red", "blue circle", "no, there is not", "B")


@pytest.fixture
def choices(tmp_path: Path) -> list[Choices]:
    pictures = write_pictures(tmp_path / "images", 3)
    texts = ("what colour is the circle?", "is there a square?", "two")
    asked = [Question(f"q{n}", text, (pictures[n],)) for n, text in enumerate(texts)]
    return [Choices(question, OPTIONS[: 2 + n]) for n, question in enumerate(asked)]


@torch.no_grad()
def naive(vlm: Vlm, question: Question, option: str) -> float:
    """Token by token, the whole prompt again for each, as the template writes the answer; then any end of turn."""
    user: Any = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}
    prompt = vlm.processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    answer: Any = {"role": "assistant", "content": [{"type": "text", "text": option}]}
    whole = vlm.processor.apply_chat_template([user, answer], tokenize=False)
    written = whole[len(prompt) :].split(option)[0] + option
    image = Image.open(question.images[0]).convert("RGB")  # type: ignore[arg-type]
    inputs = vlm.processor(text=prompt, images=image, return_tensors="pt", add_special_tokens=False)
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    total = torch.zeros((), dtype=torch.float64)
    for token in vlm.tokenizer(written, add_special_tokens=False)["input_ids"]:
        logp = vlm.model(input_ids=ids, **inputs).logits[0, -1].double().log_softmax(0)
        total += logp[token]
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    ends = vlm.model.generation_config.eos_token_id
    last = vlm.model(input_ids=ids, **inputs).logits[0, -1].double().log_softmax(0)
    return float(total + last[[ends] if isinstance(ends, int) else list(ends)].logsumexp(0))


@pytest.mark.parametrize("family", ["qwen2", "llama3", "gemma2"])
def test_is_the_probability_of_the_whole_answer(family: TinyFamily, choices: list[Choices], tmp_path: Path) -> None:
    vlm = tiny_vlm(tmp_path, family)
    found = rank_options(vlm.model, vlm.processor, choices, batch_size=4)
    for item, ranking in zip(choices, found, strict=True):
        expected = [naive(vlm, item.question, option) for option in item.options]
        assert ranking.logp == pytest.approx(expected, rel=2e-5)  # float32 against float64
        assert ranking.best == max(range(len(expected)), key=lambda n: expected[n])
        tokens = [len(vlm.tokenizer(option, add_special_tokens=False)["input_ids"]) + 1 for option in item.options]
        means = [logp / count for logp, count in zip(ranking.logp, tokens, strict=True)]
        assert ranking.logp_per_token == pytest.approx(means)
    assert [len(ranking.logp) for ranking in found] == [2, 3, 4]


def test_continues_after_a_kill_and_asks_another_model_again(vlm: Vlm, choices: list[Choices], tmp_path: Path) -> None:
    out = tmp_path / "ranked.jsonl"
    whole = rank_options(vlm.model, vlm.processor, choices, batch_size=2, out=out)
    lines = out.read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == ["q0", "q1", "q2"]
    out.write_text("\n".join([lines[0], lines[1][:20]]), encoding="utf-8")
    counts: list[tuple[int, int]] = []
    again = rank_options(
        vlm.model, vlm.processor, choices, batch_size=2, out=out, progress=lambda *count: counts.append(count)
    )
    assert [item.best for item in again] == [item.best for item in whole]
    assert (counts[0], counts[-1]) == ((1, 3), (3, 3))
    rank_options(
        vlm.model, vlm.processor, choices, batch_size=2, out=out, identity="x", progress=lambda *c: counts.append(c)
    )
    assert (0, 3) in counts


@pytest.mark.parametrize("options", [("red",), ("red", "red"), ("red", " ")])
def test_options_are_checked(vlm: Vlm, options: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"question 'a'.*two options or more"):
        rank_options(vlm.model, vlm.processor, [Choices(Question("a", "what?"), options)], batch_size=2)


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"choices": {"B": "blue", "A": "red"}, "answer": "(A)"}, ("A", "B")),
        ({"choices": ["red", "blue"]}, ("red", "blue")),
        ({"question_type": "yes_no"}, ("Yes", "No")),
        ({"question_type": "multiple_choice"}, ("A", "B")),
        ({"question_type": "Handwriting Recognition"}, None),
        ({"answer": ["a", "b"]}, None),
    ],
)
def test_options_of_a_record(record: dict[str, Any], options: tuple[str, ...] | None) -> None:
    assert options_of(record) == options


@dataclass
class FakeTask:
    id: str
    record: Mapping[str, Any]
    text: str = "what colour?"
    images: tuple[()] = ()
    where: str = "table.tsv, row 1"


def test_tasks_are_answered_with_their_first_option(vlm: Vlm, tmp_path: Path) -> None:
    settings = EvaluateSettings(batch_size=2)
    tasks = [FakeTask("1", {"choices": {"A": "red", "B": "blue"}}), FakeTask("2", {"question_type": "yes_no"})]
    found = rank_tasks("mmvp", vlm.model, vlm.processor, tasks, settings, tmp_path)
    assert found is not None
    assert [item.prediction in options for item, options in zip(found, ("AB", ("Yes", "No")), strict=True)] == [
        True
    ] * 2
    assert (tmp_path / "mmvp.ranked.jsonl").is_file()
    assert rank_tasks("docvqa", vlm.model, vlm.processor, [FakeTask("1", {})], settings, tmp_path) is None


def test_stands_beside_the_generated_accuracy(vlm: Vlm, lab_folder: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(benchmarks=("lab",), data=lab_folder, max_new_tokens=2)
    plain = run_benchmarks(vlm.model, vlm.processor, settings, tmp_path)["lab"]
    both = run_benchmarks(vlm.model, vlm.processor, settings.model_copy(update={"rank_options": True}), tmp_path)["lab"]
    ranked = both.pop("ranked")
    assert both == plain
    assert ranked["n"] == 6
    text = CheckpointResult("c", tmp_path, {"lab": {**plain, "ranked": ranked}}).text()
    assert f"lab, options ranked: {100 * ranked['accuracy']:.1f} [" in text
    assert "end of the turn" in ranked["by"]
    scores = read_scores(scores_path(tmp_path, "lab.ranked"))
    assert ranked["accuracy"] == pytest.approx(sum(item.score for item in scores) / 6)
    assert all(item.prediction in ("red", "blue", "green", "yellow", "yes", "no") for item in scores)
