"""Evaluation of a saved checkpoint through stock classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpa.errors import DataError, ModelError, UserError
from dpa.evaluate.checkpoint import evaluate_checkpoint, settings_of
from dpa.evaluate.lab import evaluate_lab
from dpa.evaluate.predictions import folder_for
from dpa.evaluate.settings import PAPER, EvaluateSettings
from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.vlm import Vlm
from dpa.testing.parts import TinyFamily
from tests.unit.evaluate.conftest import tiny_vlm


def settings(lab_folder: Path) -> EvaluateSettings:
    return EvaluateSettings(benchmarks=("lab",), data=lab_folder, batch_size=4, max_new_tokens=5)


@pytest.mark.parametrize("family", ["lab", "gemma2"])
def test_a_saved_checkpoint_answers_as_the_model_in_memory(
    family: TinyFamily, lab_folder: Path, tmp_path: Path
) -> None:
    vlm = tiny_vlm(tmp_path / "parts", family)
    expected = evaluate_lab(vlm.model, vlm.processor, lab_folder, settings(lab_folder), tmp_path / "memory")
    save_checkpoint(vlm, tmp_path / "checkpoint")
    result = evaluate_checkpoint(str(tmp_path / "checkpoint"), settings=settings(lab_folder))
    assert result.predictions == tmp_path / "checkpoint.eval"
    assert result.results == {"lab": expected.to_dict()}
    name = "lab.scores.jsonl"
    assert (result.predictions / name).read_text() == (tmp_path / "memory" / name).read_text()
    assert result.to_dict()["benchmarks"]["lab"]["n"] == 6
    assert json.loads(json.dumps(result.to_dict()))
    assert "all questions" in result.text()


def test_where_an_evaluation_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "checkpoint")
    for name in (".", "./", str(Path.cwd()), f"{Path.cwd()}/", "../checkpoint/"):
        assert folder_for(name).resolve() == tmp_path / "run" / "checkpoint.eval"
    assert folder_for("..").resolve() == tmp_path / "run.eval"
    assert folder_for("llava-hf/llava-1.5-7b-hf") == Path("eval/llava-hf--llava-1.5-7b-hf")


def test_no_checkpoint_is_a_message(lab_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        evaluate_checkpoint(str(tmp_path), settings=settings(lab_folder))


def test_files_are_checked_before_the_model_is_loaded(vlm: Vlm, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions\.jsonl is missing"):
        evaluate_checkpoint("no/such", settings=settings(tmp_path))


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    found = settings_of(benchmarks=["lab"], data=tmp_path, limit=None, batch_size=8)
    assert (found.benchmarks, found.data, found.batch_size) == (("lab",), tmp_path, 8)
    with pytest.raises(UserError, match="no benchmark lob; known: paper, all, mmbench, ai2d"):
        settings_of(benchmarks=["lob"], data=tmp_path, limit=None, batch_size=8)
    assert settings_of(benchmarks=["lab", "all"], data=tmp_path).benchmarks == ("lab", *PAPER)
    with pytest.raises(UserError, match=r"profile: .*'paper' or 'strict'"):
        settings_of(benchmarks=["paper"], data=tmp_path, profile="loose")
    with pytest.raises(UserError, match=r"limit: .*greater than or equal to 1"):
        settings_of(benchmarks=["lab"], data=tmp_path, limit=0, batch_size=8)


def test_missing_benchmarks_are_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mmbench: no files in .*\n.*\n.*MMBench_DEV_EN\.tsv: https"):
        evaluate_checkpoint("no/such", settings=settings_of(benchmarks=["paper"], data=tmp_path))
