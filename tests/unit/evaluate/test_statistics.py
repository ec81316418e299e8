"""Group bootstrap against what is known about it."""

from __future__ import annotations

import numpy as np
import pytest

from dpa.evaluate.statistics import group_interval


def naive(scores: list[float], groups: list[str], seed: int, resamples: int) -> tuple[float, float]:
    """Draws groups by name and averages the answers in them, one resample at a time."""
    rng = np.random.default_rng(seed)
    names = sorted(set(groups))
    means = []
    for _ in range(resamples):
        drawn = [names[index] for index in rng.integers(0, len(names), size=len(names))]
        values = [score for name in drawn for score, group in zip(scores, groups, strict=True) if group == name]
        means.append(sum(values) / len(values))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def test_equals_the_naive_bootstrap() -> None:
    scores = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 0.25]
    groups = ["b", "a", "b", "c", "d", "d", "a"]
    assert group_interval(scores, groups, seed=3, resamples=400) == pytest.approx(naive(scores, groups, 3, 400))


def test_covers_the_normal_interval_of_independent_answers() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random(2000) < 0.7).astype(float).tolist()
    low, high = group_interval(scores, [str(number) for number in range(2000)])
    mean, error = np.mean(scores), np.std(scores) / np.sqrt(2000)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.002)


def test_answers_that_hang_together_widen_it() -> None:
    scores = [float(number % 2) for number in range(100) for _ in range(4)]
    alone = group_interval(scores, [str(number) for number in range(400)])
    together = group_interval(scores, [str(number // 4) for number in range(400)])
    assert together[1] - together[0] == pytest.approx(2 * (alone[1] - alone[0]), rel=0.1)  # sqrt(4)


def test_one_seed_one_interval() -> None:
    scores, groups = [1.0, 0.0, 1.0, 0.0], ["a", "b", "c", "d"]
    assert group_interval(scores, groups, seed=1) == group_interval(scores, groups, seed=1)
    assert group_interval([1.0, 0.0], ["a", "a"]) == (0.5, 0.5)


@pytest.mark.parametrize(("scores", "groups"), [([1.0], ["a", "b"]), ([], [])])
def test_refuses_what_does_not_fit(scores: list[float], groups: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(scores)} scores, {len(groups)} groups"):
        group_interval(scores, groups)


def test_weights_of_the_scores() -> None:
    scores, groups = [1.0, 0.0, 1.0, 0.5], ["a", "a", "b", "c"]
    assert group_interval(scores, groups, weights=[1.0] * 4) == group_interval(scores, groups)
    assert group_interval(scores, groups, weights=[3.0] * 4) == pytest.approx(group_interval(scores, groups))
    low, high = group_interval([1.0, 0.0] * 50, [str(n) for n in range(100)], weights=[3.0, 1.0] * 50)
    assert low < 0.75 < high
    assert low > 0.6
    with pytest.raises(ValueError, match="need as many"):
        group_interval([1.0, 0.0], ["a", "b"], weights=[1.0])
