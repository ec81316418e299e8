"""Fused linear -> log-probability of the label: what a language-model head is asked for, without its logits.

    logit_nv = hidden_n . weight_v          capped: logit <- softcap * tanh(logit / softcap)
    logp_n   = logit_n[label_n] - log sum_v exp(logit_nv)

Nothing of size tokens x vocabulary ever exists, neither forward nor backward: both run over tiles of some tokens times
some rows of the vocabulary, with an online log-sum-exp (method.md, row "logits").

The forward also makes the whole gradient with respect to ``hidden``. It may, though the token weights are known only
later: the incoming gradient is one number g_n per token and

    d logp_n / d hidden_n = slope_n[label] * weight[label] - sum_v p_nv * slope_nv * weight_v      (slope = 1 - tanh^2)

does not depend on it. The sum is an attention over the vocabulary (query hidden, keys and values weight), so it rides
along with the log-sum-exp; backward is one product with g. With a frozen head the whole costs two matrix products, as
many as materialised logits need. A trainable head needs g inside its sum, so its gradient recomputes the tiles: two
more.

Legend: N supervised tokens, H hidden size, V vocabulary; R tokens and C vocabulary rows of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpa.errors import UserError

CPU_TILE = (1024, 2048)
"""Tokens x vocabulary rows of a tile unless asked otherwise: 8 MiB in float32, small enough to stay in cache. Fewer
tokens get more vocabulary rows, up to ``CPU_COLUMNS``: a tile's many small operations then weigh less."""

CPU_COLUMNS = 8192

ACCELERATOR_TILE = (2048, 16384)
"""128 MiB in float32: few kernel launches, and small beside 16 GiB of logits."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one call computes: fixed before the forward, used again by the backward."""

    softcap: float | None
    rows: int
    columns: int
    operand: torch.dtype
    """What matrix products read: the inputs' type, or autocast's."""
    accumulate: torch.dtype
    """What they write, and everything else is computed in: float32, or float64 for float64 inputs."""
    low_precision_products: bool
    """Products may read bf16 and write float32 (CUDA); elsewhere operands are converted to ``accumulate`` first."""


