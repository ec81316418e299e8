"""DocVQA, OCRBench, the lab."""

from __future__ import annotations

import pytest

from dpa.errors import DataError
from dpa.evaluate.scoring import ScoringRules, score

STRICT = ScoringRules(profile="strict")


def test_docvqa() -> None:
    records = [
        {"id": 1, "prediction": "Coffee", "answer": ["tea", "coffee"], "document": "d"},
        {"id": 2, "prediction": "cof", "answer": "coffee"},
        {"id": 3, "prediction": " ", "answer": ["coffee"]},
    ]
    found = score("docvqa", records)
    assert found.metrics == {"anls": 50.0}
    assert [record.group for record in found.records] == ["d", "2", "3"]
    assert (found.unparsed_share, found.empty_share) == (0.0, pytest.approx(1 / 3))
    with pytest.raises(DataError, match="field answer: must be a text or a list of texts, is a number"):
        score("docvqa", [{"id": 1, "prediction": "7", "answer": 7}])


def test_ocrbench() -> None:
    records = [
        {"id": 1, "prediction": "it says STOP", "answer": ["stop"], "question_type": "Regular Text Recognition"},
        {"id": 2, "prediction": "halt", "answer": ["stop"], "question_type": "Digit String Recognition"},
        {"id": 3, "prediction": "x^{ 2 }", "answer": ["x^{2}"],
         "question_type": "Handwritten Mathematical Expression Recognition"},
        {"id": 4, "prediction": "2019.", "answer": "2019", "question_type": "Doc-oriented VQA"},
    ]  # fmt: skip
    found = score("ocrbench", records)
    assert (found.headline, found.metrics["score"], found.metrics["hits"]) == ("score", 75.0, 3.0)
    assert found.metrics["category/Text Recognition"] == 50.0
    assert found.metrics["question_type/Digit String Recognition"] == 0.0
    assert score("ocrbench", records, STRICT).metrics["hits"] == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": [" "]}, "field answer: is .* an empty text would be contained in every answer"),
        ({"answer": []}, "field answer: must be a text or a list"),
        ({"answer": [1042]}, "field answer: must be a text or a list"),
        ({"question_type": "Handwritten maths"}, "field question_type: is 'Handwritten maths'; known: Regular"),
    ],
)
def test_ocrbench_refuses(change: dict[str, object], message: str) -> None:
    record = {"id": 1, "prediction": "x", "answer": ["x"], "question_type": "Doc-oriented VQA"}
    with pytest.raises(DataError, match=message):
        score("ocrbench", [record | change])


def test_lab() -> None:
    base = {"answer": "red", "choices": ["red", "blue"], "kind": "colour", "scene": "s"}
    records = [
        base | {"id": number, "prediction": prediction}
        for number, prediction in enumerate(["Red!", "red\nas a rose", "blue", "it is red", "..."])
    ]
    found = score("lab", records)
    assert found.metrics == {"accuracy": 40.0, "kind/colour": 40.0}
    assert (found.unparsed_share, found.empty_share) == (0.2, 0.2)
    assert score("lab", records, STRICT).metrics["accuracy"] == 0.0
    with pytest.raises(DataError, match="none of the choices"):
        score("lab", [records[0] | {"answer": "green"}])
