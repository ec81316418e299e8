"""token_weights, text_only_weight and the official variant against the oracle; properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpa.errors import UserError
from dpa.objectives import (
    label_logits,
    label_logprobs,
    official_mean,
    official_positions,
    official_token_weights,
    relevance,
    text_only_weight,
    token_weights,
    weighted_nll,
)
from tests.oracles import objectives as oracle

NAN = math.nan
VALUES = st.one_of(st.just(NAN), st.floats(-1, 1, width=32))
SAMPLES = st.lists(st.lists(VALUES, min_size=1, max_size=6), min_size=1, max_size=5)
BOUNDS = st.sampled_from([(0.05, 0.5), (0.0, 1.0), (1.0, 5.0), (0.3, 0.3)])
WINDOWS = st.sampled_from([1, 3, 5, 31])


def flat(samples: list[list[float]]) -> tuple[Tensor, Tensor]:
    values = [value for sample in samples for value in sample]
    ids = [7 - i for i, sample in enumerate(samples) for _ in sample]  # not sorted upwards
    return torch.tensor(values), torch.tensor(ids)


def weigh(samples: list[list[float]], bounds: tuple[float, float], window: int) -> Tensor:
    return token_weights(*flat(samples), minimum=bounds[0], maximum=bounds[1], window=window)


@settings(deadline=None)
@given(samples=SAMPLES, bounds=BOUNDS, window=WINDOWS)
def test_matches_oracle_and_stays_within_bounds(
    samples: list[list[float]], bounds: tuple[float, float], window: int
) -> None:
    relevance_N, ids_N = flat(samples)
    got = weigh(samples, bounds, window)
    expected = oracle.token_weights(relevance_N.tolist(), ids_N.tolist(), *bounds, window)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert bool(((got >= bounds[0]) & (got <= bounds[1])).all())
    precise = token_weights(relevance_N.double(), ids_N, minimum=bounds[0], maximum=bounds[1], window=window)
    torch.testing.assert_close(precise, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@settings(deadline=None)
@given(samples=SAMPLES, other=st.lists(VALUES, min_size=1, max_size=6), bounds=BOUNDS, window=WINDOWS, data=st.data())
def test_no_leak_across_samples(
    samples: list[list[float]], other: list[float], bounds: tuple[float, float], window: int, data: st.DataObject
) -> None:
    """Bit for bit: whatever one sample is replaced by, the others' weights do not move."""
    at = data.draw(st.integers(0, len(samples) - 1))
    start = sum(len(sample) for sample in samples[:at])
    before = weigh(samples, bounds, window)
    after = weigh([*samples[:at], other, *samples[at + 1 :]], bounds, window)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[start + len(samples[at]) :], after[start + len(other) :])


@settings(deadline=None)
@given(samples=SAMPLES, bounds=BOUNDS, window=WINDOWS, data=st.data())
def test_permutation_of_samples_permutes_weights(
    samples: list[list[float]], bounds: tuple[float, float], window: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(samples))))
    split = torch.split(weigh(samples, bounds, window), [len(sample) for sample in samples])
    permuted = weigh([samples[i] for i in order], bounds, window)
    assert torch.equal(permuted, torch.cat([split[i] for i in order]))


@settings(deadline=None)
@given(samples=SAMPLES, bound=st.sampled_from([0.05, 0.1, 1.0, 3.7]), window=WINDOWS)
def test_equal_bounds_are_uniform(samples: list[list[float]], bound: float, window: int) -> None:
    weights = weigh(samples, (bound, bound), window)
    assert torch.equal(weights, torch.full_like(weights, bound))
    logp = -torch.linspace(0.1, 3, len(weights))
    weighted, total = weighted_nll(logp, weights)
    uniform, count = weighted_nll(logp, relevance("uniform", logp, None))
    torch.testing.assert_close(weighted / total, uniform / count)


def test_rounding_of_a_long_mean_stays_within_bounds() -> None:
    for bound in (0.05, 0.1, 0.7):
        weights = weigh([[bound] * 40], (bound, bound), 31)
        assert torch.equal(weights, torch.full((40,), bound))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([[0.1, 0.2, 0.3]], [0.15, 0.2, 0.25]),
        ([[-1.0, 0.9]], [0.275, 0.275]),  # clamped before the mean
        ([[0.2]], [0.2]),
        ([[NAN, 0.2, 0.4]], [0.2, 0.3, 0.3]),  # the first caption token
        ([[0.2, NAN, NAN, NAN, 0.4]], [0.2, 0.2, 0.3, 0.4, 0.4]),  # its segment's mean in the middle
        ([[NAN, NAN], [0.5]], [0.275, 0.275, 0.5]),  # the neutral weight
        ([[0.5], [0.1]], [0.5, 0.1]),
    ],
)
def test_by_hand(samples: list[list[float]], expected: list[float]) -> None:
    torch.testing.assert_close(weigh(samples, (0.05, 0.5), 3), torch.tensor(expected))


