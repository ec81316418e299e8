"""How well a number per token finds the tokens that are known to be visual."""

from __future__ import annotations

import torch
from torch import Tensor


def roc_auc(score: Tensor, positive: Tensor) -> float | None:
    """Probability that a positive's score is above a negative's, ties counted half (area under the ROC curve).

    Args:
        score: [N], without NaN, which are the caller's to leave out.
        positive: bool [N].

    Returns:
        None where there is no positive or no negative.
    """
    assert not bool(score.isnan().any())
    positives, negatives = score[positive], score[~positive].sort().values
    if not len(positives) or not len(negatives):
        return None
    below = torch.searchsorted(negatives, positives, right=False)
    not_above = torch.searchsorted(negatives, positives, right=True)
    return float((below + not_above).double().mean() / (2 * len(negatives)))
