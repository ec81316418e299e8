"""The rows of the step benchmark: what a micro-batch is turned into a loss by. One optimizer step each.

``vanilla`` and ``ours`` are the library's own training step with objective ``uniform`` and ``cmo``; ``official`` is the
transcription of the reference; ``ours-cached`` (stage 2) finds the frozen LLM's text-only log-probs in the batch, where
the cache puts them. A further row is a further entry of ``VARIANTS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchkit.clock import TEXT_ONLY_PASS, Door, SectionClock, untimed
from benchkit.reference import reference_loss, reference_text_loss
from benchkit.shapes import Precision, ReferenceInputs, Shape, build_inputs, build_model
from dpa.models import contrast as contrast_module
from dpa.models import vlm as vlm_module
from dpa.train.loop import set_checkpointing
from dpa.train.optim import make_optimizer
from dpa.train.settings import ObjectiveName, StageSettings
from dpa.train.step import Fidelity, StepSettings, TrainStep, step_settings
from dpa.types import Batch

DOORS: tuple[Door, ...] = (
    (TEXT_ONLY_PASS, contrast_module, "text_only_logprobs"),
    ("tower_connector", vlm_module, "image_features"),
    ("pass", contrast_module, "hidden_states"),
    ("head", contrast_module, "label_logprobs"),
)
"""Functions of the library that are a part of a step. Gathering, weights and sums are what is left of ``other``."""

NO_CHANGE = 1e-30
"""Learning rate: the optimizer does all of its work, yet every repeat and every row starts from the same weights."""


@dataclass(frozen=True, slots=True)
class Case:
    """All that a step needs."""

    shape: Shape
    stage: int
    device: torch.device
    precision: Precision
    checkpointing: bool
    model: Any
    batch: Batch
    cached_batch: Batch | None
    """``batch`` with its text-only log-probs; stage 2, where the LLM is frozen."""
    inputs: ReferenceInputs
    optimizer: AdamW

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bf16" else None

    @property
    def sequence_tokens(self) -> int:
        return self.shape.micro_batch[self.stage - 1] * self.shape.length(self.stage)

    def settings(self, objective: ObjectiveName, fidelity: Fidelity) -> StepSettings:
        """The paper's bounds over the vocabulary's size: random weights give every token about 1 / V."""
        chosen = step_settings(StageSettings(learning_rate=NO_CHANGE), objective_name=objective, fidelity=fidelity)
        size = self.shape.llm.vocabulary
        return replace(chosen, minimum=chosen.minimum / size, maximum=chosen.maximum / size)


def make_case(shape: Shape, stage: int, *, device: torch.device, precision: Precision, checkpointing: bool) -> Case:
    """Frozen parts in ``precision``, trained ones in float32, as in training."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model: Any = build_model(shape, stage, device=device, dtype=dtype)
    if checkpointing:
        set_checkpointing(model, True)
    batch, inputs = build_inputs(shape, stage, device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cached_batch = None
    if stage == 2:
        settings = step_settings(StageSettings(learning_rate=NO_CHANGE), objective_name="cmo", fidelity="exact")
        step = TrainStep(model, settings, autocast=torch.bfloat16 if precision == "bf16" else None)
        cached_batch = replace(batch, logp_without=step.text_only(batch).logp)
    return Case(
        shape=shape,
        stage=stage,
        device=device,
        precision=precision,
        checkpointing=checkpointing,
        model=model,
        batch=batch,
        cached_batch=cached_batch,
        inputs=inputs,
        optimizer=make_optimizer(trained, StageSettings(learning_rate=NO_CHANGE)),
    )


def _library(
    case: Case, objective: ObjectiveName, fidelity: Fidelity = "exact", batch: Batch | None = None
) -> tuple[Tensor, Tensor]:
    step = TrainStep(case.model, case.settings(objective, fidelity), autocast=case.autocast)
    output = step(batch or case.batch, None)
    return output.loss_sum, output.weight_sum


def vanilla(case: Case, _: SectionClock) -> tuple[Tensor, Tensor]:
    """Plain training with our fused head."""
    return _library(case, "uniform")


def ours(case: Case, _: SectionClock) -> tuple[Tensor, Tensor]:
    """CMO; in stage 1 the recipe's objective is uniform there, too."""
    return _library(case, "uniform" if case.stage == 1 else "cmo")


def ours_cached(case: Case, _: SectionClock) -> tuple[Tensor, Tensor]:
    """CMO with p_o from the cache (``StageSettings.text_cache``); stage 2 only."""
    assert case.cached_batch is not None, "row ours-cached is stage 2's"
    return _library(case, "cmo", batch=case.cached_batch)


def official(case: Case, clock: SectionClock) -> tuple[Tensor, Tensor]:
    """The reference."""
    with torch.autocast(case.device.type, dtype=case.autocast or torch.bfloat16, enabled=case.autocast is not None):
        if case.stage == 1:
            loss = reference_text_loss(case.model, case.inputs, clock)
        else:
            settings = case.settings("cmo", "official")
            loss = reference_loss(case.model, case.inputs, clock, minimum=settings.minimum, maximum=settings.maximum)
    return loss, torch.ones_like(loss.detach())


Variant = Callable[[Case, SectionClock], tuple[Tensor, Tensor]]
"""(loss_sum, what it is divided by)."""

VARIANTS: dict[str, Variant] = {"vanilla": vanilla, "official": official, "ours": ours, "ours-cached": ours_cached}

DEFAULT_ROWS = ("vanilla", "official", "ours")


@torch.no_grad()
def loss_with_official_fidelity(case: Case) -> float:
    """The library's ``fidelity: official`` on the same micro-batch: what row ``official`` must give."""
    loss_sum, divisor = _library(case, "uniform" if case.stage == 1 else "cmo", "official")
    return float(loss_sum / divisor)


def run_step(case: Case, variant: Variant, clock: SectionClock = untimed) -> float:
    """Forward, backward, division, clipping, optimizer; returns the loss. As ``dpa.train.loop`` does it."""
    with clock("other"):
        loss_sum, divisor = variant(case, clock)
        with clock("backward"):
            loss_sum.backward()
        with clock("optimizer"):
            trained: list[nn.Parameter] = case.optimizer.param_groups[0]["params"]
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / float(divisor))
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            case.optimizer.step()
            case.optimizer.zero_grad(set_to_none=True)
        return float(loss_sum.detach() / divisor)