def test_equal_ids_apart_are_two_segments() -> None:
    ids = torch.tensor([4, 4, 9, 4, 4])
    got = token_weights(torch.tensor([0.1, 0.2, 0.5, 0.3, 0.4]), ids, minimum=0.05, maximum=0.5)
    torch.testing.assert_close(got, torch.tensor([0.15, 0.15, 0.5, 0.35, 0.35]))


def test_detached_and_empty() -> None:
    got = token_weights(torch.rand(4, requires_grad=True), torch.zeros(4).long(), minimum=0.05, maximum=0.5)
    assert not got.requires_grad
    assert got.dtype == torch.float32
    assert token_weights(torch.zeros(0), torch.zeros(0).long(), minimum=0.05, maximum=0.5).shape == (0,)


def test_text_only_policies() -> None:
    def weight(policy: str, tokens: float) -> float:
        return text_only_weight(policy, image_weight_sum=0.2 * tokens, image_tokens=tokens, minimum=0.05)

    assert weight("mean", 40) == pytest.approx(0.2)
    assert weight("mean", 0) == 1.0
    assert (weight("minimum", 40), weight("minimum", 0)) == (0.05, 0.05)
    assert (weight("zero", 40), weight("zero", 0)) == (0.0, 0.0)
    with pytest.raises(UserError, match="unknown text_only policy 'max'; there are mean, minimum, zero"):
        weight("max", 1)


def test_mean_policy_keeps_the_share_of_text() -> None:
    """20 image tokens, 5 of text: text has a fifth of the sum of weights, as with weight 1."""
    image_weights = torch.rand(20)
    text = text_only_weight("mean", image_weight_sum=float(image_weights.sum()), image_tokens=20, minimum=0.05)
    assert 5 * text / (5 * text + float(image_weights.sum())) == pytest.approx(0.2)


def labels_with_runs(draw: torch.Generator, samples: int, length: int, vocabulary: int) -> Tensor:
    """[B, L] with several supervised runs per row, some up to the row's end, and padding after others."""
    labels = torch.full((samples, length), oracle.IGNORED)
    for row in labels:
        position = int(torch.randint(1, 6, (1,), generator=draw))
        while position < length - int(torch.randint(0, 6, (1,), generator=draw)):
            run = int(torch.randint(1, 5, (1,), generator=draw))
            stop = min(position + run, length)
            row[position:stop] = torch.randint(0, vocabulary, (stop - position,), generator=draw)
            position += run + int(torch.randint(1, 5, (1,), generator=draw))
    labels[-1, 1:3] = 5  # never a batch without any
    return labels


