"""What one micro-batch costs in the reference implementation: its steps in its order, in plain transformers calls.

Own transcription of the loss that fnlp-vision/DPA's model files compute (docs/method.md, column "official"): a second
pass over the full length with the image keys masked out, float32 logits of every position in both passes, and softmaxes
over the whole vocabulary from which one number per position is read. Nothing of ours is used, so that its loss also
checks ``fidelity: official``. Run eagerly; the reference's scripts also ask for torch.compile, which fuses elementwise
work but leaves both passes, every matrix product and every tensor below.

Legend: B samples, L length, H hidden, V vocabulary, P = B * (L - 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, cross_entropy

from benchkit.clock import SectionClock
from benchkit.shapes import IGNORED, ReferenceInputs


def reference_text_loss(model: Any, inputs: ReferenceInputs, clock: SectionClock) -> Tensor:
    """Stage 1: the mean cross-entropy of a causal LM, from all logits in float32."""
    with clock("pass"):
        hidden_BLH = model.get_base_model().model(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False
        )[0]
    with clock("head"):
        logits_BLV = model.get_base_model().lm_head(hidden_BLH).float()
        shifted_PV = logits_BLV[:, :-1].reshape(-1, logits_BLV.shape[-1])
        return cross_entropy(shifted_PV, inputs.labels[:, 1:].flatten(), ignore_index=IGNORED)


def reference_loss(
    model: Any, inputs: ReferenceInputs, clock: SectionClock, *, minimum: float, maximum: float
) -> Tensor:
    """Stages 2 and 3: the micro-batch's loss (a mean).

    Args:
        model: a ``LlavaForConditionalGeneration``.
        minimum, maximum: delta_min, delta_max.
    """
    assert inputs.pixel_values is not None
    embeds_BLH = model.get_input_embeddings()(inputs.input_ids)
    with clock("tower_connector"):
        features = model.model.get_image_features(
            pixel_values=inputs.pixel_values.to(model.model.vision_tower.dtype),
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy="default",
            return_dict=True,
        ).pooler_output
    rows_IPH = torch.stack(list(features)).to(embeds_BLH.dtype)
    embeds_BLH = embeds_BLH.masked_scatter(inputs.is_image.unsqueeze(-1), rows_IPH)
    with torch.no_grad(), clock("text_only_pass"):
        text_mask_BL = inputs.attention_mask.masked_fill(inputs.is_image, 0)
        without_BLV = _all_logits(model, embeds_BLH.clone(), text_mask_BL, clock)
    with clock("pass"):
        with_BLV = _all_logits(model, embeds_BLH, inputs.attention_mask, clock)
    with clock("head"):
        with_PV = with_BLV[:, :-1].contiguous().flatten(0, 1)
        label_P = inputs.labels[:, 1:].flatten()
        with torch.no_grad():
            target_P1 = label_P.masked_fill(label_P == IGNORED, 0).unsqueeze(1)
            probability_with_PV = torch.softmax(with_PV.clone(), dim=-1)
            without_PV = without_BLV[:, :-1].contiguous().flatten(0, 1)
            del without_BLV  # names are dropped where the reference drops them: its peak depends on it
            probability_without_PV = torch.softmax(without_PV, dim=-1)
            gain_P1 = probability_with_PV.gather(1, target_P1) - probability_without_PV.gather(1, target_P1)
            weight_P = _smoothed(gain_P1.squeeze(1).clamp(minimum, maximum))
            del probability_with_PV, probability_without_PV, without_PV
        nll_P = cross_entropy(with_PV, label_P, ignore_index=IGNORED, reduction="none")
        return (nll_P * weight_P).sum() / (weight_P[label_P != IGNORED].sum() + 1e-6)


def _all_logits(model: Any, embeds_BLH: Tensor, keys_BL: Tensor, clock: SectionClock) -> Tensor:
    hidden_BLH = model.model.language_model(inputs_embeds=embeds_BLH, attention_mask=keys_BL, use_cache=False)[0]
    with clock("head"):
        logits_BLV: Tensor = model.lm_head(hidden_BLH).float()
    return logits_BLV


def _smoothed(gain_P: Tensor) -> Tensor:
    """Mean of three neighbours of the flat batch."""
    pooled_1P = avg_pool1d(gain_P.unsqueeze(0), kernel_size=3, stride=1, padding=1, count_include_pad=False)
    return pooled_1P.squeeze(0)
