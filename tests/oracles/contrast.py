"""The two full-length passes with every logit at hand, over a naive float64 attention: oracle of dpa.models.contrast.

Slow and plain on purpose; shares no line with the product but the model's own layers.
Legend: B samples, L padded length, V vocabulary, H hidden size, A heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import sdpa_mask

from dpa.types import Batch
from tests.oracles.objectives import IGNORED

NAME = "literal_float64"


def literal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """A row that may see nothing gets zeros, as sdpa and flash-attention give it. [B, A, L, D] -> [B, L, A, D]."""
    groups = query.shape[1] // key.shape[1]
    key_BALD, value_BALD = key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    score_BALL = query.double() @ key_BALD.transpose(2, 3) * scaling
    if softcap is not None:
        score_BALL = softcap * torch.tanh(score_BALL / softcap)
    share_BALL = torch.softmax(score_BALL.masked_fill(~attention_mask, -torch.inf), dim=-1)
    share_BALL = share_BALL.masked_fill(~attention_mask.any(-1, keepdim=True), 0)
    return (share_BALL @ value_BALD).to(query.dtype).transpose(1, 2).contiguous(), None


def always_a_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def with_literal_attention(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    AttentionInterface.register(NAME, literal_attention)
    AttentionMaskInterface.register(NAME, always_a_mask)
    decoder = model.get_decoder()
    decoder.config._attn_implementation = NAME
    return model


def full_logits(
    model: LlavaForConditionalGeneration, batch: Batch, keys_BL: Tensor, *, softcap: bool, pad_with_zeros: bool = False
) -> Tensor:
    """float64 [B, L, V] of the full-length pass in which only ``keys_BL`` are seen, the image's features in place."""
    embeds_BLH = model.get_input_embeddings()(batch.input_ids)
    if batch.pixel_values is not None:
        output = model.model.get_image_features(pixel_values=batch.pixel_values, return_dict=True)
        features = torch.cat(list(output.pooler_output))
        embeds_BLH = embeds_BLH.masked_scatter(batch.is_image.unsqueeze(-1), features)
    if pad_with_zeros:
        embeds_BLH = embeds_BLH * batch.attention_mask.unsqueeze(-1)
    output = model.get_decoder()(
        inputs_embeds=embeds_BLH, attention_mask=keys_BL.long(), position_ids=batch.position_ids, use_cache=False
    )
    logits_BLV = output.last_hidden_state.double() @ model.lm_head.weight.double().T
    config = model.config.text_config
    if softcap and config.model_type == "gemma2":
        cap = config.final_logit_softcapping
        logits_BLV = cap * torch.tanh(logits_BLV / cap)
    return logits_BLV


def at_labels(batch: Batch, logits_BLV: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """[N]: ``function`` of the logits at t - 1, read at the label t."""
    values_BLV = function(logits_BLV)
    rows = []
    for sample, position in batch.supervised.nonzero().tolist():
        rows.append(values_BLV[sample, position - 1, batch.input_ids[sample, position]])
    return torch.stack(rows)


def log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def follows_text(batch: Batch) -> Tensor:
    """bool [N]: the position before the label is text."""
    sample_N, label_N = batch.supervised.nonzero(as_tuple=True)
    return ~batch.is_image[sample_N, label_N - 1]


def in_image_samples(batch: Batch) -> Tensor:
    """bool [N]."""
    return batch.is_image.any(1)[batch.supervised.nonzero(as_tuple=True)[0]]


def labels_for_reference(batch: Batch) -> Tensor:
    """int64 [B, L] as LLaVA's data code writes them."""
    return batch.input_ids.where(batch.supervised, IGNORED)


def reference_logits(model: LlavaForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """(with, without) as the reference computes them: full length, image keys masked, no final soft-cap, padding zero.

    At padding flash-attention adds nothing, in either pass, so zeros stay zeros there; kernels that attend from padding
    are brought to that here.
    """
    real = batch.attention_mask.bool()
    both = []
    for keys in (real, real & ~batch.is_image):
        logits = full_logits(model, batch, keys, softcap=False, pad_with_zeros=True)
        both.append(logits.masked_fill(~real.unsqueeze(-1), 0))
    return both[0], both[1]


@torch.no_grad()
def with_likely_labels(model: LlavaForConditionalGeneration, batch: Batch) -> Batch:
    """The batch with the labels that the model itself finds likeliest about its images: p with image is far from 0."""
    ids_BL = batch.input_ids.clone()
    for position in batch.supervised.any(0).nonzero().flatten().tolist():
        logits_BLV = full_logits(model, replace(batch, input_ids=ids_BL), batch.attention_mask, softcap=True)
        likeliest_B = logits_BLV[:, position - 1, : model.config.image_token_index].argmax(-1)
        ids_BL[:, position] = likeliest_B.where(batch.supervised[:, position], ids_BL[:, position])
    return replace(batch, input_ids=ids_BL)


def identity(logits: Tensor) -> Tensor:
    return logits
