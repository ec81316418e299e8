"""A step went wrong: which micro-batch, and the first module whose output or gradient is not finite.

Runs the step's micro-batches again, one by one, with hooks on every module. Parameters are as they were, for the
optimizer has not moved; gradients are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpa.train.compiled import uncompiled
from dpa.train.step import TrainStep
from dpa.types import Batch

_SHOWN_IDS = 8


def find_non_finite(step: TrainStep, batches: Sequence[tuple[Batch, float | None]], device: torch.device) -> str | None:
    """Names samples and module. Where weights are sharded, all ranks call it, with as many micro-batches each.

    Args:
        step: the unwrapped module.
        batches: this rank's micro-batches with the weight that their text-only tokens had.
        device: of the module.

    Returns:
        None where every micro-batch alone is fine on this rank.
    """
    bad, first = _bad_parameter(step), None
    for batch, text_weight in batches:
        # Each is tried, whatever was found: a rank that stopped would leave the others waiting for its shards.
        step.zero_grad(set_to_none=True)
        with uncompiled(step), _watched(step) as found:
            output = step(batch.to(device), text_weight)
            lost = not bool(output.loss_sum.isfinite())
            torch.autograd.backward(output.loss_sum)
        what = found.what(lost, _bad_gradient(step))
        first = first or (_describe(batch, what, bad) if what else None)
    step.zero_grad(set_to_none=True)
    return first or (f"parameter {bad} is not finite" if bad else None)


class _Found:
    output: str | None = None
    gradient: str | None = None

    def what(self, lost: bool, parameter: str | None) -> str | None:
        """The first thing that went wrong, in words; ``lost``: the loss is not finite."""
        if lost:
            return "first non-finite output: " + (self.output or "the loss (all modules' outputs are finite)")
        if self.gradient is not None:
            return f"first non-finite gradient: at the output of {self.gradient}"
        return None if parameter is None else f"first non-finite gradient: of parameter {parameter}"


@contextmanager
def _watched(step: TrainStep) -> Iterator[_Found]:
    found = _Found()
    handles = [
        module.register_forward_hook(partial(_check_output, found, name))
        for name, module in step.model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_output(found: _Found, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    for tensor in _tensors(output):
        if found.output is None and not bool(tensor.isfinite().all()):
            found.output = name
        if tensor.requires_grad:
            tensor.register_hook(partial(_check_gradient, found, name))  # type: ignore[no-untyped-call]


def _check_gradient(found: _Found, name: str, gradient: Tensor) -> None:
    if found.gradient is None and not bool(gradient.isfinite().all()):
        found.gradient = name


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors inside a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):  # transformers' outputs are one
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _bad_parameter(step: TrainStep) -> str | None:
    return next((name for name, value in step.model.named_parameters() if not _finite(value)), None)


def _bad_gradient(step: TrainStep) -> str | None:
    gradients = ((name, value.grad) for name, value in step.model.named_parameters())
    return next((name for name, grad in gradients if grad is not None and not _finite(grad)), None)


def _finite(tensor: Tensor) -> bool:
    """Of this rank's share, without talking to the others."""
    return bool((tensor.to_local() if isinstance(tensor, DTensor) else tensor).isfinite().all())


def _describe(batch: Batch, what: str, parameter: str | None) -> str:
    shown = ", ".join(batch.sample_ids[:_SHOWN_IDS])
    more = len(batch.sample_ids) - _SHOWN_IDS
    samples = f"micro-batch of samples {shown}" + (f" and {more} more" if more > 0 else "")
    return f"{samples}; {what}" + (f"; parameter {parameter} is itself not finite" if parameter else "")
