"""The text-only pass: an LLM over some positions of a batch, without gradient, without the image's tokens.

What a text token's residual stream holds depends on the tokens that it sees and on *distances* between position ids
(RoPE). So dropping tokens that nobody sees and keeping the others' position ids gives the numbers of the full-length
pass with the image masked out, at a fraction of the cost (method.md, row "text-only pass").

A label is read at the position before it. Where that is a placeholder (the label follows an image), ``exact`` fidelity
wants p(label | preceding text), which the last text token before the image predicts; it does so from its own position
id, as it would if the label stood right after it. Where no text precedes, a document-start token alone predicts it.
That token gets a row of its own: the sample's other tokens must not see what is not there in training.

Legend: B samples, L padded length, N supervised tokens (n: those with a text-only prediction), R rows of the pass, K
kept positions per row (padded to the right), D document-start rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpa.models.attention import attention_arguments
from dpa.models.vlm import head
from dpa.objectives import label_logits, label_logprobs
from dpa.types import Batch

TextPositions = Literal["original", "contiguous"]


@dataclass(frozen=True, slots=True)
class TextOnly:
    """What an LLM says about a batch's labels from their preceding text alone, without graph; N as in ``Contrast``."""

    logp: Tensor
    """float32 [N] (float64 for a float64 LLM), nats; NaN where there is no text-only prediction or none was wanted."""
    logit: Tensor | None
    """[N], the labels' raw logits; NaN as in ``logp``; None unless asked for."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which positions of a batch take part in a pass, moved together to the left. Samples without any have no row."""

    sample: Tensor
    """int64 [R]: the sample of a row."""
    column: Tensor
    """int64 [R, K]: the column of the batch that a slot shows; 0 at padding."""
    filled: Tensor
    """bool [R, K]: False at padding."""
    row: Tensor
    """int64 [B]: the row of a sample that has one."""
    slot: Tensor
    """int64 [B, L]: the slot of a position that was kept."""

    def take(self, values_BL: Tensor, padding: int | bool = 0) -> Tensor:
        """[B, L] -> [R, K]."""
        return values_BL[self.sample.unsqueeze(1), self.column].masked_fill(~self.filled, padding)


def keep(keep_BL: Tensor) -> Kept:
    """Moves the True positions of a bool [B, L] together. Waits for the device (shapes depend on values)."""
    has_row_B = keep_BL.any(dim=1)
    sample_R = has_row_B.nonzero().squeeze(1)
    kept_RL = keep_BL[sample_R]
    count_R1 = kept_RL.sum(dim=1, keepdim=True)
    width = int(count_R1.max()) if len(sample_R) else 0
    column_RK = torch.argsort((~kept_RL).to(torch.uint8), dim=1, stable=True)[:, :width]
    filled_RK = torch.arange(width, device=keep_BL.device) < count_R1
    return Kept(
        sample=sample_R,
        column=column_RK.masked_fill(~filled_RK, 0),
        filled=filled_RK,
        row=has_row_B.cumsum(dim=0) - 1,
        slot=keep_BL.cumsum(dim=1) - 1,
    )


def is_text(batch: Batch) -> Tensor:
    """bool [B, L]: real tokens that are no placeholders."""
    return batch.attention_mask.bool() & ~batch.is_image


def up_to_last(needed_BL: Tensor) -> Tensor:
    """bool [B, L]: True up to the last True of each row; what follows it cannot matter (causality)."""
    return needed_BL.flip(1).cumsum(dim=1).flip(1) > 0


