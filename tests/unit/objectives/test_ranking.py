"""ROC-AUC against its definition, pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch

from dpa.objectives import roc_auc


def test_area_is_the_share_of_pairs_in_order() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randint(5, (12,), generator=draw).double()  # many ties
        positive = torch.rand(12, generator=draw) < 0.4
        pairs = list(itertools.product(scores[positive].tolist(), scores[~positive].tolist()))
        if not pairs:
            assert roc_auc(scores, positive) is None
            continue
        expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
        assert roc_auc(scores, positive) == pytest.approx(expected)
    assert roc_auc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])) is None
    assert roc_auc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) is None
