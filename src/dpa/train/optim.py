"""Optimizer and schedule of the paper: AdamW without weight decay, linear warm-up (3 % of the steps), cosine to 0."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import Parameter
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from dpa.train.settings import StageSettings

BETAS = (0.9, 0.999)
EPSILON = 1e-8

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def make_optimizer(parameters: Iterable[Parameter], settings: StageSettings) -> AdamW:
    """AdamW as the reference uses it (betas 0.9 and 0.999, epsilon 1e-8).

    Weight decay applies to all parameters, biases and norms included; the paper's is 0, where that makes no difference.

    Args:
        parameters: float32, on their final device; their order is the order of the saved states.
        settings: learning rate, weight decay.
    """
    trained = list(parameters)
    assert trained, "a stage without trainable parameters"
    assert all(parameter.dtype == torch.float32 for parameter in trained), "trained parameters are float32"
    return AdamW(
        trained,
        lr=settings.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=settings.weight_decay,
        fused=all(parameter.device.type in _FUSED_DEVICES for parameter in trained),
    )


def warmup_steps(settings: StageSettings, steps: int) -> int:
    """Optimizer steps of warm-up among ``steps``: the share rounded up, as transformers' Trainer does."""
    return math.ceil(settings.warmup_ratio * steps)


def make_schedule(optimizer: AdamW, settings: StageSettings, steps: int) -> LambdaLR:
    """Learning rate of step k (from 0): linear from 0 to the peak over the warm-up, then cosine to 0 at ``steps``.

    So the first step of a warm-up has learning rate 0: it fills the moments only, as in the reference.
    """
    schedule: LambdaLR = get_cosine_schedule_with_warmup(optimizer, warmup_steps(settings, steps), steps)
    return schedule