@contextmanager
def without_gradient(model: nn.Module) -> Iterator[None]:
    """No graph, no dropout, no gradient checkpointing (which in train mode wraps passes without gradient, too).

    Training flags are put back as they were, module by module.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def decode(decoder: Any, embeds_RKH: Tensor, visible_RK: Tensor, position_RK: Tensor, *, span: int) -> Tensor:
    """Last hidden states [R, K, H] of a pass in which position q sees the visible keys k <= q of its row.

    ``span``: length of the original sequences at most, for sliding windows. Errors: see ``attention_arguments``.
    """
    arguments = attention_arguments(decoder.config, embeds_RKH, visible_RK, position_RK, span=span)
    output = decoder(inputs_embeds=embeds_RKH, position_ids=position_RK, use_cache=False, **arguments)
    hidden_RKH: Tensor = output.last_hidden_state
    return hidden_RKH


def text_only_logprobs(
    llm: nn.Module,
    batch: Batch,
    *,
    text_positions: TextPositions = "original",
    logits: bool = False,
    all_samples: bool = False,
) -> TextOnly:
    """Log-probability of each label given its preceding text alone, under any causal LM or LLaVA model.

    Equal (within rounding) to the full-length pass with the image's keys masked out, for every label whose preceding
    position is text. For a label that follows an image: p(label | text before the image); if there is none,
    p(label | document start); if the family has no such token, unknown (NaN).

    Args:
        llm: has the batch's vocabulary but for the image's id, which it is never shown. Training flags are left alone.
        text_positions: ``original`` keeps the position ids that tokens have with the image in place; ``contiguous``
            renumbers them as if there were none. They differ only where text precedes the image.
        logits: also the labels' raw logits (CAL).
        all_samples: score samples without image, too (their numbers are those of the pass with image). By default they
            are left out and get NaN: there is nothing to contrast.

    Raises:
        ModelError: an attention layer that cannot leave tokens out, or flash-attention with a window that is too short.
    """
    sample_N, label_N = batch.supervised.nonzero(as_tuple=True)
    asked_N = torch.ones_like(sample_N, dtype=torch.bool) if all_samples else batch.has_image[sample_N]
    reading = _plan(batch, sample_N, label_N, asked_N, text_positions)
    with without_gradient(llm):
        weight_VH, softcap = head(llm)
        dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        logp_N = torch.full(sample_N.shape, torch.nan, dtype=dtype, device=sample_N.device)
        logit_N = logp_N.clone() if logits else None
        known_N = reading.known
        if len(reading.row) == 0:
            return TextOnly(logp_N, logit_N)
        hidden_nH = _text_hidden(llm, batch, reading, text_positions)[reading.row, reading.slot]
        target_n = batch.input_ids[sample_N[known_N], label_N[known_N]]
        logp_N[known_N] = label_logprobs(hidden_nH, weight_VH, target_n, softcap=softcap).to(dtype)
        if logit_N is not None:
            logit_N[known_N] = label_logits(hidden_nH, weight_VH, target_n, softcap=softcap).to(dtype)
    return TextOnly(logp_N, logit_N)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where each label is read."""

    kept: Kept
    start_position: Tensor
    """int64 [D]: position ids of the document starts that are needed, one row each, after the rows of ``kept``."""
    known: Tensor
    """bool [N]: the n that have a text-only prediction."""
    row: Tensor
    """int64 [n]."""
    slot: Tensor
    """int64 [n]."""


def _plan(batch: Batch, sample_N: Tensor, label_N: Tensor, asked_N: Tensor, text_positions: TextPositions) -> _Reading:
    """Sources of the labels at (sample, label): the last text position before each, or a document start."""
    text_BL = is_text(batch)
    column_L = torch.arange(text_BL.shape[1], device=text_BL.device)
    last_text_BL = column_L.where(text_BL, -1).cummax(dim=1).values
    source_N = last_text_BL[sample_N, label_N - 1]
    from_text_N = asked_N & (source_N >= 0)
    from_start_N = asked_N & (source_N < 0) & (batch.document_start_id is not None)

    needed_BL = torch.zeros_like(text_BL)
    needed_BL[sample_N[from_text_N], source_N[from_text_N]] = True
    kept = keep(text_BL & up_to_last(needed_BL))
    # A lone token's distance to itself is 0 at any position id; it is kept all the same, for LLMs without RoPE.
    start_N = label_N - 1 if text_positions == "original" else torch.zeros_like(label_N)
    start_position_D, start_row_s = torch.unique(start_N[from_start_N], return_inverse=True)

    row_N, slot_N = kept.row[sample_N], kept.slot[sample_N, source_N.clamp(min=0)]
    row_N[from_start_N] = len(kept.sample) + start_row_s
    slot_N[from_start_N] = 0
    known_N = from_text_N | from_start_N
    return _Reading(kept, start_position_D, known_N, row_N[known_N], slot_N[known_N])


def _text_hidden(llm: Any, batch: Batch, reading: _Reading, text_positions: TextPositions) -> Tensor:
    """Hidden states [R + D, max(K, 1), H]: the kept text, then one row per position of a document start."""
    kept = reading.kept
    ids_RK, visible_RK, position_RK = kept.take(batch.input_ids), kept.filled, kept.take(batch.position_ids)
    if text_positions == "contiguous":
        slot_K = torch.arange(visible_RK.shape[1], device=visible_RK.device)
        position_RK = slot_K.expand_as(visible_RK).masked_fill(~visible_RK, 0)
    if len(reading.start_position) > 0:
        assert batch.document_start_id is not None
        start_D1 = torch.full_like(reading.start_position, batch.document_start_id).unsqueeze(1)
        ids_RK = _stack(ids_RK, start_D1)
        visible_RK = _stack(visible_RK, torch.ones_like(start_D1, dtype=torch.bool))
        position_RK = _stack(position_RK, reading.start_position.unsqueeze(1))
    # Renumbered positions leave no gap, so that transformers' own windows count right.
    span = batch.input_ids.shape[1] if text_positions == "original" else 0
    embeds_RKH = llm.get_input_embeddings()(ids_RK)
    return decode(llm.get_decoder(), embeds_RKH, visible_RK, position_RK, span=span)


def _stack(rows_RK: Tensor, rows_D1: Tensor) -> Tensor:
    """[R, K] over [D, 1] -> [R + D, max(K, 1)], zeros where the one is shorter."""
    width = max(rows_RK.shape[1], 1)
    pad = nn.functional.pad
    return torch.cat([pad(rows_RK, (0, width - rows_RK.shape[1])), pad(rows_D1, (0, width - 1))])
