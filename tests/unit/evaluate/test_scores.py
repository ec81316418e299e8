"""Scores on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpa.errors import CheckpointError
from dpa.evaluate.scores import Scored, read_scores, scores_path, write_scores


def test_round_trip(tmp_path: Path) -> None:
    path = scores_path(tmp_path / "deep", "lab")
    scores = [
        Scored("a", "s", "colour", "red", 'red\u2028\nbl"ue é', 1.0, "", 0.0),
        Scored("b", "s", "count", "two", "", 0.0),
    ]
    write_scores(path, scores)
    assert read_scores(path) == scores


@pytest.mark.parametrize("line", ["{", '{"id": "a"}', "[]"])
def test_a_broken_file_names_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "lab.scores.jsonl"
    write_scores(path, [Scored("a", "s", "colour", "red", "red", 1.0)])
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match="line 2"):
        read_scores(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lab\.scores\.jsonl cannot be read"):
        read_scores(tmp_path / "lab.scores.jsonl")
