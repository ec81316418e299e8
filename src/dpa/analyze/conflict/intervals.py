"""Bootstrap over captions, for many ratios at once: every figure of a measurement is read from the same resamples.

Legend: G captions, K ratios, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 4_000_000
"""Drawn counts that are held in memory at once."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_intervals(top_GK: Floats, bottom_GK: Floats, *, seed: int, resamples: int = RESAMPLES) -> list[Estimate]:
    """Per column k: sum of tops over sum of bottoms, with a percentile interval; captions are drawn with replacement.

    A mean over tokens is such a ratio (values over token counts): tokens of one caption are not independent, captions
    are. Differences are paired: both sides of one caption are drawn together.

    Args:
        top_GK: what is averaged, summed within each caption.
        bottom_GK: what it is divided by; a resample whose sum is 0 (a rare word class) does not count.
        seed: the same seed, the same intervals.

    Returns:
        K estimates; NaN where a column's bottoms are all 0. With one caption both bounds are the value.
    """
    captions, columns = top_GK.shape
    rng = np.random.default_rng(seed)
    even = np.full(captions, 1 / captions)
    ratios: list[Floats] = []
    rows = max(1, _CHUNK // captions)
    with np.errstate(divide="ignore", invalid="ignore"):
        value_K = top_GK.sum(axis=0) / bottom_GK.sum(axis=0)
        for start in range(0, resamples, rows):
            count_RG = rng.multinomial(captions, even, size=min(rows, resamples - start)).astype(np.float64)
            ratios.append((count_RG @ top_GK) / (count_RG @ bottom_GK))
    ratio_RK = np.concatenate(ratios)
    found = []
    for column in range(columns):
        known = ratio_RK[np.isfinite(ratio_RK[:, column]), column]
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else (np.nan, np.nan)
        found.append(Estimate(float(value_K[column]), float(low), float(high)))
    return found
