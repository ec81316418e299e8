"""One batch -> log-probability of each label with its image and without: the contrastive forward, for all families.

Both passes are the same LLM as it is now; only the pass with image carries a graph. The pass without comes first, so
that its activations are gone before the graph's are made. Nothing of size (tokens x vocabulary) is made: hidden states
are gathered at the predicting positions (t - 1) of supervised tokens before the head.

Legend: B samples, L padded length, N supervised tokens, M positions that the official variant reads (m: those where its
passes differ), S = B * (L - 1) positions of the flattened, shifted batch, I images, P rows per image, R rows and K
slots per row of the pass without image, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dpa.errors import UserError
from dpa.models.attention import nothing_seen_is_nothing_added, packed_row_length
from dpa.models.rows import arrange
from dpa.models.text_pass import (
    TextOnly,
    TextPositions,
    decode,
    is_text,
    text_only_logprobs,
    up_to_last,
    without_gradient,
)
from dpa.models.vlm import batch_features, decoder, head, hidden_states
from dpa.objectives import label_logits, label_logprobs, official_positions
from dpa.types import Batch

Fidelity = Literal["exact", "official"]


@dataclass(frozen=True, slots=True)
class OfficialContrast:
    """What the reference's smoothing reads: supervised positions and their neighbours in the flattened batch.

    All detached. At unsupervised neighbours they are those of token id 0, as the reference reads its ignored labels.
    """

    positions: Tensor
    """int64 [M], ascending, in the flattened, shifted batch of ``total`` positions (``official_positions``)."""
    total: int
    """S = B * (L - 1)."""
    supervised: Tensor
    """bool [M]; the True ones are the N supervised tokens, in their order."""
    logp_with: Tensor
    """float32 [M]."""
    logp_without: Tensor | None
    """float32 [M]; equal to ``logp_with`` for samples without image."""
    logit_with: Tensor | None
    """float32 [M]."""
    logit_without: Tensor | None
    """float32 [M]."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """Labels' log-probabilities with and without image. N is row-major over (sample, position) of ``batch.supervised``.

    float32; float64 for a float64 model.
    """

    logp_with: Tensor
    """[N] nats; carries the graph."""
    logp_without: Tensor | None
    """[N] nats, detached. NaN: not known, because the sample has no image (nothing is contrasted; ``exact``) or because
    nothing at all precedes the label once the image is gone. None: not asked for."""
    logit_with: Tensor | None
    """[N], detached raw logits of the labels (CAL); None: not asked for."""
    logit_without: Tensor | None
    """[N], detached; NaN as in ``logp_without``."""
    labels: Tensor
    """int64 [N]."""
    segment_ids: Tensor
    """int64 [N]: 0, 0, 1 ...; one per contiguous supervised run of one sample."""
    sample_index: Tensor
    """int64 [N]: the token's sample, a row of the batch."""
    has_image: Tensor
    """bool [N]: the token's sample has an image."""
    official: OfficialContrast | None
    """Only with ``fidelity="official"``."""


def contrast(
    model: nn.Module,
    batch: Batch,
    *,
    fidelity: Fidelity = "exact",
    text_positions: TextPositions = "original",
    without: bool = True,
    logits: bool = False,
    window: int = 3,
    packing: bool = False,
) -> Contrast:
    """Both passes over one batch (paper, section 3.3; method.md, "Objectives" and the table of deviations).

    Args:
        model: a LLaVA as it is in training, or for batches without images an LLM, with or without an adapter. Training
            flags, checkpointing and hooks are left as they were found.
        fidelity: ``exact``: the text alone, see ``text_only_logprobs``. ``official``: what the reference computes:
            image keys masked out in the full-length sequence, the label after an image read at the image's last
            position, no final soft-cap in either pass (Gemma-2); computed only at the positions that are read.
        text_positions: position ids of the text-only pass (``exact``; ``official`` knows original ones only).
        without: also the pass without image; off for objectives that need none. Where the batch brings its numbers
            (``Batch.logp_without``, of a frozen LLM) they are taken and no pass is made.
        logits: also the labels' raw logits (CAL).
        window: width in tokens of the moving mean that follows; ``official`` must know which neighbours it reads.
        packing: several samples in a row of either pass, so that hardly anything is padded (``models.rows``); the same
            numbers within rounding. ``exact`` only: ``official`` reads the padded batch's neighbours.

    Raises:
        ModelError: see ``text_only_logprobs``.
        UserError: a label outside the vocabulary; an even window; packing with ``official``.
    """
    if fidelity == "official":
        if packing:
            raise UserError("fidelity official reads the padded batch, position by position; leave packing off")
        return _official(model, batch, without=without, logits=logits, window=window)
    text = None
    if without:
        text = _text_only(model, batch, text_positions=text_positions, logits=logits, packing=packing)
    sample_N, label_N = batch.supervised.nonzero(as_tuple=True)
    labels_N = batch.input_ids[sample_N, label_N]
    rows = arrange(batch.attention_mask.bool(), packed_row_length(decoder(model).config) if packing else None)
    hidden_NH = hidden_states(model, batch, rows=rows)[rows.places(sample_N, label_N - 1)]
    weight_VH, softcap = head(model)
    return _assemble(
        batch,
        logp_with=label_logprobs(hidden_NH, weight_VH, labels_N, softcap=softcap),
        logp_without=None if text is None else text.logp,
        logit_with=label_logits(hidden_NH, weight_VH, labels_N, softcap=softcap) if logits else None,
        logit_without=None if text is None else text.logit,
    )


