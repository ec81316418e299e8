"""(log-probabilities, weights) -> sums. The training loop adds them up and divides once.

Legend: N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dpa.errors import UserError

OFFICIAL_EPSILON = 1e-6
"""What the reference adds to a micro-batch's sum of weights before it divides."""

_AT_BOUND = 1e-6
"""Relative: a mean of values at a bound may miss it by a rounding."""


def weighted_nll(logp: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(loss_sum, weight_sum): - sum_n w_n logp_n in nats, and sum_n w_n.

    Args:
        logp: [N] log-probabilities of the labels; the gradient flows here only.
        weights: [N], taken as constants.

    Returns:
        Two scalars, float32 (float64 for float64 ``logp``). ``weight_sum`` is detached. With N = 0 both are 0, and
        ``loss_sum`` still belongs to ``logp``'s graph, so that every rank can call backward.

    Raises:
        UserError: shapes differ.
    """
    _check_same("weighted_nll", "logp", logp, "weights", weights)
    precise = logp if logp.dtype == torch.float64 else logp.float()
    constant = weights.detach().to(precise.dtype)
    return -(constant * precise).sum(), constant.sum()


def official_mean(loss_sum: Tensor, weight_sum: Tensor) -> Tensor:
    """The reference's loss of one micro-batch on one GPU (fidelity ``official``): loss_sum / (weight_sum + 1e-6).

    The reference then averages micro-batches and GPUs with equal shares, whatever their number of tokens.
    """
    return loss_sum / (weight_sum + OFFICIAL_EPSILON)


@torch.no_grad()
def weight_stats(weights: Tensor, minimum: float, maximum: float, has_image: Tensor) -> dict[str, Tensor]:
    """Sums for :func:`weight_health`, additive over micro-batches and ranks.

    Args:
        weights: [N].
        minimum, maximum: the bounds in use.
        has_image: bool [N], False for tokens of samples without image.

    Returns:
        float32 scalars on the weights' device: ``tokens``, ``weight``, ``weight_squared``, ``at_minimum``,
        ``at_maximum`` (tokens with and without image alike), ``text_only`` (tokens).

    Raises:
        UserError: shapes differ.
    """
    _check_same("weight_stats", "weights", weights, "has_image", has_image)
    weight_N = weights.detach().float()
    sums = {
        "tokens": torch.ones_like(weight_N),
        "weight": weight_N,
        "weight_squared": weight_N.square(),
        "at_minimum": weight_N <= minimum + _AT_BOUND * minimum,
        "at_maximum": weight_N >= maximum - _AT_BOUND * maximum,
        "text_only": ~has_image,
    }
    return {name: values.sum(dtype=torch.float32) for name, values in sums.items()}


def weight_health(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """What to log about a step's weights, from sums of :func:`weight_stats`.

    Returns:
        ``mean_weight``; ``share_at_minimum``, ``share_at_maximum``, ``share_text_only`` of all tokens;
        ``effective_tokens`` (sum w)^2 / sum w^2, between 1 and the number of tokens (Kish); all 0 where there is no
        token.
    """
    value = {name: float(total) for name, total in sums.items()}
    tokens = max(value["tokens"], 1.0)
    squared = value["weight_squared"]
    return {
        "mean_weight": value["weight"] / tokens,
        "share_at_minimum": value["at_minimum"] / tokens,
        "share_at_maximum": value["at_maximum"] / tokens,
        "effective_tokens": value["weight"] ** 2 / squared if squared > 0 else 0.0,
        "share_text_only": value["text_only"] / tokens,
    }


def _check_same(where: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.ndim != 1 or first.shape != second.shape:
        raise UserError(
            f"{where}: {first_name} is {tuple(first.shape)}, {second_name} {tuple(second.shape)}; expected [N] both"
        )
