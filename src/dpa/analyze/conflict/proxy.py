"""A brief stage 1: LoRA on captions' text alone, with stage 1's own objective, optimizer and schedule, in one process.

No states are saved: it takes minutes. ``train.train_stage`` is for runs that last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpa.analyze.conflict.passes import enough_memory
from dpa.analyze.conflict.settings import ConflictSettings
from dpa.analyze.conflict.tokens import TokenCaption
from dpa.data.collate import collate
from dpa.data.shuffle import permutation
from dpa.errors import NonFiniteError
from dpa.models.freeze import set_trainable
from dpa.models.lora import attach_lora
from dpa.models.settings import LoraSettings
from dpa.train.loop import set_checkpointing
from dpa.train.optim import make_optimizer, make_schedule
from dpa.train.settings import StageSettings
from dpa.train.step import UNIFORM, TrainStep, step_settings
from dpa.types import TextRules

STEPS = 64
"""With 16 captions each one pass over 1,024 captions, half of the default sample. A fixed number, so that scores of
different data sets can be compared: with every further step the proxy explains more."""
MOST_PASSES = 4
"""Over the proxy's half: a small sample read ever again would be learned by heart."""
_ALPHA = 2
"""Times the rank: the paper's 512 to 256."""
_WARMUP = 0.1
"""Of the steps; the paper's 3 % of so few would be one or two."""
_REFERENCE_RATE, _REFERENCE_WIDTH, _EXPONENT = 5e-4, 2000, 0.78


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How the proxy was made."""

    steps: int
    rank: int
    alpha: float
    learning_rate: float
    captions: int
    """Different ones that it read."""
    tokens: int
    """Supervised tokens that it read, repetitions included."""
    losses: tuple[float, ...]
    """Per step, nats per token."""


def steps_of(settings: ConflictSettings, captions: int) -> int:
    """Optimizer steps for so many captions."""
    if settings.adapt_steps is not None:
        return settings.adapt_steps
    return min(STEPS, math.ceil(MOST_PASSES * captions / settings.captions_per_step))


def learning_rate_of(settings: ConflictSettings, width: int) -> float:
    """Peak learning rate for an LLM ``width`` wide: 5e-4 at 2,000, less the wider (exponent 0.78).

    The rule that Schulman et al. fitted to Llama models ("LoRA Without Regret", 2025): it does not depend on the rank.
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    return float(f"{_REFERENCE_RATE * (_REFERENCE_WIDTH / width) ** _EXPONENT:.1e}")


def adapt(
    llm: PreTrainedModel,
    captions: Sequence[TokenCaption],
    rules: TextRules,
    settings: ConflictSettings,
    *,
    device: torch.device,
    tokens_per_batch: int,
    autocast: torch.dtype | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, Adaptation]:
    """Attaches an adapter to the LLM and trains it.

    Args:
        llm: on ``device``; its linear layers are wrapped in place.
        captions: what the proxy reads; at least one.
        autocast: as for ``TrainStep``.
        progress: called with (steps done, all steps).

    Returns:
        The wrapped LLM, in evaluation mode, and how it was made.

    Raises:
        NonFiniteError: loss or gradient is not finite.
        UserError: a batch does not fit the device's memory.
    """
    steps = steps_of(settings, len(captions))
    width = int(llm.config.get_text_config().hidden_size)
    stage = StageSettings(
        learning_rate=learning_rate_of(settings, width), warmup_ratio=_WARMUP, max_length=settings.max_length
    )
    lora = LoraSettings(rank=settings.rank, alpha=_ALPHA * settings.rank)
    model: Any = attach_lora(llm, lora, seed=settings.seed)
    set_trainable(model, "proxy")
    model.to(device).train()
    if device.type != "cpu":  # activations of all layers beside a 7B LLM would not fit; on a CPU they do
        set_checkpointing(model, True)
    step = TrainStep(model, step_settings(stage, objective_name=UNIFORM, fidelity="exact"), autocast=autocast)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, stage)
    schedule = make_schedule(optimizer, stage, steps)
    losses: list[float] = []
    tokens = 0
    for number, chosen in zip(range(steps), _drawn(captions, settings), strict=False):
        with enough_memory(tokens_per_batch):
            loss_sum, weight_sum = _gradients(step, chosen, rules, device, tokens_per_batch)
        loss = _divide(trained, loss_sum, weight_sum, stage.max_grad_norm, number, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss)
        tokens += int(weight_sum)
        if progress is not None:
            progress(number + 1, steps)
    if device.type != "cpu":
        set_checkpointing(model, False)
    model.eval()
    read = min(len(captions), steps * settings.captions_per_step)
    made = Adaptation(
        steps, lora.rank, lora.alpha, stage.learning_rate, captions=read, tokens=tokens, losses=tuple(losses)
    )
    return model, made


def _drawn(captions: Sequence[TokenCaption], settings: ConflictSettings) -> Iterator[list[TokenCaption]]:
    """The captions of each step, without end: pass after pass, each in an order of its own."""
    waiting: list[TokenCaption] = []
    epoch = 0
    while True:
        while len(waiting) < settings.captions_per_step:
            order = permutation(len(captions), seed=settings.seed, stream=f"conflict pass {epoch}")
            waiting += [captions[place] for place in order]
            epoch += 1
        chosen, waiting = waiting[: settings.captions_per_step], waiting[settings.captions_per_step :]
        yield chosen


def _gradients(
    step: TrainStep, chosen: Sequence[TokenCaption], rules: TextRules, device: torch.device, budget: int
) -> tuple[float, float]:
    """Adds up the gradients of the loss's sum; returns that sum and what it is divided by."""
    loss_sum, weight_sum = torch.zeros((), device=device), torch.zeros((), device=device)
    for part in _cut(chosen, budget):
        batch = collate([caption.item(blind=False) for caption in part], rules).to(device)
        output = step(batch, None)
        torch.autograd.backward(output.loss_sum)
        loss_sum += output.loss_sum.detach()
        weight_sum += output.weight_sum
    return float(loss_sum), float(weight_sum)


def _cut(chosen: Sequence[TokenCaption], budget: int) -> Iterator[list[TokenCaption]]:
    """Longest first; so many that their tokens stay within the budget (passes are packed, padding costs little)."""
    part: list[TokenCaption] = []
    filled = 0
    for caption in sorted(chosen, key=lambda caption: -caption.count):
        length = len(caption.alone.input_ids)
        if part and filled + length > budget:
            yield part
            part, filled = [], 0
        part.append(caption)
        filled += length
    yield part


def _divide(
    trained: Sequence[Tensor], loss_sum: float, weight_sum: float, max_norm: float, number: int, steps: int
) -> float:
    """Gradients of sums -> of the step's mean, clipped; returns the step's mean loss."""
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    torch._foreach_mul_(gradients, 1 / weight_sum)
    norm = float(torch.nn.utils.clip_grad_norm_(trained, max_norm))
    loss = loss_sum / weight_sum
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(
            f"proxy, step {number + 1} of {steps}: loss {loss}, gradient norm {norm}; lower --learning-rate"
        )
    return loss
