"""MMBench, AI2D, CV-Bench, MMVP, NaturalBench: what counts as one, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest

from dpa.errors import DataError
from dpa.evaluate.scoring import ScoringRules, score

MILLION = 1_000_000
CHOICES = {"A": "cat", "B": "dog"}
STRICT = ScoringRules(profile="strict")


def roll(question: int, number: int, prediction: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "id": question + number * MILLION, "prediction": prediction, "answer": answer, "choices": CHOICES, **more
    }  # fmt: skip


def test_mmbench_counts_questions_of_which_all_rolls_are_right() -> None:
    records = [
        roll(7, 0, "A", "A", category="x", l2_category="p"),
        roll(8, 0, "B", "B", category="y", l2_category="p"),
        roll(7, 1, "B", "B", category="x", l2_category="p"),
        roll(8, 1, "B", "A", category="y", l2_category="p"),
    ]
    found = score("mmbench", records)
    assert found.headline == "overall"
    assert found.metrics == {
        "overall": 50.0,
        "vanilla": 75.0,
        "rolls_per_question": 2.0,
        "l2_category/p": 50.0,
        "category/x": 100.0,
        "category/y": 0.0,
    }
    assert [(unit.id, unit.score) for unit in found.units] == [("7", 1.0), ("8", 0.0)]
    assert [record.group for record in found.records] == ["7", "8", "7", "8"]
    assert [record.kind for record in found.records] == ["x", "y", "x", "y"]


def test_mmbench_an_unread_roll_makes_the_question_wrong() -> None:
    found = score("mmbench", [roll(1, 0, "A", "A"), roll(1, 1, "well", "B")])
    assert found.metrics["overall"] == 0.0
    assert found.unparsed_share == 0.5


def test_mmbench_missing_rolls_are_counted() -> None:
    three = {"A": "x", "B": "y", "C": "z"}
    records = [
        roll(1, 0, "A", "A"),
        roll(1, 1, "B", "B"),
        roll(2, 0, "A", "A"),
        {**roll(3, 2, "A", "A"), "choices": three},
    ]
    with pytest.raises(DataError, match="2 of 3 questions lack rolls, 3 records are missing") as caught:
        score("mmbench", records)
    assert "question 2 lacks roll 1; question 3 lacks roll 0, roll 1" in str(caught.value)
    assert score("mmbench", records, complete=False).metrics["overall"] == 100.0


def test_mmbench_first_rolls_alone_are_no_circle_unless_rolls_says_so() -> None:
    records = [roll(1, 0, "A", "A"), roll(2, 0, "B", "A")]
    assert score("mmbench", records).metrics == {"overall": 50.0, "vanilla": 50.0, "rolls_per_question": 1.0}
    with pytest.raises(DataError, match="question 1 lacks roll 1"):
        score("mmbench", [{**record, "rolls": 2} for record in records])
    with pytest.raises(DataError, match="question 2 lacks roll 0"):
        score("mmbench", [roll(1, 0, "A", "A"), roll(2, 1, "A", "A")])


def test_ai2d_profiles_and_versions() -> None:
    choices = {"A": "the larva", "B": "the pupa"}
    record = {"id": "x", "prediction": "A moth leaves the pupa", "answer": "B", "choices": choices}
    assert score("ai2d", [record]).metrics == {"accuracy": 0.0}
    assert score("ai2d", [record], ScoringRules(vlmevalkit="2026-08")).metrics == {"accuracy": 100.0}
    strict = score("ai2d", [record], STRICT)
    assert (strict.metrics["accuracy"], strict.unparsed_share) == (0.0, 1.0)


def test_ai2d_answer_that_is_an_index_is_refused() -> None:
    with pytest.raises(DataError, match=r"record 1, field answer: is '2', must be a letter of the choices \(A, B\)"):
        score("ai2d", [{"id": 1, "prediction": "A", "answer": "2", "choices": CHOICES}])


def view(number: int, prediction: str, source: str, **more: Any) -> dict[str, Any]:
    return {
        "id": number, "prediction": prediction, "answer": "(A)", "choices": CHOICES, "source": source, **more
    }  # fmt: skip


def test_cvbench_is_the_mean_of_2d_and_3d_not_of_rows() -> None:
    records = [
        view(1, "A", "ADE20K", task="Count"),
        view(2, "A", "COCO", task="Count"),
        view(3, "B", "COCO"),
        view(4, "A", "Omni3D"),
        view(5, "B", "Omni3D"),
        view(6, "B", "Omni3D"),
        view(7, "B", "Omni3D"),
    ]
    found = score("cvbench", records)
    assert found.metrics == pytest.approx(
        {"overall": 50.0, "2D": 75.0, "3D": 25.0, "ADE20K": 100.0, "COCO": 50.0, "Omni3D": 25.0}
        | {"row_accuracy": 100 * 3 / 7, "task/Count": 100.0},
        abs=1e-9,  # sums of thirds and sevenths
    )
    assert sum(unit.weight for unit in found.units) == pytest.approx(1.0, abs=1e-12)


def test_cvbench_an_absent_source_is_counted() -> None:
    with pytest.raises(DataError, match=r"2 of 3 sources have no row \(ADE20K 0, COCO 1, Omni3D 0\)"):
        score("cvbench", [view(1, "A", "COCO")])
    part = score("cvbench", [view(1, "A", "COCO"), view(2, "B", "ADE20K")], complete=False)
    assert (part.metrics["overall"], part.metrics["2D"], "3D" in part.metrics) == (50.0, 50.0, False)
    with pytest.raises(DataError, match="field source: is 'coco'; known: ADE20K, COCO, Omni3D"):
        score("cvbench", [view(1, "A", "coco")])


def door(index: int, prediction: str, answer: str) -> dict[str, Any]:
    return {"id": index, "prediction": prediction, "answer": answer, "choices": {"A": "Open", "B": "Closed"}}


def test_mmvp_counts_pairs() -> None:
    records = [door(3, "A", "(a)"), door(2, "closed", "(b)"), door(1, "(A)", "(a)"), door(4, "A", "(b)")]
    found = score("mmvp", records)
    assert found.metrics == {"pair_accuracy": 50.0, "row_accuracy": 75.0}
    assert {unit.id: unit.score for unit in found.units} == {"pair 1-2": 1.0, "pair 3-4": 0.0}


def test_mmvp_half_pairs_are_counted() -> None:
    with pytest.raises(
        DataError, match="2 of 2 pairs have one half, 2 records are missing: pair 1-2 lacks index 1; pair 3"
    ):
        score("mmvp", [door(2, "A", "A"), door(3, "A", "A")])
    with pytest.raises(DataError, match="field index: is 0; mmvp counts from 1"):
        score("mmvp", [door(0, "A", "A")])


def quadruple(group: int, answers: str, kind: str = "yes_no") -> list[dict[str, Any]]:
    """``answers``: one character each, y or n, of q0-i0, q0-i1, q1-i0, q1-i1."""
    words = {"y": "Yes", "n": "No"} if kind == "yes_no" else {"y": "A", "n": "B"}
    return [
        {"id": 4 * group + i, "prediction": words[said], "answer": words[right], "question_type": kind}
        for i, (said, right) in enumerate(zip(answers, "ynny", strict=True))
    ]


@pytest.mark.parametrize(
    ("answers", "acc", "q", "i", "g"),
    [
        ("ynny", 100, 100, 100, 100),
        ("yyny", 75, 50, 50, 0),
        ("ynyn", 50, 50, 0, 0),  # the first question on both images
        ("yynn", 50, 0, 50, 0),  # both questions on the first image
        ("yyyy", 50, 0, 0, 0),
        ("nyyn", 0, 0, 0, 0),
    ],
)
def test_naturalbench(answers: str, acc: float, q: float, i: float, g: float) -> None:
    records = quadruple(0, "ynny") + quadruple(1, answers, "multiple_choice")
    expected = {"Acc": acc, "Q-Acc": q, "I-Acc": i, "G-Acc": g}
    found = score("naturalbench", records)
    assert found.metrics == {name: (100 + value) / 2 for name, value in expected.items()}
    assert found.headline == "Acc"
    assert [unit.group for unit in found.units] == ["0"] * 4 + ["1"] * 4


def test_naturalbench_gaps_are_counted() -> None:
    records = quadruple(0, "ynny") + quadruple(1, "ynny")[1:3]
    with pytest.raises(DataError, match="1 of 2 groups of four are not whole, 2 records are missing") as caught:
        score("naturalbench", records)
    assert "group 1 lacks index 4 (q0-i0), index 7 (q1-i1)" in str(caught.value)
    assert score("naturalbench", records, complete=False).metrics["G-Acc"] == 100.0
    assert set(score("naturalbench", records[4:], complete=False).metrics) == {"Acc"}


def test_naturalbench_strict_and_wrong_fields() -> None:
    records = quadruple(0, "ynny", "multiple_choice")
    records[0] |= {"prediction": "inside", "choices": {"A": "inside", "B": "outside"}}
    records[1] |= {"prediction": "B, outside"}
    assert score("naturalbench", records).metrics["Acc"] == 75.0
    assert score("naturalbench", records, STRICT).metrics["Acc"] == 75.0
    with pytest.raises(DataError, match="field answer: is 'Yes'; for multiple_choice it is A or B"):
        score("naturalbench", [records[0] | {"answer": "Yes"}], complete=False)
    with pytest.raises(DataError, match="field question_type: must be text, is missing"):
        score("naturalbench", [{"id": 0, "prediction": "", "answer": "Yes"}], complete=False)


@pytest.mark.parametrize("benchmark", ["mmbench", "mmvp", "naturalbench"])
def test_an_index_twice_is_counted(benchmark: str) -> None:
    record = {"prediction": "A", "answer": "A", "choices": CHOICES, "question_type": "multiple_choice", "index": 1}
    with pytest.raises(DataError, match=rf"{benchmark}: 2 records repeat an index: 1 \(record 1; record 2\); 1 \("):
        score(benchmark, [record | {"id": name} for name in "xyz"])
