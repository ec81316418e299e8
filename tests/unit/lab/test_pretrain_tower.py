"""The tower's training: it learns, and a run that was stopped ends where an unbroken one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpa.errors import UserError
from dpa.lab.pretrain_tower import Run, Settings, make_data, make_processor

TINY = Settings(scenes=24, steps=8, batch=8, hidden=32, layers=2, heads=2, intermediate=32, warmup=2)


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    return make_data(TINY, workers=1)


def advance(run: Run, data: tuple[torch.Tensor, torch.Tensor], until: int) -> list[float]:
    processor = make_processor()
    return [run.advance(*data, processor)[0] for _ in range(run.step, until)]


def test_loss_falls_and_the_penultimate_layer_learns(data: tuple[torch.Tensor, torch.Tensor]) -> None:
    run = Run(TINY, None)
    before = [parameter.clone() for parameter in run.model.tower.encoder.layers[0].parameters()]
    losses = advance(run, data, TINY.steps)
    assert losses[-1] < losses[0]
    after = run.model.tower.encoder.layers[0].parameters()
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_stopped_run_continues_exactly(tmp_path: Path, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    whole = Run(TINY, None)
    losses = advance(whole, data, TINY.steps)
    first = Run(TINY, tmp_path / "state")
    begun = advance(first, data, 5)
    first.save()
    torch.manual_seed(99)
    second = Run(TINY, tmp_path / "state")
    assert begun + advance(second, data, TINY.steps) == losses
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    Run(TINY, tmp_path / "state").save()
    with pytest.raises(UserError, match="other settings"):
        Run(replace(TINY, steps=9), tmp_path / "state")
