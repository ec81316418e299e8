"""From answers to the figures of the seven benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpa.evaluate.data.read import read_benchmark
from dpa.evaluate.data.rows import Task
from dpa.evaluate.generate import Prediction
from dpa.evaluate.native import MAX_NEW_TOKENS, NativeResult, check_native, score_native
from dpa.evaluate.scores import Scored, read_scores, write_scores
from dpa.evaluate.settings import PAPER, EvaluateSettings

SETTINGS = EvaluateSettings(benchmarks=PAPER, limit=100)


def right(task: Task) -> str:
    answer = task.record["answer"]
    return answer if isinstance(answer, str) else str(answer[0])


def answered(tasks: Sequence[Task], wrong: Sequence[str] = ()) -> list[Prediction]:
    return [Prediction(task.id, "" if task.id in wrong else right(task), 3, task.id not in wrong) for task in tasks]


def scored(name: str, folder: Path, wrong: Sequence[str] = ()) -> tuple[NativeResult, list[Scored]]:
    tasks = read_benchmark(name, folder, limit=100)
    return score_native(name, tasks, answered(tasks, wrong), answered(tasks), SETTINGS, source="here")


@pytest.mark.parametrize("name", PAPER)
def test_right_answers_are_right_and_reports_find_their_keys(name: str, files: Path) -> None:
    result, units = scored(name, files)
    shown = result.to_dict()
    assert shown["accuracy"] == pytest.approx(1)
    assert shown["accuracy_interval"] == pytest.approx([1, 1])
    assert shown["mean_over_kinds"] == shown["blind_accuracy"] == shown["blind_mean_over_kinds"] == pytest.approx(1)
    assert (shown["benchmark"], shown["profile"], shown["judge"], shown["n"]) == (name, "paper", "none", 12)
    assert (shown["partial"], shown["source"], shown["unfinished_share"]) == (True, "here", 0)
    assert json.loads(json.dumps(shown)) == shown
    assert sum(row["n"] for row in shown["by_kind"].values()) == len(units)
    assert {item.score for item in units} == {1.0}
    assert MAX_NEW_TOKENS[name] >= 16


def test_one_wrong_roll_is_a_wrong_question(files: Path) -> None:
    result, units = scored("mmbench", files, wrong=["1000003"])
    assert result.to_dict()["accuracy"] == pytest.approx(3 / 4)
    assert len(units) == 4
    assert [item.score for item in units].count(0.0) == 1
    assert units[0].answer == "A | D | C | B"
    assert units[0].prediction == "A |  | C | B"
    assert units[0].blind_score == 1
    # four rolls of four options, three of three twice, two of two
    assert result.summary["chance"] == pytest.approx((4**-4 + 2 * 3**-3 + 2**-2) / 4)
    assert result.to_dict()["unfinished_share"] == pytest.approx(1 / 12)


def test_a_pair_needs_both(files: Path) -> None:
    result, units = scored("mmvp", files, wrong=["2", "3", "4"])
    assert result.to_dict()["accuracy"] == pytest.approx(4 / 6)
    assert [item.score for item in units] == [0, 0, 1, 1, 1, 1]
    assert result.summary["chance"] == pytest.approx(1 / 4)


def test_sources_of_cvbench_count_alike(files: Path, tmp_path: Path) -> None:
    # 2D: rows 0 and 3 are ADE20K, the other four COCO; 3D: six of Omni3D
    result, units = scored("cvbench", files, wrong=["2D-0", "3D-0"])
    assert result.to_dict()["accuracy"] == pytest.approx(((1 / 2 + 1) / 2 + 5 / 6) / 2)
    low, high = result.to_dict()["accuracy_interval"]
    assert low < result.to_dict()["accuracy"] < high
    total = sum(item.weight for item in units)
    assert sum(item.weight * item.score for item in units) / total == pytest.approx(result.to_dict()["accuracy"])
    path = tmp_path / "cvbench.scores.jsonl"
    write_scores(path, units)
    assert read_scores(path) == units


def test_free_text_cannot_be_guessed(files: Path) -> None:
    assert scored("docvqa", files)[0].summary["chance"] == 0
    assert scored("naturalbench", files)[0].summary["chance"] == pytest.approx(1 / 2)


def test_without_blind_pass(files: Path) -> None:
    tasks = read_benchmark("ai2d", files, limit=100)
    result, units = score_native("ai2d", tasks, answered(tasks), None, SETTINGS, source="")
    assert result.to_dict()["blind_accuracy"] is None
    assert result.to_dict()["blind_mean_over_kinds"] is None
    assert units[0].blind_prediction is None


def test_answers_out_of_order_are_a_bug(files: Path) -> None:
    tasks = read_benchmark("ai2d", files, limit=100)
    with pytest.raises(AssertionError, match="out of order"):
        score_native("ai2d", tasks, answered(tasks)[::-1], None, SETTINGS, source="")


def test_files_are_checked_without_a_model(files: Path) -> None:
    assert check_native("docvqa", files, limit=3) is not None