def label_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each token's label under ``softmax(hidden @ weight.T)``, in nats.

    Differentiable with respect to ``hidden`` and, where it requires grad, ``weight``; once (a second derivative
    raises). Gradients have their input's type and are accumulated in float32. Under autocast the products read
    autocast's type.

    Args:
        hidden_NH: hidden states at the *predicting* positions (t - 1), any floating type.
        weight_VH: the head's weight; the head has no bias.
        labels_N: int64 in [0, V); there is no ignore index: pass supervised positions only. N may be 0.
        softcap: Gemma-2's final soft-cap (30): logits become ``softcap * tanh(logits / softcap)``.
        chunk_size: at most so many tokens and so many vocabulary rows per tile; None: what suits the device.

    Returns:
        float32 [N], also for bf16 inputs; float64 only where an input is float64 (so that gradients can be checked).

    Raises:
        UserError: (a ValueError) shapes do not fit, a label is outside [0, V), softcap or chunk_size is not positive.
    """
    _check(hidden_NH, weight_VH, labels_N, softcap)
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"label_logprobs: chunk_size is {chunk_size}; give at least 1, or None for the default")
    plan = _plan(hidden_NH, weight_VH, softcap, chunk_size)
    # Gradients are always off inside a Function's forward, so whether anybody will ask for them is found out here.
    with_gradient = torch.is_grad_enabled() and hidden_NH.requires_grad
    result = _LabelLogprobs.apply(hidden_NH, weight_VH, labels_N, plan, with_gradient)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


@torch.no_grad()
def label_logits(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """Raw logit of each token's label, what CAL (arXiv 2405.17871) compares; detached.

    Arguments, result type and errors as for :func:`label_logprobs`. Costs N x H, whatever the vocabulary.
    """
    _check(hidden_NH, weight_VH, labels_N, softcap)
    plan = _plan(hidden_NH, weight_VH, softcap, None)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logit_N = (_rounded(hidden_NH, plan) * _rounded(weight_VH[labels_N], plan)).sum(dim=1)
    return logit_N if softcap is None else softcap * torch.tanh(logit_N / softcap)


class _LabelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, plan: _Plan, with_gradient: bool
    ) -> Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logp_N, normaliser_N, slope_NH = _forward(hidden_NH, weight_VH, labels_N, plan, with_gradient)
        ctx.plan, ctx.hidden_dtype = plan, hidden_NH.dtype
        # A frozen head keeps one [N, H] tensor for the backward; hidden and weight are kept only to recompute tiles.
        again = (hidden_NH, weight_VH, labels_N, logp_N, normaliser_N) if ctx.needs_input_grad[1] else (None,) * 5
        ctx.save_for_backward(slope_NH, *again)
        return logp_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # Gradients are on in here only under create_graph=True. once_differentiable would let a constant incoming
        # gradient through, and the second derivative would silently be missing from a sum.
        if torch.is_grad_enabled():
            raise NotImplementedError("label_logprobs has no second derivative; do not ask for create_graph=True")
        slope_NH, hidden_NH, weight_VH, labels_N, logp_N, normaliser_N = ctx.saved_tensors
        grad_hidden_NH = grad_weight_VH = None
        if slope_NH is not None:
            grad_hidden_NH = (grad_N.unsqueeze(1) * slope_NH).to(ctx.hidden_dtype)
        if ctx.needs_input_grad[1]:
            with torch.autocast(grad_N.device.type, enabled=False):
                grad_weight_VH = _weight_gradient(
                    grad_N, hidden_NH, weight_VH, labels_N, logp_N, normaliser_N, ctx.plan
                )
        return grad_hidden_NH, grad_weight_VH, None, None, None


def _forward(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, plan: _Plan, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp [N], log sum exp [N], d logp / d hidden [N, H] or None), all in ``plan.accumulate``.

    The label is kept out of the running sums. What the other words have together, ``others``, is then exact however
    sure the model is, and with it log p = -log(1 + others / label) and 1 - p, which a difference of two numbers near 1
    would lose (in bf16 products: entirely).
    """
    hidden_NH = _operand(hidden_NH, plan)
    count = hidden_NH.shape[0]
    top_N = hidden_NH.new_full((count,), -torch.inf, dtype=plan.accumulate)
    others_N, label_logit_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
    pull_NH = torch.empty_like(hidden_NH, dtype=plan.accumulate) if with_gradient else None
    for columns in _slices(weight_VH.shape[0], plan.columns):
        weight_CH = _operand(weight_VH[columns], plan)
        for rows in _slices(count, plan.rows):
            tile_RC = _logits(hidden_NH[rows], weight_CH, plan)
            inside_R, column_R1 = _label_column(labels_N[rows], columns)
            label_logit_N[rows] = torch.where(inside_R, tile_RC.gather(1, column_R1).squeeze(1), label_logit_N[rows])
            top_R = torch.maximum(top_N[rows], tile_RC.amax(dim=1))
            decay_R = torch.exp(top_N[rows] - top_R)
            steepness_RC = None if plan.softcap is None or pull_NH is None else _steepness(tile_RC, plan.softcap)
            tile_RC.sub_(top_R.unsqueeze(1)).exp_()
            _set_label(tile_RC, column_R1, inside_R, torch.zeros_like(top_R))
            others_N[rows] = others_N[rows] * decay_R + tile_RC.sum(dim=1)
            top_N[rows] = top_R
            if pull_NH is not None:
                pulled_RC = tile_RC if steepness_RC is None else tile_RC.mul_(steepness_RC)
                if columns.start:
                    pull_NH[rows].mul_(decay_R.unsqueeze(1))
                _add_product(pull_NH[rows], pulled_RC, weight_CH, plan, first=not columns.start)
    label_N = torch.exp(label_logit_N - top_N)
    total_N = others_N + label_N
    logp_N = logsigmoid(label_logit_N - top_N - others_N.log())
    normaliser_N = top_N + total_N.log()
    if pull_NH is None:
        return logp_N, normaliser_N, None
    push_N = others_N / total_N
    if plan.softcap is not None:
        push_N = push_N * _steepness(label_logit_N, plan.softcap)
    pull_NH.mul_((-1 / total_N).unsqueeze(1)).addcmul_(push_N.unsqueeze(1), _rounded(weight_VH[labels_N], plan))
    return logp_N, normaliser_N, pull_NH


def _weight_gradient(
    grad_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    logp_N: Tensor,
    normaliser_N: Tensor,
    plan: _Plan,
) -> Tensor:
    """d sum_n grad_n logp_n / d weight [V, H]: recomputes the tiles, accumulates one band of vocabulary at a time."""
    hidden_NH = _operand(hidden_NH, plan)
    grad_weight_VH = torch.empty_like(weight_VH)
    for columns in _slices(weight_VH.shape[0], plan.columns):
        weight_CH = _operand(weight_VH[columns], plan)
        band_CH = torch.zeros_like(weight_CH, dtype=plan.accumulate)
        for rows in _slices(hidden_NH.shape[0], plan.rows):
            tile_RC = _logits(hidden_NH[rows], weight_CH, plan)
            steepness_RC = None if plan.softcap is None else _steepness(tile_RC, plan.softcap)
            tile_RC.sub_(normaliser_N[rows].unsqueeze(1)).exp_()
            inside_R, column_R1 = _label_column(labels_N[rows], columns)
            _set_label(tile_RC, column_R1, inside_R, torch.expm1(logp_N[rows]))  # p - 1, exact also where p is near 1
            if steepness_RC is not None:
                tile_RC.mul_(steepness_RC)
            tile_RC.mul_(-grad_N[rows].unsqueeze(1))
            _add_product(band_CH, tile_RC.t(), hidden_NH[rows], plan, first=False)
        grad_weight_VH[columns] = band_CH.to(grad_weight_VH.dtype)
    return grad_weight_VH


