"""The module that ranks wrap: one micro-batch -> sums. The loop adds them up over the optimizer step and divides once.

Legend: N supervised tokens, M positions that the official variant reads.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dpa.errors import UserError
from dpa.models.connectors import MULTIMODAL
from dpa.models.contrast import Contrast, contrast
from dpa.models.text_pass import TextOnly, TextPositions, decode, text_only_logprobs, without_gradient
from dpa.models.vlm import decoder, tower_features
from dpa.objectives import (
    TextOnlyPolicy,
    objective,
    official_mean,
    official_token_weights,
    relevance,
    text_only_weight,
    token_weights,
    weight_stats,
    weighted_nll,
)
from dpa.train.settings import ObjectiveName, StageSettings
from dpa.types import Batch

Fidelity = Literal["exact", "official"]

UNIFORM: ObjectiveName = "uniform"


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What decides a token's weight, with nothing left to look up. From :func:`step_settings`."""

    objective: ObjectiveName
    minimum: float
    """delta_min."""
    maximum: float
    """delta_max."""
    window: int
    """Width in tokens of the moving mean; odd."""
    text_only: TextOnlyPolicy
    text_positions: TextPositions
    fidelity: Fidelity
    packing: bool
    """Several samples in a row of either pass."""

    @property
    def needs_mean_weight(self) -> bool:
        """Text-only micro-batches wait for the mean weight of the optimizer step's image tokens."""
        return self.objective != UNIFORM and self.fidelity == "exact" and self.text_only == "mean"


def step_settings(settings: StageSettings, *, objective_name: ObjectiveName, fidelity: Fidelity) -> StepSettings:
    """A stage's settings with the objective's own bounds where the stage names none.

    Args:
        settings: the stage's.
        objective_name: the objective in force (the stage's own, else the method's).
        fidelity: the recipe's.

    Raises:
        UserError: bounds in the wrong order, an even window, ``prior`` with official fidelity, or what :func:`packs`
            refuses.
    """
    row = objective(objective_name)
    minimum = row.minimum if settings.minimum is None else settings.minimum
    maximum = row.maximum if settings.maximum is None else settings.maximum
    if objective_name == UNIFORM:  # bounds are for relevance, and uniform has none
        minimum = maximum = 1.0
    if minimum > maximum:
        raise UserError(
            f"objective {objective_name}: minimum {minimum} is above maximum {maximum}; the objective's own bounds are "
            f"{row.minimum} and {row.maximum}: set both, or neither"
        )
    window = window_of(settings, objective_name)
    if window % 2 == 0:
        raise UserError(f"window is {window}; give an odd number of tokens, 1 for no smoothing")
    if (row.frozen_reference or row.needs_marks) and fidelity == "official":
        raise UserError(f"objective {objective_name} is not in the reference implementation; use fidelity exact")
    return StepSettings(
        objective=objective_name,
        minimum=minimum,
        maximum=maximum,
        window=window,
        text_only=settings.text_only,
        text_positions=settings.text_positions,
        fidelity=fidelity,
        packing=packs(settings, fidelity),
    )


def window_of(settings: StageSettings, objective_name: ObjectiveName) -> int:
    """Width of the moving mean over weights that is in force: the stage's, else the objective's."""
    return objective(objective_name).window if settings.window is None else settings.window


def packs(settings: StageSettings, fidelity: Fidelity) -> bool:
    """Whether a stage's passes have several samples in a row: with ``exact`` fidelity, unless the stage says no.

    Raises:
        UserError: packing or a token budget with official fidelity, or a token budget without packing.
    """
    budget = settings.tokens_per_micro_batch
    if fidelity == "official" and (settings.packing or budget is not None):
        given = "packing true" if settings.packing else f"tokens_per_micro_batch {budget}"
        raise UserError(
            f"{given} with fidelity official, which smooths over the padded batch and divides per micro-batch: its "
            "result depends on both; leave packing and tokens_per_micro_batch out, or use fidelity exact"
        )
    if settings.packing is False and budget is not None:
        raise UserError(
            f"tokens_per_micro_batch {budget} with packing false: padding would exceed it; leave packing out, or "
            f"give micro_batch (now {settings.micro_batch}) alone"
        )
    return fidelity == "exact" if settings.packing is None else settings.packing


