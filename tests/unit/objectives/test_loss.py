"""weighted_nll, official_mean, weight_stats and weight_health."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa.errors import UserError
from dpa.objectives import OFFICIAL_EPSILON, official_mean, weight_health, weight_stats, weighted_nll


def test_weighted_nll_matches_its_formula() -> None:
    logp = (-torch.rand(100)).requires_grad_()
    weights = torch.rand(100, requires_grad=True)
    loss_sum, weight_sum = weighted_nll(logp, weights)
    assert (loss_sum.dtype, weight_sum.dtype) == (torch.float32, torch.float32)
    pairs = list(zip(logp.tolist(), weights.tolist(), strict=True))
    assert loss_sum.item() == pytest.approx(-sum(w * value for value, w in pairs), rel=1e-6)
    assert float(weight_sum) == pytest.approx(sum(w for _, w in pairs), rel=1e-6)
    assert not weight_sum.requires_grad
    loss_sum.backward()
    assert torch.equal(logp.grad, -weights.detach())  # type: ignore[arg-type]
    assert weights.grad is None


def test_weighted_nll_types() -> None:
    for dtype, result in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        sums = weighted_nll(torch.zeros(3, dtype=dtype), torch.ones(3))
        assert {value.dtype for value in sums} == {result}


def test_nothing_still_has_a_graph() -> None:
    logp = torch.zeros(0, requires_grad=True)
    loss_sum, weight_sum = weighted_nll(logp, torch.zeros(0))
    assert (loss_sum.item(), weight_sum.item()) == (0.0, 0.0)
    loss_sum.backward()
    assert logp.grad is not None
    assert not weighted_nll(torch.zeros(0), torch.zeros(0))[0].requires_grad


@given(cut=st.integers(0, 12))
def test_sums_do_not_depend_on_the_split(cut: int) -> None:
    draw = torch.Generator().manual_seed(1)
    logp, weights = -torch.rand(12, generator=draw).double(), torch.rand(12, generator=draw).double()
    whole = weighted_nll(logp, weights)
    parts = [weighted_nll(logp[part], weights[part]) for part in (slice(0, cut), slice(cut, 12))]
    for i in range(2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i])


def test_official_mean() -> None:
    assert float(official_mean(torch.tensor(6.0), torch.tensor(2.0))) == pytest.approx(6 / (2 + OFFICIAL_EPSILON))
    assert float(official_mean(torch.tensor(0.0), torch.tensor(0.0))) == 0.0


def test_health_by_hand() -> None:
    weights = torch.tensor([0.05, 0.05, 0.5, 0.2])
    has_image = torch.tensor([True, True, True, False])
    health = weight_health(weight_stats(weights, 0.05, 0.5, has_image))
    assert health == {
        "mean_weight": pytest.approx(0.2),
        "share_at_minimum": 0.5,
        "share_at_maximum": 0.25,
        "effective_tokens": pytest.approx(0.8**2 / (2 * 0.05**2 + 0.5**2 + 0.2**2)),
        "share_text_only": 0.25,
    }


def test_uniform_weights_are_all_effective() -> None:
    health = weight_health(weight_stats(torch.ones(9), 1.0, 1.0, torch.ones(9).bool()))
    assert health["effective_tokens"] == 9.0
    assert (health["share_at_minimum"], health["share_at_maximum"], health["share_text_only"]) == (1.0, 1.0, 0.0)


def test_a_rounded_mean_still_counts_as_at_its_bound() -> None:
    pooled = (torch.full((1,), 0.05) + 0.05 + 0.05) / 3
    stats = weight_stats(torch.cat([pooled, torch.nextafter(pooled, torch.ones(1))]), 0.05, 0.5, torch.ones(2).bool())
    assert float(stats["at_minimum"]) == 2.0


@settings(deadline=None)
@given(values=st.lists(st.floats(0.0625, 0.5, width=32), max_size=12), cut=st.integers(0, 12))
def test_stats_are_additive_and_health_within_its_limits(values: list[float], cut: int) -> None:
    weights = torch.tensor(values)
    has_image = torch.arange(len(values)) % 3 > 0
    whole = weight_stats(weights, 0.05, 0.5, has_image)
    parts = [weight_stats(weights[part], 0.05, 0.5, has_image[part]) for part in (slice(0, cut), slice(cut, None))]
    for name, total in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], total)
    health = weight_health({name: float(total) for name, total in whole.items()})
    assert 0 <= health["effective_tokens"] <= len(values) * (1 + 1e-5)
    if values:
        assert min(values) * (1 - 1e-5) <= health["mean_weight"] <= max(values) * (1 + 1e-5)
    else:
        assert set(health.values()) == {0.0}


def test_wrong_shapes() -> None:
    with pytest.raises(UserError, match=r"logp is \(3,\), weights \(2,\)"):
        weighted_nll(torch.zeros(3), torch.zeros(2))
    with pytest.raises(UserError, match=r"has_image \(2,\)"):
        weight_stats(torch.zeros(3), 0.0, 1.0, torch.ones(2).bool())
