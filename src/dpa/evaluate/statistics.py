"""Intervals that know which answers belong together: bootstrap over groups (scenes, questions, pairs, documents).

Answers about one picture are not independent; a bootstrap over single answers would be too sure of itself.

Legend: N scored answers, G groups, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 2_000_000
"""Drawn groups held in memory at once."""


def group_interval(
    scores: Sequence[float],
    groups: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``scores``; whole groups are drawn with replacement.

    For the difference of two methods on the same answers, pass the differences: that is the paired bootstrap.

    Args:
        scores: [N].
        groups: [N] name of each answer's group.
        weights: [N] of the scores in the mean; None: all alike.
        seed: the same seed, the same interval.
        resamples: R.
        level: share of the resampled means inside.

    Returns:
        (low, high); with one group both are the mean.

    Raises:
        ValueError: lengths differ, or N = 0.
    """
    weight_N = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not len(scores) == len(groups) == len(weight_N) or not scores:
        raise ValueError(f"{len(scores)} scores, {len(groups)} groups; need as many, and at least one")
    _, group_N = np.unique(np.asarray(groups), return_inverse=True)
    sum_G = np.bincount(group_N, weights=weight_N * np.asarray(scores, dtype=np.float64)).astype(np.float64)
    weight_G = np.bincount(group_N, weights=weight_N).astype(np.float64)
    mean_R = np.concatenate(list(_resampled_means(sum_G, weight_G, seed, resamples)))
    low, high = np.quantile(mean_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(
    sum_G: NDArray[np.float64], weight_G: NDArray[np.float64], seed: int, resamples: int
) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    groups = len(sum_G)
    rows = max(1, _CHUNK // groups)
    for start in range(0, resamples, rows):
        drawn_RG = rng.integers(0, groups, size=(min(rows, resamples - start), groups))
        yield sum_G[drawn_RG].sum(axis=1) / weight_G[drawn_RG].sum(axis=1)