def wants_text_cache(settings: StageSettings, stage: str, *, objective_name: ObjectiveName, fidelity: Fidelity) -> bool:
    """Whether a stage reads its text-only numbers from a cache: a rule from settings alone.

    Possible where the LLM that gives them never changes: stage 2, which trains the connector only, and ``prior``. An
    objective without text-only pass has nothing to keep, which is no error: a recipe may list ``vanilla`` as well.

    Raises:
        UserError: ``text_cache: true`` where the numbers change while the stage trains.
    """
    row = objective(objective_name)
    reason = None
    if stage == "proxy":
        reason = "stage 1 sees no image: there is nothing to contrast"
    elif fidelity == "official" and objective_name != UNIFORM:
        reason = "with fidelity official the pass without image reads image positions, which the connector changes"
    elif stage == "finetune" and row.needs_without and not row.frozen_reference:
        reason = "stage 3 trains its LLM, so its text-only log-probs change with every step"
    if reason is not None and settings.text_cache:
        raise UserError(f"stages.{stage}.text_cache is true, but {reason}; leave it out or set it to false")
    if reason is not None or not row.needs_without:
        return False
    return settings.reads_everything if settings.text_cache is None else settings.text_cache


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Sums of one micro-batch: scalars, float32 (float64 for a float64 model)."""

    loss_sum: Tensor
    """What is summed and differentiated. ``exact``: - sum_n w_n logp_n. ``official``: the micro-batch's own mean."""
    weight_sum: Tensor
    """What the sum over the optimizer step is divided by. ``exact``: sum_n w_n. ``official``: 1, 0 without a label."""
    stats: dict[str, Tensor]
    """Additive, detached: those of ``weight_stats``, and ``nll`` (the unweighted sum), ``image_weight``,
    ``image_tokens``."""


