"""A step's result does not depend on how its samples are split into micro-batches (method.md, row "normalisation")."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.stages import Options, Trained, run

LOSS, NORM = 1e-6, 1e-5
"""Relative; float32 sums in another order."""
WEIGHTS = 5e-6
"""Absolute, 5e-3 of the learning rate: Adam divides by a gradient's own size, so roundings of tiny ones grow."""

CASES = {
    "cmo, mean policy": Options(),
    "cmo, minimum": Options(more={"text_only": "minimum"}),
    "cal": Options(objective="cal", bounds=None),
    "uniform": Options(objective="uniform"),
    "pretrain": Options(stage="pretrain"),
    "spans": Options(stage="pretrain", objective="spans", bounds=None),
    "proxy": Options(stage="proxy"),
    "by length": Options(more={"group_by_length": True}),
    "gemma2, ragged last batch": Options(family="gemma2", samples=19, max_steps=3),
}


def assert_same(found: Trained, expected: Trained) -> None:
    for row, wanted in zip(found.rows, expected.rows, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=LOSS)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM)
        # weights are differences of probabilities, here as small as 1e-4 of them
        assert row["mean_weight"] == pytest.approx(wanted["mean_weight"], rel=1e-5)
        assert [row[name] for name in ("samples", "tokens", "sequence_tokens")] == [
            wanted[name] for name in ("samples", "tokens", "sequence_tokens")
        ]
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=WEIGHTS, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_eight_by_one_is_four_by_two_is_one_by_eight(tmp_path: Path, case: str) -> None:
    options = CASES[case]
    whole = run(tmp_path / "8", replace(options, micro_batch=8))
    assert len({row["loss"] for row in whole.rows}) == len(whole.rows), "the weights must move"
    for micro_batch in (4, 1):
        assert_same(run(tmp_path / str(micro_batch), replace(options, micro_batch=micro_batch)), whole)


@pytest.mark.parametrize("case", ["cmo, mean policy", "proxy", "gemma2, ragged last batch"])
def test_padded_is_packed_is_cut_by_tokens(tmp_path: Path, case: str) -> None:
    options = CASES[case]
    padded = run(tmp_path / "padded", replace(options, more={"packing": False}))
    assert_same(run(tmp_path / "packed", replace(options, more={"packing": True})), padded)
    for budget in (1, 40):
        more = {"tokens_per_micro_batch": budget}
        assert_same(run(tmp_path / str(budget), replace(options, more=more)), padded)


def test_the_text_only_policy_matters(tmp_path: Path) -> None:
    """Else the cases above would compare nothing."""
    losses = {
        run(tmp_path / policy, Options(max_steps=1, more={"text_only": policy})).rows[0]["loss"]
        for policy in ("mean", "minimum", "zero")
    }
    assert len(losses) == 3
