from __future__ import annotations

import math

import pytest
import torch
from torch.nn import Parameter

from dpa.train.optim import make_optimizer, make_schedule, warmup_steps
from dpa.train.settings import StageSettings


def stage(**more: object) -> StageSettings:
    return StageSettings.model_validate({"learning_rate": 1e-3, **more})


def parameters() -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (2,))]


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.03, 100, 3), (0.03, 101, 4), (0.03, 1, 1), (0.0, 50, 0)])
def test_warmup_is_rounded_up(ratio: float, steps: int, expected: int) -> None:
    assert warmup_steps(stage(warmup_ratio=ratio), steps) == expected


def test_schedule() -> None:
    """Linear from 0 over the warm-up, then half a cosine to 0."""
    settings, steps = stage(warmup_ratio=0.2), 10
    optimizer = make_optimizer(parameters(), settings)
    schedule = make_schedule(optimizer, settings, steps)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rising = [0.0, 0.5]
    falling = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert found == pytest.approx([1e-3 * share for share in rising + falling], abs=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay: float) -> None:
    """Against Loshchilov and Hutter's formula in float64; decay reaches biases, too."""
    trained = parameters()
    optimizer = make_optimizer(trained, stage(weight_decay=decay))
    exact = [parameter.detach().double() for parameter in trained]
    first = [torch.zeros_like(value) for value in exact]
    second = [torch.zeros_like(value) for value in exact]
    for step in range(1, 4):
        for place, parameter in enumerate(trained):
            gradient = torch.sin(torch.arange(parameter.numel()) + step).view_as(parameter)
            parameter.grad = gradient
            first[place] = 0.9 * first[place] + 0.1 * gradient.double()
            second[place] = 0.999 * second[place] + 0.001 * gradient.double() ** 2
            exact[place] = exact[place] * (1 - 1e-3 * decay)
            corrected = second[place] / (1 - 0.999**step)
            exact[place] -= 1e-3 * first[place] / (1 - 0.9**step) / (corrected.sqrt() + 1e-8)
        optimizer.step()
    for parameter, value in zip(trained, exact, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-7)


def test_trained_parameters_are_float32() -> None:
    with pytest.raises(AssertionError, match="float32"):
        make_optimizer([Parameter(torch.zeros(2, dtype=torch.bfloat16))], stage())
