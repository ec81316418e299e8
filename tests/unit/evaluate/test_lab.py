"""The lab's questions, scorer and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpa.errors import DataError
from dpa.evaluate.generate import Prediction
from dpa.evaluate.lab import LabQuestion, evaluate_lab, normalise, read_questions, score_lab, summarise
from dpa.evaluate.scores import read_scores
from dpa.evaluate.settings import EvaluateSettings
from dpa.models.vlm import Vlm

SETTINGS = EvaluateSettings(benchmarks=("lab",), batch_size=4, max_new_tokens=4)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("red", "red"),
        (" Red. ", "red"),
        ('"Top  Left"!', "top left"),
        ("\n yes\nbecause it is there", "yes"),
        ("top-left", "top-left"),
        ("it is red", "it is red"),
        ("...", ""),
        ("", ""),
    ],
)
def test_normalise(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


def question(number: int, kind: str, answer: str, choices: str) -> LabQuestion:
    return LabQuestion(
        id=f"q{number}",
        scene=f"s{number // 2}",
        image=Path("x.png"),
        question="?",
        answer=answer,
        kind=kind,
        choices=tuple(choices.split()),
        where="",
    )


def answers(*texts: str) -> list[Prediction]:
    return [Prediction(f"q{number}", text, 2, number != 1) for number, text in enumerate(texts)]


def test_every_figure_by_hand() -> None:
    questions = [
        question(0, "colour", "red", "red blue green yellow"),
        question(1, "colour", "blue", "red blue green yellow"),
        question(2, "existence", "yes", "yes no"),
        question(3, "existence", "no", "yes no"),
        question(4, "existence", "no", "yes no"),
    ]
    seen = answers("Red.", "a blue one", "yes", "!", "no\nno")
    blind = answers("red", "red", "no", "yes", "no")
    scores = score_lab(questions, seen, blind)
    assert [item.score for item in scores] == [1, 0, 1, 0, 1]
    assert [item.blind_score for item in scores] == [1, 0, 0, 0, 1]
    assert [item.group for item in scores] == ["s0", "s0", "s1", "s1", "s2"]
    result = summarise(questions, seen, scores).to_dict()
    low, high = result.pop("accuracy_interval")
    assert 0 <= low < 3 / 5 < high <= 1
    assert result == {
        "accuracy": pytest.approx(3 / 5),
        "mean_over_kinds": pytest.approx((1 / 2 + 2 / 3) / 2),
        "blind_accuracy": pytest.approx(2 / 5),
        "blind_mean_over_kinds": pytest.approx((1 / 2 + 1 / 3) / 2),
        "chance": pytest.approx((2 / 4 + 3 / 2) / 5),
        "by_kind": {
            "colour": {"n": 2, "accuracy": 0.5, "blind_accuracy": 0.5, "chance": 0.25},
            "existence": {
                "n": 3,
                "accuracy": pytest.approx(2 / 3),
                "blind_accuracy": pytest.approx(1 / 3),
                "chance": 0.5,
            },
        },
        "empty_share": pytest.approx(1 / 5),
        "unparsed_share": pytest.approx(1 / 5),
        "unfinished_share": pytest.approx(1 / 5),
        "n": 5,
        "scenes": 3,
    }
    assert json.loads(json.dumps(result))


def test_without_blind_pass() -> None:
    questions = [question(0, "colour", "red", "red blue")]
    scores = score_lab(questions, answers("red"), None)
    result = summarise(questions, answers("red"), scores)
    assert result.blind_accuracy is None
    assert result.blind_mean_over_kinds is None
    assert result.by_kind["colour"].blind_accuracy is None
    assert result.accuracy_interval == (1.0, 1.0)


def test_answers_out_of_order_are_a_bug() -> None:
    questions = [question(1, "colour", "red", "red blue"), question(0, "colour", "red", "red blue")]
    with pytest.raises(AssertionError, match="out of order"):
        score_lab(questions, answers("red", "red"), None)


def test_reads_the_files(lab_folder: Path) -> None:
    questions = read_questions(lab_folder)
    assert [item.id for item in questions] == [f"q{number}" for number in range(6)]
    assert questions[5].image == lab_folder / "images" / "2.png"
    assert questions[5].choices == ("yes", "no")
    assert questions[5].where.endswith("questions.jsonl, line 6")
    assert [item.id for item in read_questions(lab_folder, limit=2)] == ["q0", "q1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "green"}, r"line 3: the answer 'green' is none of the choices \['red', 'blue'"),
        ({"image": "../../secret.png"}, r"secret\.png"),
        ({"image": "images/9.png"}, r"line 3: the picture .*9\.png is missing"),
        ({"question": None}, r"line 3: question must be there"),
        ({"scene": None, "kind": 4}, r"line 3: scene, kind must be there"),
        ({"choices": "red"}, r"line 3: choices must be a list"),
        ([], r"line 3: a question is an object, this is list"),
        ("{", r"line 3: not JSON"),
    ],
)
def test_a_wrong_line_is_named(change: Any, message: str, lab_folder: Path) -> None:
    path = lab_folder / "questions.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[2])
    changed = {**record, "choices": ["red", "blue"], **change} if isinstance(change, dict) else change
    lines[2] = changed if isinstance(changed, str) else json.dumps(changed)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_questions(lab_folder)


def test_a_missing_or_empty_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dpa lab make"):
        read_questions(tmp_path)
    (tmp_path / "questions.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no question"):
        read_questions(tmp_path)


def test_evaluate_writes_predictions_and_scores(vlm: Vlm, lab_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions"
    counts: list[tuple[int, int]] = []
    result = evaluate_lab(
        vlm.model, vlm.processor, lab_folder, SETTINGS, out, progress=lambda *count: counts.append(count)
    )
    assert (result.n, result.scenes) == (6, 3)
    assert result.chance == pytest.approx(3 / 8)
    assert result.blind_accuracy is not None
    assert (counts[0], counts[-1]) == ((0, 12), (12, 12))
    assert sorted(path.name for path in out.iterdir()) == ["lab.blind.jsonl", "lab.jsonl", "lab.scores.jsonl"]
    scores = read_scores(out / "lab.scores.jsonl")
    assert [item.id for item in scores] == [f"q{number}" for number in range(6)]
    assert any(item.prediction != item.blind_prediction for item in scores)
    counts.clear()
    again = evaluate_lab(
        vlm.model, vlm.processor, lab_folder, SETTINGS, out, progress=lambda *count: counts.append(count)
    )
    assert again == result
    assert counts[0] == (6, 12)


def test_evaluate_without_blind_pass(vlm: Vlm, lab_folder: Path, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"blind": False, "limit": 2})
    result = evaluate_lab(vlm.model, vlm.processor, lab_folder, settings, tmp_path / "out")
    assert result.n == 2
    assert result.blind_accuracy is None
    assert not (tmp_path / "out" / "lab.blind.jsonl").exists()