class TrainStep(nn.Module):
    """A model and an objective: ``(batch, text_weight) -> StepOutput``.

    Every trainable parameter belongs to every loss's graph, also the connector's to a text-only batch's: else
    ranks that wait for each other's gradients would hang.

    Args:
        model: a LLaVA, or for stages without images an LLM with its adapter.
        settings: the objective's.
        reference: the frozen text-only LLM of objective ``prior``; its parameters must not require gradients. None
            where the model's own LLM is frozen (stage 2): it is its own reference.
        autocast: compute in this type (parameters stay as they are); None: in the parameters' own.

    Raises:
        UserError: ``prior`` without a reference where the LLM is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: StepSettings,
        *,
        reference: nn.Module | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        row = objective(settings.objective)
        if row.frozen_reference and reference is None and _trains_llm(model):
            raise UserError(
                f"objective {settings.objective} needs a frozen text-only LLM as its reference (the proxy of stage 1); "
                "there is none in this run: choose cmo, cal or uniform"
            )
        self.model = model
        self.reference = reference if row.frozen_reference else None
        self._own_text_pass = row.needs_without and self.reference is None
        self.settings = settings
        self._row = row
        self._autocast = autocast
        self.in_shards = False
        """Each pass through the LLM gathers its weights from all ranks (``sharding.shard`` sets it)."""

    def forward(self, batch: Batch, text_weight: float | None) -> StepOutput:
        """Both passes, weights, sums.

        Args:
            batch: one micro-batch on the model's device; with images in all samples or in none.
            text_weight: weight of every token of samples without image, where the loop knows it (policy ``mean``);
                None: not known yet, or given by the policy. Not used with ``uniform`` and ``official``.

        Raises:
            DataError: images and placeholders do not match.
        """
        with self._precision(batch.input_ids.device.type):
            read = self._in_step_with_others(batch) if self.in_shards else self._contrast(batch)
            weights_N = self._weights(read, batch, text_weight)
            loss_sum, weight_sum = weighted_nll(read.logp_with, weights_N)
            if self.settings.fidelity == "official":
                # The reference divides each micro-batch by its own weights and averages micro-batches and GPUs with
                # equal shares. Here: a sum of means over a sum of ones, so that the loop has one way to divide.
                loss_sum, weight_sum = official_mean(loss_sum, weight_sum), (weight_sum > 0).to(weight_sum.dtype)
            return StepOutput(loss_sum + self._untouched(batch), weight_sum, self._stats(read, weights_N))

    def text_only(self, batch: Batch) -> TextOnly:
        """The pass without image under the LLM that the objective asks (the reference where it has one), for caches.

        Args:
            batch: on the model's device; its images are not needed.
        """
        with self._precision(batch.input_ids.device.type):
            return self._text_only(self.model if self.reference is None else self.reference, batch)

    def tower(self, pixel_values: Tensor) -> Tensor:
        """The frozen tower's rows [I, P, C] of images [I, C, R, R] on the model's device, for caches."""
        assert isinstance(self.model, MULTIMODAL)
        with self._precision(pixel_values.device.type):
            return tower_features(self.model, pixel_values)

    @property
    def computes_in(self) -> torch.dtype | None:
        """The type of matrix products; None: the parameters' own."""
        return self._autocast

    @property
    def needs_logits(self) -> bool:
        """The objective reads the labels' logits, too."""
        return self._row.needs_logits

    def _text_only(self, llm: nn.Module, batch: Batch) -> TextOnly:
        settings = self.settings
        return text_only_logprobs(
            llm,
            batch,
            text_positions=settings.text_positions,
            logits=self._row.needs_logits,
            packing=settings.packing,
        )

    def _precision(self, device: str) -> AbstractContextManager[None]:
        # Entered in any case: a launcher's own autocast must not turn a float32 run into something else.
        enabled = self._autocast is not None
        return torch.autocast(device, dtype=self._autocast or torch.bfloat16, enabled=enabled)

    def _contrast(self, batch: Batch) -> Contrast:
        return contrast(
            self.model,
            batch,
            fidelity=self.settings.fidelity,
            text_positions=self.settings.text_positions,
            without=self._own_text_pass,
            logits=self._row.needs_logits,
            window=self.settings.window,
            packing=self.settings.packing,
        )

    def _weights(self, read: Contrast, batch: Batch, text_weight: float | None) -> Tensor:
        """[N], detached."""
        settings = self.settings
        if settings.objective == UNIFORM:
            return torch.ones_like(read.logp_with, requires_grad=False)
        if settings.fidelity == "official":
            return self._official_weights(read)
        logp_without = read.logp_without
        if self.reference is not None:
            cached = batch.logp_without is not None
            logp_without = batch.logp_without if cached else self._text_only(self.reference, batch).logp
        relevance_N = relevance(
            settings.objective,
            read.logp_with,
            logp_without,
            logit_with=read.logit_with,
            logit_without=read.logit_without,
            marked=self._marked(read, batch),
        )
        weights_N = token_weights(
            relevance_N,
            read.segment_ids,
            minimum=settings.minimum,
            maximum=settings.maximum,
            window=settings.window,
        )
        if 0 not in batch.image_counts:
            return weights_N
        if text_weight is None:
            assert settings.text_only != "mean", "text without image before the mean weight of the images is known"
            text_weight = text_only_weight(
                settings.text_only, image_weight_sum=0.0, image_tokens=0.0, minimum=settings.minimum
            )
        return weights_N.where(read.has_image, text_weight)

    def _marked(self, read: Contrast, batch: Batch) -> Tensor | None:
        """The batch's marks; unknown (NaN) where there is nobody to mark: text alone, or a filler without labels."""
        if batch.marked is None and self._row.needs_marks and not (any(batch.image_counts) and len(read.labels)):
            return torch.full_like(read.logp_with, torch.nan, requires_grad=False)
        return batch.marked

    def _in_step_with_others(self, batch: Batch) -> Contrast:
        """``_contrast`` with as many passes on every rank: one that made none would leave the others waiting.

        The pass without image is left out where no label has a text-only prediction, which a rank cannot know of the
        others. It is then made with a single token.
        """
        body, made = decoder(self.model), 0

        def count(_module: nn.Module, _inputs: object) -> None:
            nonlocal made
            made += 1

        handle = body.register_forward_pre_hook(count)
        try:
            read = self._contrast(batch)
            asked = self._own_text_pass and batch.logp_without is None
            for _ in range(made, 2 if asked and any(batch.image_counts) else 1):
                with without_gradient(self.model):
                    token = batch.input_ids[:1, :1]
                    embedded = body.get_input_embeddings()(token)
                    decode(body, embedded, torch.ones_like(token, dtype=torch.bool), torch.zeros_like(token), span=0)
        finally:
            handle.remove()
        return read

    def _official_weights(self, read: Contrast) -> Tensor:
        official, settings = read.official, self.settings
        assert official is not None
        relevance_M = relevance(
            settings.objective,
            official.logp_with,
            official.logp_without,
            logit_with=official.logit_with,
            logit_without=official.logit_without,
        )
        return official_token_weights(
            relevance_M,
            official.positions,
            official.supervised,
            official.total,
            minimum=settings.minimum,
            maximum=settings.maximum,
            window=settings.window,
        )

    def _stats(self, read: Contrast, weights_N: Tensor) -> dict[str, Tensor]:
        stats = weight_stats(weights_N, self.settings.minimum, self.settings.maximum, read.has_image)
        return stats | {
            "nll": -read.logp_with.detach().float().sum(),
            "image_weight": (weights_N * read.has_image).sum(dtype=torch.float32),
            "image_tokens": read.has_image.sum(dtype=torch.float32),
        }

    def _untouched(self, batch: Batch) -> Tensor | float:
        """0, with an edge to the parameters that a batch without images does not reach."""
        has_images = batch.pixel_values is not None or batch.features is not None
        if has_images or not isinstance(self.model, MULTIMODAL):
            return 0.0
        projector = self.model.model.multi_modal_projector
        unused = [parameter.sum() for parameter in projector.parameters() if parameter.requires_grad]
        return 0.0 * torch.stack(unused).sum() if unused and torch.is_grad_enabled() else 0.0


def _trains_llm(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in decoder(model).parameters())
