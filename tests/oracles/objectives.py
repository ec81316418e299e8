"""Naive float64 transcriptions of the method's formulas: the oracle of src/dpa/objectives. Slow and plain on purpose.

Legend: N supervised tokens, B samples, L padded length, V vocabulary, H hidden size, P = B * (L - 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position without supervision, as LLaVA's data code writes it."""


def logits(hidden_NH: Tensor, weight_VH: Tensor, softcap: float | None = None) -> Tensor:
    raw = hidden_NH.double() @ weight_VH.double().T
    return raw if softcap is None else softcap * torch.tanh(raw / softcap)


def label_logprobs(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, softcap: float | None = None) -> Tensor:
    logp_NV = torch.log_softmax(logits(hidden_NH, weight_VH, softcap), dim=-1)
    return logp_NV[torch.arange(len(labels_N)), labels_N]


def token_weights(
    relevance: list[float], segment_ids: list[int], minimum: float, maximum: float, window: int
) -> list[float]:
    """Token by token: the runs, then each token's known neighbours."""
    runs: list[list[int]] = []
    for i, segment in enumerate(segment_ids):
        if i > 0 and segment == segment_ids[i - 1]:
            runs[-1].append(i)
        else:
            runs.append([i])
    clamped = [value if math.isnan(value) else min(max(value, minimum), maximum) for value in relevance]
    weights = [math.nan] * len(relevance)
    for run in runs:
        known_of_run = [clamped[i] for i in run if not math.isnan(clamped[i])]
        for i in run:
            near = [j for j in run if abs(j - i) <= window // 2]
            known = [clamped[j] for j in near if not math.isnan(clamped[j])]
            if known:
                weights[i] = sum(known) / len(known)
            elif known_of_run:
                weights[i] = sum(known_of_run) / len(known_of_run)
            else:
                weights[i] = (minimum + maximum) / 2
    return weights


def official_loss(
    logits_with: Tensor, logits_without: Tensor, labels: Tensor, *, kind: str, minimum: float, maximum: float
) -> tuple[Tensor, Tensor]:
    """(loss, weights [P]) as the reference defines them, with every logit of every position at hand.

    logits_with, logits_without: [B, L, V]; labels: [B, L], IGNORED where there is no supervision.
    """
    vocabulary = logits_with.shape[-1]
    flat_with = logits_with[:, :-1].reshape(-1, vocabulary).double()
    flat_without = logits_without[:, :-1].reshape(-1, vocabulary).double()
    targets = labels[:, 1:].reshape(-1)
    weights = official_weights(flat_with, flat_without, targets, kind=kind, minimum=minimum, maximum=maximum)
    numerator, denominator = 0 * flat_with.sum(), 1e-6
    for p, target in enumerate(targets.tolist()):
        if target != IGNORED:
            numerator = numerator - weights[p] * torch.log_softmax(flat_with[p], dim=-1)[target]
            denominator += float(weights[p])
    return numerator / denominator, weights


def official_weights(
    flat_with: Tensor, flat_without: Tensor, targets: Tensor, *, kind: str, minimum: float, maximum: float
) -> Tensor:
    difference = []
    for row_with, row_without, target in zip(flat_with.detach(), flat_without.detach(), targets.tolist(), strict=True):
        read_as = 0 if target == IGNORED else target
        if kind == "cmo":
            row_with, row_without = torch.softmax(row_with, dim=-1), torch.softmax(row_without, dim=-1)
        difference.append(float(row_with[read_as] - row_without[read_as]))
    clamped = [min(max(value, minimum), maximum) for value in difference]
    pooled = []
    for p in range(len(clamped)):
        around = clamped[max(p - 1, 0) : p + 2]
        pooled.append(sum(around) / len(around))
    return torch.tensor(pooled, dtype=torch.float64)
