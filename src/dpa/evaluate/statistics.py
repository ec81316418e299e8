"""Intervals that know which answers belong together: bootstrap over groups (scenes, questions, pairs, documents).

Answers about one picture are not independent; a bootstrap over single answers would be too sure of itself.

Everything is made of :func:`resample`, the distribution of one benchmark's number, and :func:`interval`, its quantiles.
Two things of one seed and one set of groups are resampled alike, so a difference of their distributions is paired, and
a mean over benchmarks is a mean of theirs (benchmarks share no groups, each has draws of its own).

Legend: N scored units, G groups, S seeds of training, R resamples, T strata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 2_000_000
"""Drawn groups held in memory at once."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Units:
    """What a benchmark's number is the weighted mean of, scored by one model or by several seeds of one method."""

    scores: Floats
    """[S, N], 0 to 1."""
    groups: tuple[str, ...]
    """[N]: units of a group are drawn together."""
    weights: Floats
    """[N]."""
    strata: tuple[str, ...]
    """[N]: groups are drawn within their stratum, whose share of the number is fixed (CV-Bench: its sources)."""

    def mean(self) -> float:
        """The number itself, over all seeds."""
        return float(self.means().mean())

    def means(self) -> Floats:
        """[S]: of each seed."""
        means_S: Floats = self.scores @ self.weights / self.weights.sum()
        return means_S


def units(
    scores: Sequence[float] | Sequence[Sequence[float]],
    groups: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    strata: Sequence[str] | None = None,
) -> Units:
    """Checked :class:`Units`.

    Args:
        scores: [N], or [S][N]: the same units scored by several seeds.
        groups: [N].
        weights: [N], positive; None: all alike.
        strata: [N]; None: one.

    Raises:
        ValueError: lengths differ, N = 0, a weight is not positive, or a group lies in two strata.
    """
    scores_SN = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    count = scores_SN.shape[1]
    weights_N = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    strata = ("",) * count if strata is None else tuple(strata)
    if not count == len(groups) == len(weights_N) == len(strata) or not count:
        raise ValueError(
            f"{count} scores, {len(groups)} groups, {len(weights_N)} weights; need as many, and at least one"
        )
    if not (weights_N > 0).all():
        raise ValueError("weights must be positive")
    if len(set(zip(groups, strata, strict=True))) > len(set(groups)):
        raise ValueError("a group lies in two strata; give strata that groups do not cross")
    return Units(scores_SN, tuple(groups), weights_N, strata)


def strata_of(groups: Sequence[str], weights: Sequence[float]) -> list[str] | None:
    """Units of one weight as one stratum (CV-Bench: a source); None where a group has units of several weights."""
    strata = [repr(weight) for weight in weights]
    return None if len(set(zip(groups, strata, strict=True))) > len(set(groups)) else strata


def resample(sample: Units, *, seed: int = 0, resamples: int = RESAMPLES, stream: int = 0) -> Floats:
    """[R]: the number over groups drawn with replacement, as many as there are in each stratum.

    With several seeds, seeds are drawn with replacement too, and then groups, once for all drawn seeds: they were asked
    the same questions, so what the choice of questions does to the number does not average out over seeds.

    Args:
        seed: the same seed and groups, the same draws.
        resamples: R.
        stream: of the draws of seeds: two methods have different ones, or their seeds would be drawn as pairs.
    """
    rng = np.random.default_rng(seed)
    seeds = len(sample.scores)
    of_stratum = np.asarray(sample.strata)
    share_RS = np.ones((resamples, 1))
    if seeds > 1:
        # each seed's number of times drawn, over S; from a generator of its own, so that groups are drawn as for one
        of_seeds = np.random.default_rng([seed, 1 + stream])
        share_RS = of_seeds.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    total_R = np.zeros(resamples)
    for name in dict.fromkeys(sample.strata):
        inside = of_stratum == name
        weights_N = sample.weights[inside]
        _, group_N = np.unique(np.asarray(sample.groups)[inside], return_inverse=True)
        weight_G = np.bincount(group_N, weights=weights_N).astype(np.float64)
        sum_SG = np.stack([np.bincount(group_N, weights_N * row[inside]).astype(np.float64) for row in sample.scores])
        mean_RS = np.concatenate(list(_means(sum_SG, weight_G, rng, resamples)))
        total_R += weights_N.sum() / sample.weights.sum() * (mean_RS * share_RS).sum(axis=1)
    return total_R


