"""The method: pure functions of tensors. No model, no data, no I/O."""

from dpa.objectives.logprob import label_logits, label_logprobs
from dpa.objectives.loss import OFFICIAL_EPSILON, official_mean, weight_health, weight_stats, weighted_nll
from dpa.objectives.ranking import roc_auc
from dpa.objectives.relevance import OBJECTIVES, Objective, objective, relevance
from dpa.objectives.weights import (
    TextOnlyPolicy,
    official_positions,
    official_token_weights,
    text_only_weight,
    token_weights,
)

__all__ = [
    "OBJECTIVES",
    "OFFICIAL_EPSILON",
    "Objective",
    "TextOnlyPolicy",
    "label_logits",
    "label_logprobs",
    "objective",
    "official_mean",
    "official_positions",
    "official_token_weights",
    "relevance",
    "roc_auc",
    "text_only_weight",
    "token_weights",
    "weight_health",
    "weight_stats",
    "weighted_nll",
]
