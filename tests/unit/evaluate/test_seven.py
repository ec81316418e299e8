"""All eight benchmarks of a saved checkpoint by one call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dpa.errors import DataError
from dpa.evaluate.checkpoint import CheckpointResult, evaluate_checkpoint, settings_of
from dpa.evaluate.overview import average
from dpa.evaluate.paper import paper_row
from dpa.evaluate.scores import read_scores, scores_path
from dpa.evaluate.settings import PAPER
from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.vlm import Vlm
from dpa.testing.benchmarks import odd_pictures, text64, write_tsv

CHOICES = ("mmbench", "ai2d", "cvbench", "mmvp", "naturalbench")


@pytest.fixture(scope="module")
def checkpoint(vlm: Vlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seven") / "checkpoint"
    save_checkpoint(vlm, folder)
    return folder


def evaluated(checkpoint: Path, files: Path, out: Path, *names: str, **others: object) -> CheckpointResult:
    settings = settings_of(
        benchmarks=names or ("all",), data=files, limit=100, batch_size=6, max_new_tokens=3, **others
    )
    return evaluate_checkpoint(str(checkpoint), settings=settings, out=out, paper=paper_row("gemma2-9b/sharegpt4v"))


def test_one_call_for_all(checkpoint: Path, files: Path, tmp_path: Path) -> None:
    result = evaluated(checkpoint, files, tmp_path)
    assert list(result.results) == [*PAPER, "lab"]
    assert [result.results[name]["n"] for name in PAPER] == [12] * 7
    assert [result.results[name]["headline"] for name in PAPER] == [
        "overall", "accuracy", "anls", "score", "overall", "pair_accuracy", "Acc",
    ]  # fmt: skip
    text = result.text()
    assert "average (partial)" in text
    assert "Gemma-2-9B-it" in text
    assert "all questions" in text, "the lab's own table"
    shown = json.loads(json.dumps(result.to_dict()))
    assert shown["average"] == average(result.results)
    assert shown["paper"]["averages"]["dpa"] == 50.0
    for name in PAPER:
        units = read_scores(scores_path(tmp_path, name))
        assert len(units) == {"mmbench": 4, "mmvp": 6}.get(name, 12)
        assert not (tmp_path / f"{name}.blind.jsonl").exists()
    assert (tmp_path / "lab.blind.jsonl").exists()

    # what a kill leaves: a file cut in a line, and one that was never begun
    path = tmp_path / "docvqa.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
    (tmp_path / "mmvp.jsonl").unlink()
    assert evaluated(checkpoint, files, tmp_path).to_dict() == result.to_dict()


def test_blind_and_ranked(checkpoint: Path, files: Path, tmp_path: Path) -> None:
    names = ("mmvp", "naturalbench", "ocrbench")
    result = evaluated(checkpoint, files, tmp_path, *names, blind=True, rank_options=True, profile="strict")
    for name in names:
        assert result.results[name]["profile"] == "strict"
        assert result.results[name]["blind_accuracy"] is not None
        assert ("ranked" in result.results[name]) == (name in CHOICES)
    assert result.results["mmvp"]["ranked"]["by_kind"]["all"]["n"] == 6
    assert len(read_scores(scores_path(tmp_path, "naturalbench.ranked"))) == 12
    assert "profile strict" in result.text()
    assert "no average: it needs all seven" in result.text()


def test_a_broken_picture_ends_it_with_its_row(checkpoint: Path, files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "lab", tmp_path / "data" / "lab")
    good, broken = text64(odd_pictures()[0]), text64(odd_pictures()[0][:60] + b"\0" * 60)
    row = {"question": "q", "A": "x", "B": "y", "answer": "A"}
    write_tsv(
        tmp_path / "data" / "AI2D_TEST.tsv",
        [{"index": 7, **row, "image": good}, {"index": 8, **row, "image": broken}],
    )
    with pytest.raises(DataError, match=r"question '8' \(.*line 3\): .*the image of .*line 3"):
        evaluated(checkpoint, tmp_path / "data", tmp_path / "out", "ai2d")
