"""The text-only pass: an LLM over some positions of a batch, without gradient, without the image's tokens.

What a text token's residual stream holds depends on the tokens that it sees and on *distances* between position ids
(RoPE). So dropping tokens that nobody sees and keeping the others' position ids gives the numbers of the full-length
pass with the image masked out, at a fraction of the cost (method.md, row "text-only pass").

A label is read at the position before it. Where that is a placeholder (the label follows an image), ``exact`` fidelity
wants p(label | preceding text), which the last text token before the image predicts; it does so from its own position
id, as it would if the label stood right after it. Where no text precedes, a document-start token alone predicts it.
That token stands for a sample of its own: the sample's other tokens must not see what is not there in training.

Legend: B samples, L padded length, N supervised tokens (n: those with a text-only prediction), R rows of the pass, K
slots per row (padded to the right), D document starts, E = B + D, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpa.models.attention import attention_arguments, check_length, packed_row_length
from dpa.models.rows import Rows, arrange
from dpa.models.vlm import decoder, head
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


def decode(
    body: Any, embeds_RKH: Tensor, visible_RK: Tensor, position_RK: Tensor, *, span: int, rows: Rows | None = None
) -> Tensor:
    """Last hidden states [R, K, H] of a pass in which position q sees the visible keys k <= q of its sample.

    ``span``: length of the original sequences at most, for sliding windows. Errors: see ``attention_arguments``.
    """
    arguments = attention_arguments(body.config, embeds_RKH, visible_RK, position_RK, span=span, rows=rows)
    output = body(inputs_embeds=embeds_RKH, position_ids=position_RK, use_cache=False, **arguments)
    hidden_RKH: Tensor = output.last_hidden_state
    return hidden_RKH


def text_only_logprobs(
    llm: nn.Module,
    batch: Batch,
    *,
    text_positions: TextPositions = "original",
    logits: bool = False,
    all_samples: bool = False,
    packing: bool = False,
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
        packing: several samples in a row of the pass; the same numbers within rounding, less padding.

    Raises:
        ModelError: an attention layer that cannot leave tokens out, or flash-attention with a window that is too short.
    """
    check_length(decoder(llm).config, batch.input_ids.shape[1])
    sample_N, label_N = batch.supervised.nonzero(as_tuple=True)
    asked_N = torch.ones_like(sample_N, dtype=torch.bool) if all_samples else batch.has_image[sample_N]
    row_length = packed_row_length(decoder(llm).config) if packing else None
    reading = _plan(batch, sample_N, label_N, asked_N, text_positions, row_length)
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
    """Where each label is read. Document starts follow the batch's samples as samples of one token."""

    rows: Rows
    """Of E samples."""
    start_position: Tensor
    """int64 [D]: position ids of the document starts that are needed."""
    known: Tensor
    """bool [N]: the n that have a text-only prediction."""
    row: Tensor
    """int64 [n]."""
    slot: Tensor
    """int64 [n]."""


def _plan(
    batch: Batch,
    sample_N: Tensor,
    label_N: Tensor,
    asked_N: Tensor,
    text_positions: TextPositions,
    row_length: int | None,
) -> _Reading:
    """Sources of the labels at (sample, label): the last text position before each, or a document start."""
    text_BL = is_text(batch)
    column_L = torch.arange(text_BL.shape[1], device=text_BL.device)
    last_text_BL = column_L.where(text_BL, -1).cummax(dim=1).values
    source_N = last_text_BL[sample_N, label_N - 1]
    from_text_N = asked_N & (source_N >= 0)
    from_start_N = asked_N & (source_N < 0) & (batch.document_start_id is not None)

    needed_BL = torch.zeros_like(text_BL)
    needed_BL[sample_N[from_text_N], source_N[from_text_N]] = True
    # A lone token's distance to itself is 0 at any position id; it is kept all the same, for LLMs without RoPE.
    start_N = label_N - 1 if text_positions == "original" else torch.zeros_like(label_N)
    start_position_D, start_n = torch.unique(start_N[from_start_N], return_inverse=True)
    start_DL = torch.zeros((len(start_position_D), text_BL.shape[1]), dtype=torch.bool, device=text_BL.device)
    start_DL[:, :1] = True
    rows = arrange(torch.cat([text_BL & up_to_last(needed_BL), start_DL]), row_length)

    reader_N, column_N = sample_N.clone(), source_N.clamp(min=0)
    reader_N[from_start_N] = len(text_BL) + start_n
    known_N = from_text_N | from_start_N
    row_n, slot_n = rows.places(reader_N[known_N], column_N[known_N])
    return _Reading(rows, start_position_D, known_N, row_n, slot_n)


def _text_hidden(llm: Any, batch: Batch, reading: _Reading, text_positions: TextPositions) -> Tensor:
    """Hidden states [R, K, H] of the kept text and the document starts."""
    rows = reading.rows
    ids_EL, position_EL = batch.input_ids, batch.position_ids
    if len(reading.start_position) > 0:
        assert batch.document_start_id is not None
        shape_DL = (len(reading.start_position), batch.input_ids.shape[1])
        ids_EL = torch.cat([ids_EL, ids_EL.new_full(shape_DL, batch.document_start_id)])
        position_EL = torch.cat([position_EL, reading.start_position.unsqueeze(1).expand(shape_DL)])
    position_RK = rows.take(position_EL) if text_positions == "original" else rows.numbered()
    # Renumbered positions leave no gap, so that transformers' own windows count right.
    span = batch.input_ids.shape[1] if text_positions == "original" else 0
    embeds_RKH = llm.get_input_embeddings()(rows.take(ids_EL))
    return decode(decoder(llm), embeds_RKH, rows.filled, position_RK, span=span, rows=rows)
