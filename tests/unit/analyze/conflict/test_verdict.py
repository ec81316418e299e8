"""Levels, warnings, and the lab's scale that they rest on."""

from __future__ import annotations

import pytest

from dpa.analyze.conflict.intervals import Estimate
from dpa.analyze.conflict.verdict import PAPER_CAPTIONS, Verdict, judge, lab_levels, level_of, thresholds_of

STEPS = lab_levels()["steps"]
LIMITS = thresholds_of(lab_levels()["levels"])


def around(value: float, reach: float = 0.001) -> Estimate:
    return Estimate(value, value - reach, value + reach)


def judged(
    share: Estimate, *, gap: float = 0.3, read: float | None = 0.3, records: int = 10**6, steps: int | None = STEPS
) -> Verdict:
    return judge(share, around(gap), None if read is None else around(read), records=records, steps=steps)


def test_the_labs_levels_are_in_order_and_the_thresholds_between_them() -> None:
    rows = lab_levels()["levels"]
    shares = [row["share"]["value"] for row in rows]
    assert [row["percent_b"] for row in rows] == [0, 25, 50, 75, 100]
    assert shares == sorted(shares)
    assert shares[0] < LIMITS.medium < shares[1] < LIMITS.high < shares[-1]
    assert level_of(shares[0], LIMITS) == "low"
    assert level_of(shares[1], LIMITS) == "medium"
    assert level_of(shares[-1], LIMITS) == "high"


@pytest.mark.parametrize(("share", "level", "method"), [(0.0, "low", "vanilla"), (0.99, "high", "dpa")])
def test_each_level_recommends_its_methods(share: float, level: str, method: str) -> None:
    found = judged(around(share))
    assert found.level == level
    assert method in found.advice
    assert not found.warnings
    assert "lab" in found.basis


def test_an_interval_over_a_threshold_is_said() -> None:
    assert "from low to medium" in judged(around(LIMITS.medium, 0.002)).basis
    assert "interval reaches" not in judged(around(0.99)).basis


def test_warnings_of_overfitting_little_data_nothing_found_and_a_given_proxy() -> None:
    (overfit,) = judged(around(0.2), gap=0.1, read=0.5).warnings
    assert "0.500" in overfit
    assert "0.100" in overfit
    (little,) = judged(around(0.2), records=4000).warnings
    assert "4,000" in little
    assert f"{PAPER_CAPTIONS:,}" in little
    (nothing,) = judged(around(0.0), gap=0.0005, read=0.0005).warnings
    assert "not distinguishable" in nothing
    (given,) = judged(around(0.2), read=None, steps=None).warnings
    assert "given proxy" in given


@pytest.mark.parametrize(("steps", "said"), [(STEPS - 1, "too low"), (STEPS + 1, "too high")])
def test_a_proxy_of_other_length_than_the_labs_does_not_fit_its_scale(steps: int, said: str) -> None:
    (warning,) = judged(around(0.2), steps=steps).warnings
    assert said in warning