def _logits(hidden_RH: Tensor, weight_CH: Tensor, plan: _Plan) -> Tensor:
    """One tile of (capped) logits in ``plan.accumulate``."""
    if hidden_RH.dtype == plan.accumulate:
        tile_RC = torch.mm(hidden_RH, weight_CH.t())
    else:
        tile_RC = torch.mm(hidden_RH, weight_CH.t(), out_dtype=plan.accumulate)
    if plan.softcap is not None:
        tile_RC.div_(plan.softcap).tanh_().mul_(plan.softcap)
    return tile_RC


def _steepness(capped: Tensor, softcap: float) -> Tensor:
    """d capped logit / d raw logit = 1 - tanh^2, from the capped logit."""
    return (capped / softcap).square_().neg_().add_(1)


def _add_product(total: Tensor, left: Tensor, right: Tensor, plan: _Plan, *, first: bool) -> None:
    """``total += left @ right`` in ``plan.accumulate``; ``left`` comes in that type, ``right`` as an operand.

    ``first``: total is uninitialised and is overwritten.
    """
    if right.dtype == plan.accumulate:
        total.addmm_(left, right, beta=0 if first else 1)
    elif first:
        total.copy_(torch.mm(left.to(right.dtype), right, out_dtype=plan.accumulate))
    else:
        total.add_(torch.mm(left.to(right.dtype), right, out_dtype=plan.accumulate))


def _label_column(labels_R: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """(label lies in this tile [R], its column [R, 1]; any valid column where it does not). Waits for no device."""
    column_R = labels_R - columns.start
    last = columns.stop - columns.start - 1
    inside_R = (column_R >= 0) & (column_R <= last)
    return inside_R, column_R.clamp(0, last).unsqueeze(1)


def _set_label(tile_RC: Tensor, column_R1: Tensor, inside_R: Tensor, value_R: Tensor) -> None:
    """Writes ``value`` at the label's column of the rows whose label is in this tile, in place."""
    kept_R = tile_RC.gather(1, column_R1).squeeze(1)
    tile_RC.scatter_(1, column_R1, torch.where(inside_R, value_R, kept_R).unsqueeze(1))


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _operand(tensor: Tensor, plan: _Plan) -> Tensor:
    """What a matrix product reads; where products of bf16 cannot write float32, the same values as float32."""
    rounded = tensor.to(plan.operand)
    return rounded if plan.low_precision_products else rounded.to(plan.accumulate)


def _rounded(tensor: Tensor, plan: _Plan) -> Tensor:
    """The operand's values in ``plan.accumulate``."""
    return tensor.to(plan.operand).to(plan.accumulate)


def _plan(hidden: Tensor, weight: Tensor, softcap: float | None, chunk_size: int | None) -> _Plan:
    device = hidden.device.type
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    if operand != torch.float64 and torch.is_autocast_enabled(device):
        operand = torch.get_autocast_dtype(device)
    rows, columns = CPU_TILE if device == "cpu" else ACCELERATOR_TILE
    if device == "cpu":
        columns = min(columns * max(1, rows // max(1, hidden.shape[0])), CPU_COLUMNS)
    if chunk_size is not None:
        rows = columns = chunk_size
    return _Plan(
        softcap=softcap,
        rows=rows,
        columns=columns,
        operand=operand,
        accumulate=torch.float64 if operand == torch.float64 else torch.float32,
        low_precision_products=device == "cuda",
    )


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise UserError(f"expected hidden [N, H], weight [V, H], labels [N]; got {shapes}")
    if not hidden.is_floating_point() or not weight.is_floating_point() or labels.dtype != torch.int64:
        types = f"hidden {hidden.dtype}, weight {weight.dtype}, labels {labels.dtype}"
        raise UserError(f"expected floating-point hidden and weight and int64 labels; got {types}")
    if softcap is not None and not softcap > 0:
        raise UserError(f"softcap is {softcap}; give a positive number, or None for none")
    vocabulary = weight.shape[0]
    if labels.numel() == 0:
        return
    lowest, highest = torch.stack(torch.aminmax(labels)).tolist()
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        index = int((labels == wrong).nonzero()[0])
        raise UserError(
            f"label {wrong} at index {index} is outside [0, {vocabulary}), the head's vocabulary: "
            "pass supervised positions only, and the tokenizer that belongs to this model"
        )