@pytest.mark.parametrize(("kind", "minimum", "maximum"), [("cmo", 0.05, 0.5), ("cal", 1.0, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_equals_the_reference(kind: str, minimum: float, maximum: float, dtype: torch.dtype) -> None:
    """Weights, loss and gradient from the needed positions alone, against every logit of the batch."""
    worst = 0.0
    for seed in range(25):
        draw = torch.Generator().manual_seed(seed)
        samples, length, hidden, vocabulary = 1 + seed % 5, 8 + seed, 6, 13
        labels = labels_with_runs(draw, samples, length, vocabulary)
        with_BLH = torch.randn(samples, length, hidden, generator=draw, dtype=dtype)
        without_BLH = torch.randn(samples, length, hidden, generator=draw, dtype=dtype)
        without_BLH[0] = with_BLH[0]  # a sample without image
        weight_VH = torch.randn(vocabulary, hidden, generator=draw, dtype=dtype)

        full = with_BLH.double().clone().requires_grad_()
        loss, weights = oracle.official_loss(
            full @ weight_VH.double().T,
            without_BLH.double() @ weight_VH.double().T,
            labels,
            kind=kind,
            minimum=minimum,
            maximum=maximum,
        )
        loss.backward()

        ours = with_BLH.clone().requires_grad_()
        supervised_P = (labels[:, 1:] != oracle.IGNORED).flatten()
        position_M = official_positions(supervised_P)
        supervised_M = supervised_P[position_M]
        target_M = torch.where(supervised_P, labels[:, 1:].flatten(), 0)[position_M]
        with_MH = ours[:, :-1].reshape(-1, hidden)[position_M]
        without_MH = without_BLH[:, :-1].reshape(-1, hidden)[position_M]
        logp_M = label_logprobs(with_MH, weight_VH, target_M)
        relevance_M = relevance(
            kind,
            logp_M,
            label_logprobs(without_MH, weight_VH, target_M),
            logit_with=label_logits(with_MH, weight_VH, target_M),
            logit_without=label_logits(without_MH, weight_VH, target_M),
        )
        got = official_token_weights(
            relevance_M, position_M, supervised_M, len(supervised_P), minimum=minimum, maximum=maximum
        )
        got_loss = official_mean(*weighted_nll(logp_M[supervised_M], got))
        got_loss.backward()
        assert ours.grad is not None
        assert full.grad is not None
        pairs = ((got, weights[supervised_P]), (got_loss.detach(), loss.detach()), (ours.grad, full.grad))
        worst = max(worst, *(float((value.double() - reference).abs().max()) for value, reference in pairs))
    print(f"official {kind} {dtype}: maximal difference {worst:.1e}")
    assert worst < (1e-13 if dtype == torch.float64 else 5e-6)


@settings(deadline=None)
@given(
    flags=st.lists(st.booleans(), min_size=1, max_size=40), window=st.sampled_from([1, 3, 5]), seed=st.integers(0, 99)
)
def test_official_needed_positions_are_enough(flags: list[bool], window: int, seed: int) -> None:
    """What is not in official_positions cannot matter; what is, is not more than needed."""
    supervised_P = torch.tensor(flags)
    position_M = official_positions(supervised_P, window=window)
    near = [p for p in range(len(flags)) if any(flags[max(p - window // 2, 0) : p + window // 2 + 1])]
    assert position_M.tolist() == near
    everywhere_P = torch.rand(len(flags), generator=torch.Generator().manual_seed(seed))
    options = {"minimum": 0.05, "maximum": 0.5, "window": window}
    part = official_token_weights(everywhere_P[position_M], position_M, supervised_P[position_M], len(flags), **options)
    whole = official_token_weights(everywhere_P, torch.arange(len(flags)), supervised_P, len(flags), **options)
    assert torch.equal(part, whole)


def test_official_crosses_samples_and_takes_in_unsupervised_neighbours() -> None:
    """Two rows of three shifted positions: the end of the first is the neighbour of the second's start."""
    position = torch.arange(6)
    supervised = torch.tensor([False, True, True, True, False, False])
    values = torch.tensor([0.3, 0.1, 0.2, 0.5, 0.4, 0.4])
    got = official_token_weights(values, position, supervised, 6, minimum=0.05, maximum=0.5)
    torch.testing.assert_close(got, torch.tensor([0.6 / 3, 0.8 / 3, 1.1 / 3]))


def test_official_takes_what_was_not_evaluated_as_minimum() -> None:
    position = torch.tensor([0, 1, 2])
    values = torch.tensor([NAN, 0.5, NAN], requires_grad=True)
    supervised = torch.tensor([False, True, False])
    got = official_token_weights(values, position, supervised, 9, minimum=0.05, maximum=0.5)
    torch.testing.assert_close(got, torch.tensor([0.2]))
    assert not got.requires_grad
    alone = official_token_weights(values[1:2], position[1:2], supervised[1:2], 9, minimum=0.05, maximum=0.5)
    assert torch.equal(alone, got)


def test_official_without_supervision() -> None:
    position = official_positions(torch.zeros(5, dtype=torch.bool))
    assert position.shape == (0,)
    nothing = torch.zeros(0)
    assert official_token_weights(nothing, position, nothing.bool(), 5, minimum=0.05, maximum=0.5).shape == (0,)
    assert official_positions(torch.zeros(0, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum": 0.5, "maximum": 0.05}, "minimum 0.5, maximum 0.05"),
        ({"minimum": -0.1, "maximum": 0.5}, "0 <= minimum"),
        ({"minimum": 0.0, "maximum": NAN}, "maximum nan"),
        ({"minimum": 0.0, "maximum": 0.5, "window": 2}, "window is 2"),
        ({"minimum": 0.0, "maximum": 0.5, "window": 0}, "window is 0"),
    ],
)
def test_wrong_settings(options: dict[str, float], message: str) -> None:
    ids = torch.zeros(3).long()
    with pytest.raises(UserError, match=message):
        token_weights(torch.rand(3), ids, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        official_token_weights(torch.rand(3), ids, ids.bool(), 3, **options)  # type: ignore[arg-type]


def test_wrong_shapes() -> None:
    with pytest.raises(UserError, match=r"relevance is \(3,\), segment_ids \(2,\)"):
        token_weights(torch.rand(3), torch.zeros(2).long(), minimum=0.0, maximum=1.0)
    with pytest.raises(UserError, match=r"position \(2,\)"):
        official_token_weights(torch.rand(3), torch.zeros(2).long(), torch.ones(3).bool(), 3, minimum=0.0, maximum=1.0)
    with pytest.raises(UserError, match=r"expected bool \[P\]"):
        official_positions(torch.zeros(3))