def _text_only(
    model: nn.Module, batch: Batch, *, text_positions: TextPositions, logits: bool, packing: bool
) -> TextOnly:
    if batch.logp_without is None:
        return text_only_logprobs(model, batch, text_positions=text_positions, logits=logits, packing=packing)
    assert batch.logit_without is not None or not logits, "a cache without the logits that the objective reads"
    return TextOnly(batch.logp_without, batch.logit_without)


def _assemble(
    batch: Batch,
    *,
    logp_with: Tensor,
    logp_without: Tensor | None,
    logit_with: Tensor | None,
    logit_without: Tensor | None,
    official: OfficialContrast | None = None,
) -> Contrast:
    sample_N, label_N = batch.supervised.nonzero(as_tuple=True)
    # Position 0 is never supervised, so a run never goes on in the next row.
    start_BL = batch.supervised.clone()
    start_BL[:, 1:] &= ~batch.supervised[:, :-1]
    return Contrast(
        logp_with=logp_with,
        logp_without=logp_without,
        logit_with=logit_with,
        logit_without=logit_without,
        labels=batch.input_ids[sample_N, label_N],
        segment_ids=start_BL.flatten().cumsum(dim=0)[batch.supervised.flatten()] - 1,
        sample_index=sample_N,
        has_image=batch.has_image[sample_N],
        official=official,
    )


def _official(model: Any, batch: Batch, *, without: bool, logits: bool, window: int) -> Contrast:
    """The reference's numbers (fnlp-vision/DPA, ``base_forward`` of its model files) at the positions that it reads."""
    row_length = batch.input_ids.shape[1] - 1
    shifted_S = batch.supervised[:, 1:].flatten()
    position_M = official_positions(shifted_S, window=window)
    sample_M, source_M = position_M.div(row_length, rounding_mode="floor"), position_M % row_length
    supervised_M = shifted_S[position_M]
    target_M = batch.input_ids[sample_M, source_M + 1].where(supervised_M, 0)
    features_IPH = batch_features(model, batch)
    masked = None
    if without and features_IPH is not None:
        masked = _masked_pass(model, batch, features_IPH, sample_M, source_M, target_M, logits=logits)

    hidden_MH = hidden_states(model, batch, features=features_IPH)[sample_M, source_M]
    weight_VH, _ = head(model)
    logp_M = label_logprobs(hidden_MH, weight_VH, target_M)
    read = OfficialContrast(
        positions=position_M,
        total=len(shifted_S),
        supervised=supervised_M,
        logp_with=logp_M.detach(),
        logit_with=label_logits(hidden_MH, weight_VH, target_M) if logits else None,
        logp_without=None,
        logit_without=None,
    )
    if without:
        # Without image both passes are one. So they are at padding: the reference puts zeros there, which its
        # flash-attention leaves alone in either pass.
        logp_without_M = read.logp_with.clone()
        logit_without_M = None if read.logit_with is None else read.logit_with.clone()
        if masked is not None:
            logp_without_M[masked.known] = masked.logp
            if logit_without_M is not None and masked.logit is not None:
                logit_without_M[masked.known] = masked.logit
        read = replace(read, logp_without=logp_without_M, logit_without=logit_without_M)
    return _assemble(
        batch,
        logp_with=logp_M[supervised_M],
        logp_without=None if read.logp_without is None else read.logp_without[supervised_M],
        logit_with=None if read.logit_with is None else read.logit_with[supervised_M],
        logit_without=None if read.logit_without is None else read.logit_without[supervised_M],
        official=read,
    )


@dataclass(frozen=True, slots=True)
class _Masked:
    """What the pass without image keys says."""

    known: Tensor
    """bool [M]: the m that it was asked about: real tokens of samples with image."""
    logp: Tensor
    """[m]."""
    logit: Tensor | None
    """[m]."""


def _masked_pass(
    model: Any,
    batch: Batch,
    features_IPH: Tensor,
    sample_M: Tensor,
    source_M: Tensor,
    target_M: Tensor,
    *,
    logits: bool,
) -> _Masked | None:
    """The full-length pass with image keys masked out, at the positions that are read.

    A position that nobody sees and nobody reads can be left out. So what remains of an image are the rows at which a
    label or a label's neighbour is read, mostly its last two: they see the text before them, or, without any, nothing.
    None where nothing is read in samples with image.
    """
    text_BL = is_text(batch)
    known_M = batch.has_image[sample_M] & batch.attention_mask.bool()[sample_M, source_M]
    needed_BL = torch.zeros_like(text_BL)
    needed_BL[sample_M[known_M], source_M[known_M]] = True
    rows = arrange((text_BL & up_to_last(needed_BL)) | needed_BL)
    if not rows.order:
        return None
    visible_RK, image_RK = rows.take(text_BL, padding=False), rows.take(batch.is_image, padding=False)
    position_RK = rows.take(batch.position_ids)
    ordinal_BL = batch.is_image.flatten().cumsum(dim=0).view_as(batch.is_image) - 1
    body = decoder(model)
    with without_gradient(model), nothing_seen_is_nothing_added(body, visible_RK, position_RK):
        embeds_RKH = model.get_input_embeddings()(rows.take(batch.input_ids))
        patch_H = features_IPH.flatten(0, 1)[rows.take(ordinal_BL)[image_RK]]
        embeds_RKH[image_RK] = patch_H.to(embeds_RKH.dtype)
        hidden_RKH = decode(body, embeds_RKH, visible_RK, position_RK, span=batch.input_ids.shape[1])
        weight_VH, _ = head(model)
        hidden_mH = hidden_RKH[rows.places(sample_M[known_M], source_M[known_M])]
        target_m = target_M[known_M]
        logp_m = label_logprobs(hidden_mH, weight_VH, target_m)
        logit_m = label_logits(hidden_mH, weight_VH, target_m) if logits else None
    return _Masked(known_M, logp_m, logit_m)
