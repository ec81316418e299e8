"""Files and fields: every mistake names file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpa.errors import DataError
from dpa.evaluate.scoring import read_records, score

GOOD: dict[str, Any] = {"id": "a", "prediction": "A", "answer": "A", "choices": {"A": "x", "B": "y"}}


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_read(tmp_path: Path) -> None:
    odd = "line\u2028separator"
    path = write(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"id": 1}).encode(),
        "",
        json.dumps({"id": odd}, ensure_ascii=False),
    )
    assert read_records(path) == [{"id": 1, "where": f"{path}, line 1"}, {"id": odd, "where": f"{path}, line 3"}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{}", "{"], "line 2: not JSON"),
        (["[1]"], "line 1: a record is an object, this is a list"),
        (["{}", b'{"id": "\xff"}'], "line 2: not UTF-8"),
        (["[" * 100_000], "line 1: not JSON"),
        (["", " "], "holds no record"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, lines: list[str | bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / "a.jsonl", *lines))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        read_records(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "field id: must be a text or a whole number, is missing"),
        ({"id": 1.5}, "field id: must be a text or a whole number, is a number"),
        ({"id": True}, "field id"),
        ({"prediction": None}, "field prediction: must be text, is missing or null; an answer that failed"),
        ({"prediction": 3}, "field prediction: must be text, is a number"),
        ({"answer": None}, "field answer: must be text, is missing"),
        ({"answer": "C"}, r"field answer: is 'C', must be a letter of the choices \(A, B\)"),
        ({"answer": "AB"}, "field answer: is 'AB'"),
        ({"choices": None}, "field choices: must map letters to texts, at least two, is missing"),
        ({"choices": {"A": "x"}}, "field choices: must map"),
        ({"choices": {"A": "x", "b": "y"}}, "field choices: has the key 'b'"),
        ({"choices": {"A": "x", "B": None}}, "field choices: B must be text, is None; leave out options"),
        ({"choices": {"A": "x", "B": " "}}, "field choices: B must be text"),
        ({"category": 3}, "field category: must be text, is a number"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(GOOD | {"id": "b"}), json.dumps(GOOD | change))
    with pytest.raises(DataError, match=message) as caught:
        score("ai2d", read_records(path))
    assert str(caught.value).startswith(f"{path}, line 2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "field index: is missing, and the id 'a' is no number"),
        ({"index": "1"}, "field index: must be a whole number from 0, is '1'"),
        ({"index": -1}, "field index"),
        ({"index": True}, "field index"),
        ({"index": 1, "rolls": 0}, "field rolls: must be a whole number from 1, is 0"),
    ],
)
def test_a_wrong_index_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"record 1, {message}"):
        score("mmbench", [GOOD | change])


def test_ids_twice_are_counted() -> None:
    records = [GOOD | {"id": number} for number in (1, "1", 2, 2, 2)]
    with pytest.raises(DataError, match=r"ai2d: 3 records repeat an id: 1 \(record 1; record 2\); 2 \("):
        score("ai2d", records)


def test_many_gaps_are_counted_and_a_few_named() -> None:
    with pytest.raises(DataError, match=r"9 of 9 pairs have one half, 9 records are missing: .* and 4 more") as caught:
        score("mmvp", [GOOD | {"id": 2 * number} for number in range(1, 10)])
    assert len(str(caught.value)) < 500


def test_choices_as_a_list_and_answers_in_brackets() -> None:
    assert (
        score("ai2d", [GOOD | {"choices": ["x", "y"], "answer": "(b)", "prediction": "y"}]).metrics["accuracy"] == 100.0
    )
