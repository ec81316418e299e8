"""Group bootstrap against what is known about it."""

from __future__ import annotations

import numpy as np
import pytest

from dpa.evaluate.statistics import group_interval, interval, mean_and_sem, paired, resample, units, wins


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


def test_weights_are_of_units() -> None:
    """A weight of 2 is a unit written twice, in its group."""
    scores, groups = [1.0, 0.0, 0.5, 1.0], ["a", "b", "a", "c"]
    twice = resample(units([*scores, 0.0], [*groups, "b"]), seed=2)
    weighted = units(scores, groups, weights=[1, 2, 1, 1])
    assert weighted.mean() == 0.5
    assert resample(weighted, seed=2) == pytest.approx(twice)
    assert resample(units(scores, groups), seed=2) != pytest.approx(twice)


def test_strata_are_the_mean_of_their_means() -> None:
    """CV-Bench: 2D = mean of ADE20K (4 rows) and COCO (2), headline = mean of 2D and 3D (3 rows)."""
    scores = [1, 0, 0, 1, 1, 0, 1, 1, 0]
    strata = ["ade"] * 4 + ["coco"] * 2 + ["omni"] * 3
    weights = [0.25 / 4] * 4 + [0.25 / 2] * 2 + [0.5 / 3] * 3
    groups = [str(number) for number in range(9)]
    sample = units([float(score) for score in scores], groups, weights=weights, strata=strata)
    assert sample.mean() == pytest.approx((np.mean([0.5, 0.5]) + 2 / 3) / 2)
    rng, means = np.random.default_rng(5), []
    for _ in range(4000):
        parts = {
            name: np.mean(
                rng.choice([s for s, of in zip(scores, strata, strict=True) if of == name], strata.count(name))
            )
            for name in ("ade", "coco", "omni")
        }
        means.append((np.mean([parts["ade"], parts["coco"]]) + parts["omni"]) / 2)
    drawn = resample(sample)
    assert drawn.mean() == pytest.approx(np.mean(means), abs=0.01)  # both are estimates from thousands of draws
    assert drawn.std() == pytest.approx(np.std(means), rel=0.05)


def synthetic(rng: np.random.Generator, groups: int, truth: float) -> tuple[list[float], list[str]]:
    """Four answers a group; groups are easier or harder (a beta distribution around ``truth``)."""
    chance = rng.beta(0.6 * truth, 0.6 * (1 - truth), size=groups)
    scores = (rng.random((groups, 4)) < chance[:, None]).astype(float)
    return scores.ravel().tolist(), [str(number // 4) for number in range(4 * groups)]


def coverage(together: bool) -> float:
    rng, truth, hits, trials = np.random.default_rng(7), 0.6, 0, 300
    for trial in range(trials):
        scores, groups = synthetic(rng, 60, truth)
        own = groups if together else [str(number) for number in range(len(groups))]
        low, high = group_interval(scores, own, seed=trial, resamples=400)
        hits += low <= truth <= high
    return hits / trials


def test_95_of_100_intervals_hold_the_truth() -> None:
    # 300 trials of a 95 % interval: two standard errors are 2.5 points, and 60 groups cost a point or two
    assert coverage(together=True) == pytest.approx(0.94, abs=0.035)
    assert coverage(together=False) < 0.85, "answers of a group taken for independent"


def test_the_paired_interval_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(1)
    first, groups = synthetic(rng, 50, 0.7)
    second = [score * float(rng.random() < 0.8) for score in first]
    found = paired(units(first, groups), units(second, groups), seed=4)
    deltas = [one - two for one, two in zip(first, second, strict=True)]
    assert found.difference == pytest.approx(np.mean(deltas))
    assert found.interval == pytest.approx(group_interval(deltas, groups, seed=4))
    assert found.better == 1
    assert (found.groups_lost, found.groups_won + found.groups_tied) == (0, 50)
    alone = resample(units(first, groups), seed=1) - resample(units(second, groups), seed=2)
    assert np.ptp(interval(alone)) > 1.5 * np.ptp(found.interval), "unpaired draws would be far less sure"


def test_pairs_need_the_same_units() -> None:
    with pytest.raises(ValueError, match="same units"):
        paired(units([1.0, 0.0], ["a", "b"]), units([1.0, 0.0], ["b", "a"]))
    same = units([1.0, 0.0], ["a", "b"])
    assert (paired(same, same).interval, paired(same, same).better) == ((0.0, 0.0), 0.5)


def test_seeds_widen_by_their_spread_and_share_their_questions() -> None:
    rng = np.random.default_rng(0)
    scores, groups = synthetic(rng, 80, 0.5)
    one = resample(units(scores, groups), seed=3)
    same = resample(units([scores] * 5, groups), seed=3)
    assert same == pytest.approx(one), "equal seeds add nothing, and do not make the questions any more"
    spread = [[min(1.0, score + shift) for score in scores] for shift in (0.0, 0.1, 0.2, 0.3, 0.4)]
    several = units(spread, groups)
    drawn = resample(several, seed=3)
    between = np.std(several.means()) / np.sqrt(5)
    within = resample(units(np.mean(spread, axis=0).tolist(), groups), seed=3)
    assert drawn.std() == pytest.approx(np.hypot(between, within.std()), rel=0.05)  # estimates from 10,000 draws


def test_seeds_of_two_methods_are_not_pairs() -> None:
    """Ten seeds of each, equal spreads: the difference has both spreads, not none."""
    groups = [str(number) for number in range(40)]
    scores = [[0.02 * seed] * 40 for seed in range(10)]
    found = paired(units(scores, groups), units(scores, groups))
    half = 1.96 * np.std([0.02 * seed for seed in range(10)]) / np.sqrt(10) * np.sqrt(2)
    assert found.interval == pytest.approx((-half, half), rel=0.06)  # percentiles of 10,000 draws


def test_mean_and_standard_error_of_seeds() -> None:
    assert mean_and_sem([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / np.sqrt(3)))
    assert mean_and_sem([1.5]) == (1.5, None)


def test_wins_count_where_all_have_a_number() -> None:
    values = {"a": {"x": 0.5, "y": 0.4, "z": 1.0}, "b": {"x": 0.5, "y": 0.3}, "c": {"x": 0.1, "y": 0.1}}
    assert wins(values) == {"a": 1.5, "b": 0.5, "c": 0.0}


def test_units_are_checked() -> None:
    with pytest.raises(ValueError, match="2 scores, 2 groups, 3 weights"):
        units([1.0, 0.0], ["a", "b"], weights=[1, 1, 1])
    with pytest.raises(ValueError, match="positive"):
        units([1.0, 0.0], ["a", "b"], weights=[1, 0])
    with pytest.raises(ValueError, match="two strata"):
        units([1.0, 0.0], ["a", "a"], strata=["x", "y"])


def test_weights_of_the_scores() -> None:
    scores, groups = [1.0, 0.0, 1.0, 0.5], ["a", "a", "b", "c"]
    assert group_interval(scores, groups, weights=[1.0] * 4) == group_interval(scores, groups)
    assert group_interval(scores, groups, weights=[3.0] * 4) == pytest.approx(group_interval(scores, groups))
    low, high = group_interval([1.0, 0.0] * 50, [str(n) for n in range(100)], weights=[3.0, 1.0] * 50)
    assert low < 0.75 < high
    assert low > 0.6
    with pytest.raises(ValueError, match="need as many"):
        group_interval([1.0, 0.0], ["a", "b"], weights=[1.0])
