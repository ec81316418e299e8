"""``dpa eval --harness lmms-eval`` where the extra is not there, and what the options ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpa.cli import main
from dpa.evaluate.harness import run
from dpa.evaluate.harness.door import HarnessResult, Metric


def code_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert isinstance(done.value.code, int)
    return done.value.code


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert code_of(["eval", "no/such", "--harness", "lmms-eval", "--benchmarks", "ai2d"]) == 2
    captured = capsys.readouterr()
    assert "pip install lmms-eval==0.7.3" in captured.err
    assert not captured.out


def test_options_reach_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def evaluate(checkpoint: str, **options: object) -> HarnessResult:
        asked = {"benchmarks": ["ai2d", "mmvp"], "data": Path("d"), "out": Path("o"), "limit": 5, "batch_size": 2}
        assert {name: options[name] for name in asked} == asked
        metric = Metric("ai2d", "ai2d", "exact_match", "flexible-extract", 0.5, None, 5)
        return HarnessResult("lmms-eval 0.7.3", checkpoint, Path("o"), (metric,))

    monkeypatch.setattr(run, "evaluate_with_lmms_eval", evaluate)
    options = ["--data", "d", "--out", "o", "--limit", "5", "--batch-size", "2"]
    main_arguments = ["eval", "a/b", "--harness", "lmms-eval", "--benchmarks", "ai2d,mmvp", *options]
    assert code_of(main_arguments) == 0
    assert "ai2d       ai2d  exact_match (flexible-extract)  5  0.5000" in capsys.readouterr().out


def test_our_own_evaluation_needs_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["eval", "no/such"]) == 2
    assert "--data is missing" in capsys.readouterr().err
