"""The multimodal model: joined from its parts, and run forward for training.

Weights live in transformers' own ``LlavaForConditionalGeneration`` (or its sister, see ``connectors``); nothing is
subclassed or patched. Its parts are joined without a second copy in memory and called in our order: tower, connector,
splice, LLM body. The head is applied elsewhere, at supervised positions only.

Legend: B samples, L padded length, H hidden, V vocabulary, I images of a batch, P rows per image, C channels, D the
tower's channels, R side of an image; in [R, K, H] R rows of a pass, K slots per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LlavaProcessor

from dpa.errors import DataError, ModelError
from dpa.models.attention import attention_arguments, check_length
from dpa.models.connectors import (
    MULTIMODAL,
    MultimodalModel,
    draw_connector,
    empty_model,
    kind_of,
    tokens_per_image,
)
from dpa.models.digest import digest_of_part
from dpa.models.families import FAMILIES, Family, family_of, text_rules
from dpa.models.legacy import check_connector, read_connector
from dpa.models.lora import merge_adapter
from dpa.models.parts import (
    frozen_features,
    grow_vocabulary,
    load_llm,
    load_tokenizer,
    load_tower,
    resolve_part,
)
from dpa.models.processor import ImageMode, make_image_processor, make_processor
from dpa.models.rows import Rows
from dpa.models.settings import ModelSettings
from dpa.types import Batch, TextRules

__all__ = [
    "Vlm",
    "batch_features",
    "build_vlm",
    "decoder",
    "head",
    "hidden_states",
    "image_features",
    "load_llm",
    "load_tokenizer",
    "resolve_part",
    "tower_features",
]

_SOFTCAP_FIELDS: dict[str, str] = {
    model_type: row.softcap_field
    for row in FAMILIES.values()
    for model_type in row.model_types
    if row.softcap_field is not None
}
"""``model_type`` -> configuration field of the final soft-cap, from the family table."""


@dataclass(frozen=True, slots=True)
class Vlm:
    """A model and everything that is needed to feed it."""

    model: MultimodalModel
    processor: LlavaProcessor
    tokenizer: Any
    """The processor's; fast."""
    rules: TextRules
    family: Family


def build_vlm(
    settings: ModelSettings,
    *,
    adapter: Path | None = None,
    connector: Path | None = None,
    dtype: torch.dtype = torch.float32,
    tower_dtype: torch.dtype | None = None,
    seed: int = 0,
    image_mode: ImageMode = "pad",
) -> Vlm:
    """Joins LLM, connector and tower, on the CPU, in evaluation mode.

    Args:
        settings: names the parts. ``connector_from`` is used where ``connector`` is None.
        adapter: folder of a proxy's LoRA adapter; merged into the LLM (stage 2 of PMO and DPA).
        connector: weights of the connector; else drawn from ``seed``.
        dtype: of the LLM. The connector is always float32.
        tower_dtype: of the tower; None: ``dtype``.
        seed: of the connector's first weights, whatever torch's global generator holds.
        image_mode: of the processor that is saved with it.

    Raises:
        ModelError: a part cannot be loaded, the connector's shapes do not fit, or the adapter is another LLM's.
    """
    tokenizer = load_tokenizer(settings)
    llm = load_llm(settings, dtype=dtype)
    if adapter is not None:
        merge_adapter(llm, adapter, base_digest=digest_of_part(resolve_part(settings.llm), settings.llm_revision))
    tower = load_tower(settings, dtype=dtype if tower_dtype is None else tower_dtype)
    family = family_of(llm.config, tokenizer)
    rules = text_rules(family, tokenizer, tokens_per_image(settings.connector, tower.config))
    grow_vocabulary(llm, rules.image_token_id + 1)
    model = _join(llm, tower, settings, rules)
    start = connector if connector is not None else settings.connector_from
    if start is None:
        draw_connector(model.model.multi_modal_projector, settings.connector, seed)
    else:
        _load_connector(model, start)
    image_processor = make_image_processor(settings, tower.config, image_mode)
    processor = make_processor(image_processor, tokenizer, rules, tower.config)
    model.generation_config = generation_config(tokenizer, rules)
    nn.Module.eval(model)
    return Vlm(model=model, processor=processor, tokenizer=tokenizer, rules=rules, family=family)


