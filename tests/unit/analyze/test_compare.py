"""Methods side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dpa.analyze.compare import compare_runs, paired_difference
from dpa.errors import UserError
from dpa.evaluate.scores import PREDICTIONS, scores_path, write_scores
from tests.unit.analyze.conftest import scored, write_run


def test_paired_difference() -> None:
    found = paired_difference(scored(30), reversed(scored(20)))
    assert found is not None
    difference, (low, high), n, groups = found
    assert (difference, n, groups) == (0.25, 40, 20)
    assert 0 < low < 0.25 < high < 0.5
    assert paired_difference(scored(30), scored(30)) == (0, (0, 0), 40, 20)


def test_pairing_needs_the_same_questions() -> None:
    assert paired_difference(scored(30), scored(30)[1:]) is None
    moved = [replace(item, group="elsewhere") for item in scored(30)]
    assert paired_difference(scored(30), moved) is None
    assert paired_difference([], []) is None


def test_one_run(run_folder: Path) -> None:
    comparison = compare_runs([run_folder])
    assert list(comparison.results["lab"]) == ["dpa", "vanilla"]
    (difference,) = comparison.differences
    assert (difference.column, difference.baseline, difference.difference) == ("dpa", "vanilla", 0.25)
    found = json.loads(json.dumps(comparison.to_dict()))
    assert found["results"]["lab"]["vanilla"]["accuracy"] == 0.5
    assert found["differences"][0]["interval"][0] > 0
    assert "dpa - vanilla: +25.0 points" in comparison.text()
    assert "| **all questions** | **40** | **75.0** |" in comparison.markdown()


def test_several_runs_use_their_own_baseline_or_the_first(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {"dpa": 30, "vanilla": 20}, name="a")
    second = write_run(tmp_path / "b", {"cal": 22}, name="b")
    third = write_run(tmp_path / "c", {"vanilla": 10, "dpa": 30}, name="c")
    comparison = compare_runs([first, second, third])
    assert list(comparison.results["lab"]) == ["a/dpa", "a/vanilla", "b/cal", "c/vanilla", "c/dpa"]
    assert [(item.column, item.baseline, item.difference) for item in comparison.differences] == [
        ("a/dpa", "a/vanilla", 0.25),
        ("b/cal", "a/vanilla", pytest.approx(0.05)),
        ("c/dpa", "c/vanilla", 0.5),
    ]


def test_without_vanilla_the_first_column_is_the_baseline(tmp_path: Path) -> None:
    comparison = compare_runs([write_run(tmp_path / "a", {"dpa": 30, "cal": 30})])
    assert [(item.column, item.baseline) for item in comparison.differences] == [("cal", "dpa")]
    assert "not distinguishable" in comparison.text()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "run", {"dpa": 30}, name="run") for place in "xy"]
    assert list(compare_runs(folders).results["lab"]) == [f"{folder}/dpa" for folder in folders]


def test_what_cannot_be_paired_is_said(run_folder: Path) -> None:
    path = scores_path(run_folder / "vanilla" / PREDICTIONS, "lab")
    write_scores(path, scored(20)[:-1])
    comparison = compare_runs([run_folder])
    assert comparison.differences == ()
    assert "answered different questions" in comparison.text()
    path.unlink()
    assert "stored scores are missing" in compare_runs([run_folder]).markdown()


def test_nothing_evaluated_is_a_message(run_folder: Path) -> None:
    path = run_folder / "summary.json"
    summary = json.loads(path.read_text())
    for method in summary["methods"].values():
        method["evaluation"] = {}
    path.write_text(json.dumps(summary))
    with pytest.raises(UserError, match="nothing to compare"):
        compare_runs([run_folder])
