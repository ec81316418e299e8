"""How much a token owes to the image: log-probabilities with and without it -> relevance per token.

A new objective is one function and one row of :data:`OBJECTIVES`.
Legend: N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpa.errors import UserError


@dataclass(frozen=True, slots=True)
class Objective:
    """What an objective needs, and its source's bounds for the weights (see ``token_weights``)."""

    name: str
    needs_without: bool
    """Wants ``logp_without``: a text-only pass, by the model in training unless ``frozen_reference``."""
    needs_logits: bool
    """Wants the raw logits of the labels, ``logit_with`` and ``logit_without``, too."""
    needs_marks: bool
    """Reads which tokens the data marks as visual (``visual_spans``)."""
    frozen_reference: bool
    """The text-only numbers come from a frozen text-only LLM, so one pass per token is enough for a whole training."""
    minimum: float
    """Default lower bound of a token's weight (delta_min)."""
    maximum: float
    """Default upper bound (delta_max)."""
    window: int
    """Default width in tokens of the moving mean over weights; 1: none."""
    source: str


OBJECTIVES: dict[str, Objective] = {
    "uniform": Objective(
        name="uniform",
        needs_without=False,
        needs_logits=False,
        needs_marks=False,
        frozen_reference=False,
        minimum=1.0,
        maximum=1.0,
        window=1,
        source="plain cross-entropy",
    ),
    "cmo": Objective(
        name="cmo",
        needs_without=True,
        needs_logits=False,
        needs_marks=False,
        frozen_reference=False,
        minimum=0.05,
        maximum=0.5,
        window=3,
        source="arXiv 2509.14735, Contrastive Modality Optimization",
    ),
    "cal": Objective(
        name="cal",
        needs_without=True,
        needs_logits=True,
        needs_marks=False,
        frozen_reference=False,
        minimum=1.0,
        maximum=5.0,
        window=3,
        source="arXiv 2405.17871; bounds from its code",
    ),
    "prior": Objective(
        name="prior",
        needs_without=True,
        needs_logits=False,
        needs_marks=False,
        frozen_reference=True,
        minimum=0.0,
        maximum=1.0,
        window=1,
        source="arXiv 2505.08971, importance score with alpha = 1",
    ),
    "spans": Objective(
        name="spans",
        needs_without=False,
        needs_logits=False,
        needs_marks=True,
        frozen_reference=False,
        minimum=0.05,
        maximum=1.0,
        window=1,
        source="what the data marks; the lab's truth is every objective's ceiling (docs/evidence.md)",
    ),
}


def objective(kind: str) -> Objective:
    """The row of :data:`OBJECTIVES` with this name. Raises UserError for any other name."""
    if kind not in OBJECTIVES:
        raise UserError(f"unknown objective {kind!r}; there are {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[kind]


def relevance(
    kind: str,
    logp_with: Tensor,
    logp_without: Tensor | None,
    *,
    logit_with: Tensor | None = None,
    logit_without: Tensor | None = None,
    marked: Tensor | None = None,
) -> Tensor:
    """Relevance of each token to its image, before bounds and smoothing; detached.

    - ``uniform``: 1.
    - ``cmo``: exp(logp_with) - exp(logp_without), in [-1, 1].
    - ``cal``: logit_with - logit_without of the label, unbounded.
    - ``prior``: 1 - exp(logp_without), in [0, 1], where ``logp_without`` is a text-only *reference* LLM's (trained on
      the captions). The paper raises it to a power alpha, which it sets to 1; it neither clamps nor smooths
      and makes the weights of each caption sum to its number of tokens. We divide by one sum over the whole step
      instead, as for every objective, so a caption of predictable words counts less.
    - ``spans``: ``marked``.

    Args:
        kind: a key of :data:`OBJECTIVES`.
        logp_with: [N] nats, with the image; gives shape and device for all but ``cmo``.
        logp_without: [N] nats, without it; may be None for ``uniform``. NaN: there is no text-only prediction for this
            token (method.md, row "label that directly follows the image").
        logit_with, logit_without: [N], raw logits of the labels, for ``cal``.
        marked: [N], 1 for tokens that the data marks as visual, 0 for others, NaN where it marks none; for ``spans``.

    Returns:
        float32 [N] (float64 for float64 input); NaN where ``logp_without`` (``marked``) is NaN, except for ``uniform``.

    Raises:
        UserError: unknown kind, a missing input, or inputs of different shapes.
    """
    row = objective(kind)
    logp_with_N = _prepared("logp_with", logp_with, logp_with)
    if row.needs_marks:
        return _prepared("marked", marked, logp_with)
    if not row.needs_without:
        return torch.ones_like(logp_with_N)
    logp_without_N = _prepared("logp_without", logp_without, logp_with)
    if not row.needs_logits:
        return FROM_LOGPROBS[kind](logp_with_N, logp_without_N)
    logit_with_N = _prepared("logit_with", logit_with, logp_with)
    logit_without_N = _prepared("logit_without", logit_without, logp_with)
    difference_N = FROM_LOGITS[kind](logit_with_N, logit_without_N)
    return difference_N.masked_fill(logp_without_N.isnan(), torch.nan)


def _cmo(logp_with_N: Tensor, logp_without_N: Tensor) -> Tensor:
    return logp_with_N.exp() - logp_without_N.exp()


def _prior(logp_with_N: Tensor, logp_without_N: Tensor) -> Tensor:
    return -torch.expm1(logp_without_N)


def _cal(logit_with_N: Tensor, logit_without_N: Tensor) -> Tensor:
    return logit_with_N - logit_without_N


FROM_LOGPROBS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cmo": _cmo, "prior": _prior}
"""Formulas of (with, without) log-probabilities."""

FROM_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cal": _cal}
"""Formulas of (with, without) logits of the label."""


def _prepared(name: str, value: Tensor | None, like: Tensor) -> Tensor:
    if value is None:
        raise UserError(f"relevance: this objective needs {name}, which is missing")
    if value.shape != like.shape or value.ndim != 1:
        raise UserError(f"relevance: {name} is {tuple(value.shape)}, logp_with {tuple(like.shape)}; expected [N] each")
    detached = value.detach()
    return detached if detached.dtype == torch.float64 else detached.float()
