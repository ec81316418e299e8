"""The dictionary of benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from dpa.errors import DataError, UserError
from dpa.evaluate.benchmarks import BENCHMARKS, check_benchmarks, run_benchmarks
from dpa.evaluate.settings import EvaluateSettings
from dpa.models.vlm import Vlm


def test_settings_and_dictionary_name_the_same() -> None:
    annotation = get_args(EvaluateSettings.model_fields["benchmarks"].annotation)[0]
    assert set(get_args(annotation)) == set(BENCHMARKS)


def test_files_are_checked_without_a_model(lab_folder: Path) -> None:
    check_benchmarks(EvaluateSettings())
    settings = EvaluateSettings(benchmarks=("lab",), data=lab_folder)
    check_benchmarks(settings)
    (lab_folder / "images" / "1.png").unlink()
    with pytest.raises(DataError, match=r"line 3: the picture .*1\.png is missing"):
        check_benchmarks(settings)
    check_benchmarks(settings.model_copy(update={"limit": 2}))
    with pytest.raises(UserError, match=r"needs evaluate\.data"):
        check_benchmarks(EvaluateSettings(benchmarks=("lab",)))


def test_runs_what_the_settings_name(vlm: Vlm, lab_folder: Path, tmp_path: Path) -> None:
    settings = EvaluateSettings(benchmarks=("lab",), data=lab_folder, max_new_tokens=2)
    results = run_benchmarks(vlm.model, vlm.processor, settings, tmp_path / "out")
    assert list(results) == ["lab"]
    assert results["lab"]["n"] == 6
    assert run_benchmarks(vlm.model, vlm.processor, EvaluateSettings(), tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()
