"""Reading a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpa.analyze.runs import read_run
from dpa.errors import UserError


def test_methods_lie_where_the_pipeline_puts_them(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert (run.name, run.methods) == ("quickstart", ("dpa", "vanilla"))
    assert run.folder_of("dpa") == run_folder
    assert run.folder_of("vanilla") == run_folder / "vanilla"
    assert {row["stage"] for row in run.metrics("dpa")} == {"proxy", "pretrain", "finetune"}
    assert {row["stage"] for row in run.metrics("vanilla")} == {"pretrain", "finetune"}
    dpa, vanilla = run.scores("dpa", "lab"), run.scores("vanilla", "lab")
    assert dpa is not None
    assert vanilla is not None
    assert (sum(item.score for item in dpa), sum(item.score for item in vanilla)) == (30, 20)
    assert run.scores("dpa", "mmvp") is None
    assert run.recipe()["model"]["llm"] == "lab:llm"


def test_a_line_that_is_being_written_is_left_out(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    whole = len(read_run(run_folder).metrics("dpa"))
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"stage": "finetune", "st')
    assert len(read_run(run_folder).metrics("dpa")) == whole
    path.unlink()
    assert read_run(run_folder).metrics("dpa") == []


@pytest.mark.parametrize("text", [None, "{", "[]", '{"name": "x"}'])
def test_no_run_is_a_message(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json|no run's folder"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '[{"image": "x"}]', "[3]"])
def test_wrong_samples_are_a_message(text: str, run_folder: Path) -> None:
    (run_folder / "samples.json").write_text(text)
    with pytest.raises(UserError, match=r"samples\.json"):
        read_run(run_folder).samples()