def generation_config(tokenizer: Any, rules: TextRules) -> GenerationConfig:
    """Greedy; an answer ends at the family's end of turn or at the tokenizer's end of text.

    The LLM's own sampling settings are for chat (Qwen2.5: temperature, repetition penalty) and would change answers.
    """
    ends = [tokenizer.convert_tokens_to_ids(rules.end_of_turn), tokenizer.eos_token_id]
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        bos_token_id=rules.bos_id,
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=rules.pad_id,
    )


def _join(llm: Any, tower: Any, settings: ModelSettings, rules: TextRules) -> MultimodalModel:
    """One model that owns the very modules of ``llm`` and ``tower``: no weight is copied, tied ones stay tied.

    The connector is left uninitialised, in float32.
    """
    kernels = llm.config._attn_implementation, tower.config._attn_implementation
    model = empty_model(  # shapes only: the modules are replaced below
        settings.connector,
        text=llm.config,
        vision=tower.config,
        image_token_id=rules.image_token_id,
        vision_feature_layer=settings.vision_feature_layer,
    )
    # the outer configuration has put its own choice into the parts', which the parts read at each forward
    llm.config._attn_implementation, tower.config._attn_implementation = kernels
    model.model.language_model = llm.base_model
    model.model.vision_tower = tower
    model.lm_head = llm.get_output_embeddings()
    model.model.multi_modal_projector.to_empty(device="cpu").float()
    model.config.dtype = llm.dtype
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"parts without weights: {left}"
    return model


def _load_connector(model: MultimodalModel, path: Path) -> None:
    config: Any = model.config
    state = read_connector(path)
    widths = {"tower": int(config.vision_config.hidden_size), "llm": int(config.text_config.hidden_size)}
    check_connector(state, path, **widths, kind=kind_of(config))
    model.model.multi_modal_projector.load_state_dict(state, strict=True)


def tower_features(model: MultimodalModel, pixel_values: Tensor) -> Tensor:
    """The frozen tower's rows, never with gradients.

    Args:
        pixel_values: [I, C, R, R], any float dtype.

    Returns:
        [I, P, D], D the tower's channels, in its dtype.
    """
    config: Any = model.config
    tower = model.model.vision_tower
    with torch.no_grad():
        features = frozen_features(tower, pixel_values.to(tower.dtype), config.vision_feature_layer)
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
    return features


def image_features(model: MultimodalModel, pixel_values: Tensor) -> Tensor:
    """Tower (never with gradients), then connector.

    Args:
        pixel_values: [I, C, R, R], any float dtype.

    Returns:
        [I, P, H], P the placeholders of an image, in the connector's dtype (under autocast: its).
    """
    return _project(model, tower_features(model, pixel_values))


def batch_features(model: MultimodalModel, batch: Batch) -> Tensor | None:
    """``image_features`` of a batch's images, or of their rows from a cache; None where it has neither."""
    if batch.features is not None:
        return _project(model, batch.features)
    return None if batch.pixel_values is None else image_features(model, batch.pixel_values)


def _project(model: MultimodalModel, features_IPD: Tensor) -> Tensor:
    projector = model.model.multi_modal_projector
    projected: Tensor = projector(features_IPD.to(projector.linear_1.weight.dtype))
    return projected.flatten(1, -2)  # a pooled connector leaves rows and columns apart


