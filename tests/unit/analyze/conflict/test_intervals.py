"""Bootstrap of ratios."""

from __future__ import annotations

import numpy as np
import pytest

from dpa.analyze.conflict.intervals import ratio_intervals
from dpa.evaluate.statistics import group_interval

RNG = np.random.default_rng(3)
COUNTS = RNG.integers(1, 9, size=60)
VALUES = [RNG.normal(1.0, 1.0, size=count) for count in COUNTS]


def test_a_mean_over_tokens_has_the_interval_of_the_bootstrap_over_groups() -> None:
    top = np.array([[values.sum()] for values in VALUES])
    (found,) = ratio_intervals(top, COUNTS[:, None].astype(float), seed=0)
    whole = np.concatenate(VALUES)
    assert found.value == pytest.approx(whole.mean())
    groups = [str(group) for group, count in enumerate(COUNTS) for _ in range(count)]
    low, high = group_interval(whole.tolist(), groups)
    # 2,000 and 10,000 other draws: bounds differ by a few per cent of the interval's width
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))


def test_the_seed_decides_and_columns_do_not_disturb_each_other() -> None:
    top, bottom = RNG.normal(size=(40, 3)), np.ones((40, 3))
    assert ratio_intervals(top, bottom, seed=1) == ratio_intervals(top, bottom, seed=1)
    assert ratio_intervals(top, bottom, seed=1) != ratio_intervals(top, bottom, seed=2)
    alone, together = (ratio_intervals(top[:, :n], bottom[:, :n], seed=1)[0] for n in (1, 3))
    # one column or three: BLAS adds up in another order
    assert (alone.value, alone.low, alone.high) == pytest.approx((together.value, together.low, together.high))


def test_a_rare_class_has_an_interval_and_an_absent_one_is_nan() -> None:
    bottom = np.zeros((30, 2))
    bottom[4, 0] = 2.0
    top = bottom * 3.0
    rare, absent = ratio_intervals(top, bottom, seed=0)
    assert (rare.value, rare.low, rare.high) == (3.0, 3.0, 3.0)
    assert np.isnan([absent.value, absent.low, absent.high]).all()
