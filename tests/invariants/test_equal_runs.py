"""Settings that must not change a result, and one that makes two objectives the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.stages import Options, Trained, run


def assert_close(found: Trained, expected: Trained, *, atol: float) -> None:
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found.rows] == pytest.approx([row[name] for row in expected.rows], rel=1e-6)
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("bound", [0.3, 1.0])
def test_equal_bounds_are_uniform(tmp_path: Path, stage: str, bound: float) -> None:
    """delta_min = delta_max: one weight for all tokens, text-only ones included, cancels."""
    options = Options(stage=stage, micro_batch=3)
    uniform = run(tmp_path / "uniform", replace(options, objective="uniform"))
    bounded = run(tmp_path / "bounded", replace(options, bounds=(bound, bound)))
    assert bounded.rows[0]["mean_weight"] == pytest.approx(bound)
    # 5e-3 of the learning rate: Adam divides by a gradient's own size, so roundings of tiny ones grow
    assert_close(bounded, uniform, atol=5e-6)


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(stage="pretrain", objective="cal", bounds=None),
        Options(stage="proxy", dropout=0.2),
        Options(family="gemma2"),
    ],
    ids=["finetune", "pretrain", "proxy with dropout", "gemma2"],
)
def test_gradient_checkpointing(tmp_path: Path, options: Options) -> None:
    """Recomputed activations are the same bits, dropout included."""
    off = run(tmp_path / "off", options)
    on = run(tmp_path / "on", replace(options, more={"gradient_checkpointing": True}))
    assert on.rows == off.rows
    assert all(torch.equal(on.weights[name], value) for name, value in off.weights.items())


def test_loader_processes_and_seed(tmp_path: Path) -> None:
    options = Options(stage="proxy", dropout=0.3)
    one = run(tmp_path / "0", options)
    two = run(tmp_path / "2", replace(options, workers=2))
    other = run(tmp_path / "seed", replace(options, seed=1))
    assert one.rows == two.rows
    assert all(torch.equal(two.weights[name], value) for name, value in one.weights.items())
    assert one.rows[0]["loss"] != other.rows[0]["loss"]


def test_dropout_draws(tmp_path: Path) -> None:
    """Else nothing above says anything about random numbers."""
    without = run(tmp_path / "without", Options(stage="proxy"))
    dropped = run(tmp_path / "dropped", Options(stage="proxy", dropout=0.3))
    assert without.rows[-1]["loss"] != dropped.rows[-1]["loss"]
