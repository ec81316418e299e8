"""Relevance -> weight of each token's loss: clamp, then a moving mean. Exact and official variant; text-only policy.

Legend: N supervised tokens, M positions at which relevance is known (official variant), P = B * (L - 1) positions of
the flattened, shifted batch (B samples, L padded length).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from dpa.errors import UserError

TextOnlyPolicy = Literal["mean", "minimum", "zero"]


@torch.no_grad()
def token_weights(relevance: Tensor, segment_ids: Tensor, *, minimum: float, maximum: float, window: int = 3) -> Tensor:
    """Weights of the exact variant (method.md, row "smoothing"): clamp, then a centred mean inside one segment.

    A segment is one contiguous supervised run of one sample. Equal *neighbours* in ``segment_ids`` are one segment; ids
    need not be sorted. At a segment's edges the mean is of what exists. An unknown relevance (NaN) does not exist for
    any mean: the token takes its known neighbours' mean; without any in the window, the mean of its segment's known
    clamped values; and in a wholly unknown segment the neutral weight (minimum + maximum) / 2.

    Args:
        relevance: [N], NaN where unknown.
        segment_ids: int [N], on the same device.
        minimum, maximum: bounds (delta_min, delta_max), 0 <= minimum <= maximum.
        window: width of the mean in tokens, odd; 1 means none.

    Returns:
        float32 [N] (float64 for float64 input), detached, within the bounds.

    Raises:
        UserError: shapes, bounds or window do not fit.
    """
    _check_bounds(minimum, maximum, window)
    if relevance.ndim != 1 or relevance.shape != segment_ids.shape:
        raise UserError(
            f"token_weights: relevance is {tuple(relevance.shape)}, segment_ids {tuple(segment_ids.shape)}; "
            "expected [N] both"
        )
    clamped_N = _computed(relevance).clamp(minimum, maximum)  # NaN stays NaN
    known_N = (~clamped_N.isnan()).to(clamped_N.dtype)
    value_N = clamped_N.nan_to_num(nan=0.0)
    run_N = _run_index(segment_ids)
    sum_N, count_N = value_N.clone(), known_N.clone()
    # A loop over the window's offsets, not over tokens; sums never leave a segment, so that not even rounding leaks.
    for offset in range(1, min(window // 2, max(len(value_N) - 1, 0)) + 1):
        same_segment = (run_N[offset:] == run_N[:-offset]).to(value_N.dtype)
        sum_N[:-offset] += same_segment * value_N[offset:]
        sum_N[offset:] += same_segment * value_N[:-offset]
        count_N[:-offset] += same_segment * known_N[offset:]
        count_N[offset:] += same_segment * known_N[:-offset]
    fallback_N = _segment_mean(value_N, known_N, run_N, neutral=(minimum + maximum) / 2)
    mean_N = torch.where(count_N > 0, sum_N / count_N.clamp(min=1), fallback_N)
    return mean_N.clamp(minimum, maximum)  # the mean of seven equal float32 may be a bit off


def text_only_weight(policy: str, *, image_weight_sum: float, image_tokens: float, minimum: float) -> float:
    """Weight of every token of samples without image (method.md, row "samples without image").

    Such tokens have no contrast. ``mean`` gives them the mean weight of the optimizer step's image tokens, so that text
    keeps the share of the loss that it has with uniform weights; 1 where the step has no image token at all (any
    constant is the same there, for the loss is divided by the sum of weights). ``minimum`` gives delta_min, ``zero``
    ignores text.

    Args:
        policy: a :data:`TextOnlyPolicy`.
        image_weight_sum: sum of the weights of image samples' tokens in this optimizer step, over all ranks.
        image_tokens: their number.
        minimum: delta_min.

    Raises:
        UserError: unknown policy.
    """
    if policy == "mean":
        return image_weight_sum / image_tokens if image_tokens > 0 else 1.0
    if policy == "minimum":
        return minimum
    if policy == "zero":
        return 0.0
    raise UserError(f"unknown text_only policy {policy!r}; there are {', '.join(get_args(TextOnlyPolicy))}")


@torch.no_grad()
def official_positions(supervised_P: Tensor, *, window: int = 3) -> Tensor:
    """Positions at which the official variant needs a relevance: supervised ones and all within window // 2 of one.

    Args:
        supervised_P: bool [P], the shifted labels' mask ``supervised[:, 1:].flatten()``; position p predicts label p.
        window: as in :func:`official_token_weights`.

    Returns:
        int64 [M], ascending. Divide by L - 1 for the sample; the remainder is the predicting position t - 1 in its row.
    """
    _check_bounds(0.0, 0.0, window)
    if supervised_P.ndim != 1 or supervised_P.dtype != torch.bool:
        raise UserError(f"official_positions: expected bool [P], got {supervised_P.dtype} {tuple(supervised_P.shape)}")
    if supervised_P.numel() == 0:
        return supervised_P.nonzero().squeeze(1)
    near_1P = max_pool1d(supervised_P.float().unsqueeze(0), window, stride=1, padding=window // 2)
    return near_1P.squeeze(0).nonzero().squeeze(1)


@torch.no_grad()
def official_token_weights(
    relevance_M: Tensor,
    position_M: Tensor,
    supervised_M: Tensor,
    total: int,
    *,
    minimum: float,
    maximum: float,
    window: int = 3,
) -> Tensor:
    """Weights as the reference makes them (fidelity ``official``): its pooled full array at supervised positions.

    What the reference does (fnlp-vision/DPA, ``base_forward`` of each of its model files; CAL's own code is the same
    but for logits and fixed bounds 1 and 5):

    - logits [B, L, V] and labels [B, L] are shifted by one (logits without the last, labels without the first position)
      and flattened over batch *and* length to P = B * (L - 1); L includes the image's positions and right padding.
    - Each target that is not supervised (prompt, image, padding) is read as id 0, and its relevance is p(0 | with
      image) - p(0 | without), as for any other token.
    - Relevance is clamped to [delta_min, delta_max], then average-pooled over the flat array (kernel 3, stride 1,
      padding 1, padding not counted). The mean so crosses from one sample's end into the next one's start, and takes in
      unsupervised neighbours, mostly at delta_min. There is no special case for samples without image: both passes
      agree, so relevance is 0 and the clamp makes delta_min of it, before neighbours are averaged in.
    - loss = sum(w * CE) / (sum of w over supervised + 1e-6), per micro-batch on each GPU; micro-batches and GPUs are
      then averaged with equal shares (``loss.official_mean``).

    Args:
        relevance_M: [M] at ``position_M``: (with - without) for the label where supervised, for id 0 elsewhere; 0 in
            samples without image. NaN (not evaluated), like a position that is not given, is taken as delta_min: the
            reference's value wherever id 0 is improbable in both passes.
        position_M: int64 [M], distinct indices into the flat array, from :func:`official_positions`.
        supervised_M: bool [M].
        total: P.
        minimum, maximum: delta_min, delta_max.
        window: kernel of the pooling, odd; the reference's is 3.

    Returns:
        float32 (float64 for float64 input), detached: weights of ``position_M[supervised_M]``, in that order.

    Raises:
        UserError: shapes, bounds or window do not fit.
    """
    _check_bounds(minimum, maximum, window)
    if relevance_M.ndim != 1 or not relevance_M.shape == position_M.shape == supervised_M.shape:
        raise UserError(
            f"official_token_weights: relevance is {tuple(relevance_M.shape)}, position {tuple(position_M.shape)}, "
            f"supervised {tuple(supervised_M.shape)}; expected [M] each"
        )
    if position_M.numel() == 0:
        return _computed(relevance_M)
    clamped_M = _computed(relevance_M).nan_to_num(nan=minimum).clamp(minimum, maximum)
    flat_P = clamped_M.new_full((total,), minimum)
    flat_P[position_M] = clamped_M
    pool = avg_pool1d(flat_P.unsqueeze(0), window, stride=1, padding=window // 2, count_include_pad=False).squeeze(0)
    return pool[position_M[supervised_M]]


def _computed(values: Tensor) -> Tensor:
    detached = values.detach()
    return detached if detached.dtype == torch.float64 else detached.float()


def _run_index(segment_ids_N: Tensor) -> Tensor:
    """0, 0, 1, 1, 1, 2 ...: number of the run of equal neighbours that each token lies in."""
    changes_N = torch.zeros_like(segment_ids_N, dtype=torch.int64)
    changes_N[1:] = segment_ids_N[1:] != segment_ids_N[:-1]
    return changes_N.cumsum(dim=0)


def _segment_mean(value_N: Tensor, known_N: Tensor, run_N: Tensor, *, neutral: float) -> Tensor:
    """Mean of the known values of each token's segment; ``neutral`` where there is none."""
    # N slots, though there are fewer runs: asking how many would wait for the accelerator.
    sum_N = torch.zeros_like(value_N).index_add_(0, run_N, value_N)
    count_N = torch.zeros_like(value_N).index_add_(0, run_N, known_N)
    mean_N = torch.where(count_N > 0, sum_N / count_N.clamp(min=1), neutral)
    return mean_N[run_N]


def _check_bounds(minimum: float, maximum: float, window: int) -> None:
    if not 0 <= minimum <= maximum:
        raise UserError(f"weights need 0 <= minimum <= maximum; got minimum {minimum}, maximum {maximum}")
    if window < 1 or window % 2 == 0:
        raise UserError(f"the moving mean's window is {window}; give an odd number of tokens, 1 for none")