def hidden_states(model: nn.Module, batch: Batch, features: Tensor | None = None, rows: Rows | None = None) -> Tensor:
    """The training forward, the only one: last hidden states of the LLM's body, before the head.

    Args:
        model: a LLaVA, or for text alone an LLM, with or without an adapter.
        batch: one micro-batch; padding on the right.
        features: [I, P, H] if ``image_features`` has made them already (a second pass over the same images); None: they
            are made from the batch's (``batch_features``).
        rows: where the batch's real tokens, all of them, stand in this pass; None: as in the batch.

    Returns:
        [R, K, H]; without ``rows`` [B, L, H].

    Raises:
        DataError: placeholders and images do not match; names both counts and the samples.
        ModelError: images for a model without a vision tower; see ``attention_arguments``, ``check_length``.
    """
    whole = _without_wrapper(model)
    if features is None and (batch.pixel_values is not None or batch.features is not None):
        if not isinstance(whole, MULTIMODAL):
            raise ModelError(f"a batch with images (samples {', '.join(batch.sample_ids)}) for an LLM without a tower")
        features = batch_features(whole, batch)
    _check_features(features, batch)
    body = decoder(model)
    check_length(body.config, batch.input_ids.shape[1])
    if rows is None:
        position_ids, is_image, input_ids = batch.position_ids, batch.is_image, batch.input_ids
    else:
        position_ids, is_image, input_ids = map(rows.take, (batch.position_ids, batch.is_image, batch.input_ids))
    embedded: Tensor = body.get_input_embeddings()(input_ids)
    if features is not None:  # whatever was embedded at placeholders is overwritten, in reading order
        features = features if rows is None else features[_image_order(batch, rows)]
        embedded = embedded.masked_scatter(is_image.unsqueeze(-1), features.to(embedded.device, embedded.dtype))
    # a mask is always given: without it transformers reads a jump in position ids as the start of a packed sequence
    visible = batch.attention_mask.bool() if rows is None else rows.filled
    arguments = attention_arguments(body.config, embedded, visible, position_ids, span=0, rows=rows)
    output: Tensor = body(
        inputs_embeds=embedded, position_ids=position_ids, use_cache=False, **arguments
    ).last_hidden_state
    return output


def decoder(model: nn.Module) -> Any:
    """The LLM's body: embeddings and layers, without the head.

    Args:
        model: as for ``hidden_states``.
    """
    whole = _without_wrapper(model)
    return whole.model.language_model if isinstance(whole, MULTIMODAL) else whole.base_model


def head(model: nn.Module) -> tuple[Tensor, float | None]:
    """What turns hidden states into logits: (weight [V, H], final soft-cap or None).

    Args:
        model: as for ``hidden_states``.
    """
    whole = _without_wrapper(model)
    text = whole.config.get_text_config()
    field = _SOFTCAP_FIELDS.get(text.model_type)
    cap = None if field is None else text.to_dict()[field]
    return whole.get_output_embeddings().weight, None if cap is None else float(cap)


def _without_wrapper(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper; its linear layers carry the adapter themselves."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _image_order(batch: Batch, rows: Rows) -> Tensor:
    """int64 [I]: the batch's images as a reader of the rows meets them."""
    first = [0, *accumulate(batch.image_counts)]
    order = [image for sample in rows.order for image in range(first[sample], first[sample + 1])]
    return torch.tensor(order, dtype=torch.int64, device=batch.input_ids.device)


def _check_features(features_IPH: Tensor | None, batch: Batch) -> None:
    rows = 0 if features_IPH is None else features_IPH.shape[0] * features_IPH.shape[1]
    placeholders = int(batch.is_image.sum())
    if placeholders == rows:
        return
    per_sample = batch.is_image.sum(dim=1).tolist()
    described = ", ".join(
        f"{name}: {count} placeholders for {images} images"
        for name, count, images in zip(batch.sample_ids, per_sample, batch.image_counts, strict=True)
        if count or images
    )
    raise DataError(
        f"{placeholders} image placeholders but {rows} image rows from tower and connector ({described}); a sample "
        "needs as many images as <image> marks, and the tower fixes the rows per image"
    )