def _means(sum_SG: Floats, weight_G: Floats, rng: np.random.Generator, resamples: int) -> Iterator[Floats]:
    """[chunk of R, S]."""
    groups = len(weight_G)
    rows = max(1, _CHUNK // groups)
    for start in range(0, resamples, rows):
        drawn_RG = rng.integers(0, groups, size=(min(rows, resamples - start), groups))
        weight_R = weight_G[drawn_RG].sum(axis=1)
        yield np.stack([sum_G[drawn_RG].sum(axis=1) / weight_R for sum_G in sum_SG], axis=1)


def interval(values_R: Floats, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of a distribution."""
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def group_interval(
    scores: Sequence[float],
    groups: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    strata: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the weighted mean of ``scores``; whole groups are drawn with replacement.

    For the difference of two methods on the same answers, pass the differences: that is the paired bootstrap.

    Args:
        scores: [N].
        groups: [N] name of each answer's group.
        weights: [N] of the scores in the mean; None: all alike.
        strata: [N] within which groups are drawn; None: one.
        seed: the same seed, the same interval.
        resamples: R.
        level: share of the resampled means inside.

    Returns:
        (low, high); with one group both are the mean.

    Raises:
        ValueError: lengths differ, or N = 0.
    """
    sample = units(scores, groups, weights=weights, strata=strata)
    return interval(resample(sample, seed=seed, resamples=resamples), level)


@dataclass(frozen=True, slots=True)
class Paired:
    """One method minus another on the same units."""

    difference: float
    interval: tuple[float, float]
    """95 %."""
    better: float
    """Share of the resamples in which the difference is above 0, ties half."""
    groups_won: int
    groups_tied: int
    groups_lost: int


def paired(first: Units, second: Units, *, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """Paired bootstrap: both methods over the same draws of groups; seeds of either are drawn independently.

    Raises:
        ValueError: other units, groups, weights or strata.
    """
    if first.groups != second.groups or first.strata != second.strata or (first.weights != second.weights).any():
        raise ValueError("paired methods need the same units in the same order")
    delta_R = resample(first, seed=seed, resamples=resamples)
    delta_R = delta_R - resample(second, seed=seed, resamples=resamples, stream=1)
    _, group_N = np.unique(np.asarray(first.groups), return_inverse=True)
    delta_N = first.scores.mean(axis=0) - second.scores.mean(axis=0)
    delta_G = np.round(np.bincount(group_N, weights=delta_N * first.weights), 12)
    return Paired(
        difference=first.mean() - second.mean(),
        interval=interval(delta_R),
        better=float((delta_R > 0).mean() + (delta_R == 0).mean() / 2),
        groups_won=int((delta_G > 0).sum()),
        groups_tied=int((delta_G == 0).sum()),
        groups_lost=int((delta_G < 0).sum()),
    )


def mean_and_sem(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean over seeds (n - 1 in the variance); None for one seed.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("0 values; need at least one")
    sem = None if len(values) == 1 else float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return float(np.mean(values)), sem


def wins(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """On how many benchmarks each method has the highest number; those who share it share the win.

    Args:
        values: method -> benchmark -> number. Benchmarks that a method lacks do not count.
    """
    benchmarks = set.intersection(*(set(of) for of in values.values())) if values else set()
    won = dict.fromkeys(values, 0.0)
    for benchmark in benchmarks:
        best = max(of[benchmark] for of in values.values())
        winners = [method for method, of in values.items() if of[benchmark] == best]
        for method in winners:
            won[method] += 1 / len(winners)
    return won
