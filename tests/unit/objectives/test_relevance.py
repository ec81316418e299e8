"""relevance: each formula, NaN, errors, and the table of objectives."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from dpa.errors import UserError
from dpa.objectives import OBJECTIVES, objective, relevance
from dpa.train.settings import ObjectiveName


def logprobs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logp_with, logp_without = -5 * torch.rand(2, 30, generator=draw)
    logit_with, logit_without = 8 * torch.randn(2, 30, generator=draw)
    return logp_with, logp_without, logit_with, logit_without


def test_formulas() -> None:
    logp_with, logp_without, logit_with, logit_without = logprobs()
    marked = torch.tensor([0.0, 1.0, 1.0]).repeat(10)
    more = {"logit_with": logit_with, "logit_without": logit_without, "marked": marked}
    p_with, p_without = logp_with.double().exp(), logp_without.double().exp()
    expected = {
        "uniform": torch.ones(30).double(),
        "cmo": p_with - p_without,
        "cal": logit_with.double() - logit_without.double(),
        "prior": 1 - p_without,
        "spans": marked.double(),
    }
    assert expected.keys() == OBJECTIVES.keys()
    for kind, reference in expected.items():
        got = relevance(kind, logp_with, logp_without, **more)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), reference, rtol=1e-6, atol=1e-6)


def test_result_is_detached_and_float64_stays() -> None:
    logp_with, logp_without, logit_with, logit_without = (value.double().requires_grad_() for value in logprobs())
    for kind in OBJECTIVES:
        got = relevance(
            kind, logp_with, logp_without, logit_with=logit_with, logit_without=logit_without, marked=logp_with
        )
        assert not got.requires_grad
        assert got.dtype == torch.float64


@pytest.mark.parametrize("kind", ["cmo", "cal", "prior"])
def test_unknown_stays_unknown(kind: str) -> None:
    logp_with, logp_without, logit_with, logit_without = logprobs()
    logp_without[[3, 7]] = torch.nan
    got = relevance(kind, logp_with, logp_without, logit_with=logit_with, logit_without=logit_without)
    assert got.isnan().nonzero().flatten().tolist() == [3, 7]
    assert relevance("spans", logp_with, None, marked=logp_without).isnan().nonzero().flatten().tolist() == [3, 7]


def test_uniform_needs_no_second_pass() -> None:
    logp_with = logprobs()[0]
    assert relevance("uniform", logp_with, None).tolist() == [1.0] * 30
    assert relevance("uniform", logp_with, torch.full((30,), torch.nan)).tolist() == [1.0] * 30


def test_empty() -> None:
    assert relevance("cmo", torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_table() -> None:
    assert set(get_args(ObjectiveName)) == set(OBJECTIVES)  # the recipe's names are the objectives' names
    for name, row in OBJECTIVES.items():
        assert row.name == name
        assert row is objective(name)
        assert 0 <= row.minimum <= row.maximum
    bounds = {name: (row.minimum, row.maximum) for name, row in OBJECTIVES.items()}
    assert bounds == {"uniform": (1, 1), "cmo": (0.05, 0.5), "cal": (1, 5), "prior": (0, 1), "spans": (0.05, 1)}
    windows = {name: row.window for name, row in OBJECTIVES.items()}
    assert windows == {"uniform": 1, "cmo": 3, "cal": 3, "prior": 1, "spans": 1}
    assert [name for name, row in OBJECTIVES.items() if row.needs_without] == ["cmo", "cal", "prior"]
    assert [name for name, row in OBJECTIVES.items() if row.needs_logits] == ["cal"]
    assert [name for name, row in OBJECTIVES.items() if row.frozen_reference] == ["prior"]
    assert [name for name, row in OBJECTIVES.items() if row.needs_marks] == ["spans"]


def test_errors() -> None:
    logp_with, logp_without, logit_with, _ = logprobs()
    with pytest.raises(UserError, match="unknown objective 'cmmo'; there are cal, cmo, prior, spans, uniform"):
        relevance("cmmo", logp_with, logp_without)
    with pytest.raises(UserError, match="needs logp_without"):
        relevance("prior", logp_with, None)
    with pytest.raises(UserError, match="needs marked"):
        relevance("spans", logp_with, logp_without)
    with pytest.raises(UserError, match="needs logit_without"):
        relevance("cal", logp_with, logp_without, logit_with=logit_with)
    with pytest.raises(UserError, match=r"logp_without is \(29,\), logp_with \(30,\)"):
        relevance("cmo", logp_with, logp_without[1:])
