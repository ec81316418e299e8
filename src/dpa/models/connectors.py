"""Connectors: which module of transformers each one is, what of it is trained, how many tokens it makes of an image.

No module of ours: a saved checkpoint must load without this package. So a kind is a way to use a stock class.

* ``mlp2x_gelu``: LLaVA's projector as it is, Linear, GELU, Linear.
* ``linear``: the same class with the activation ``linear`` (none) and a second layer that is the identity and stays so:
  exactly one linear layer, for the price of a multiplication with the identity.
* ``pooled``: each square of 2 x 2 neighbouring patches becomes one token: their channels side by side, LayerNorm,
  Linear, SwiGLU, Linear. LLaVA's class cannot make tokens fewer; ``AyaVisionForConditionalGeneration``, which is LLaVA
  with this projector, can, for any tower and any LLM.

Legend: H the LLM's hidden size, D the tower's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from dpa.errors import ModelError
from dpa.models.parts import image_tokens_of, registers_of, select_strategy

ConnectorKind = Literal["linear", "mlp2x_gelu", "pooled"]
MultimodalModel = LlavaForConditionalGeneration | AyaVisionForConditionalGeneration
MULTIMODAL = (LlavaForConditionalGeneration, AyaVisionForConditionalGeneration)
"""For ``isinstance``. Both have ``model.vision_tower``, ``model.multi_modal_projector``, ``model.language_model`` and
``lm_head``."""

POOLED_SIDE = 2
"""Patches per side of a square that becomes one token."""

_CLASSES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "aya_vision": (AyaVisionConfig, AyaVisionForConditionalGeneration),
}
"""``model_type`` of a checkpoint's configuration -> its classes."""

LINEAR_NAMES = ("linear_1.weight", "linear_1.bias")
CONNECTOR_NAMES = (*LINEAR_NAMES, "linear_2.weight", "linear_2.bias")
POOLED_NAMES = ("layernorm.weight", "layernorm.bias", *CONNECTOR_NAMES)


def classes_of(config: PreTrainedConfig) -> tuple[Any, Any]:
    """(configuration class, model class) of a checkpoint.

    Raises:
        ModelError: it is none of ours.
    """
    if config.model_type not in _CLASSES:
        raise ModelError(f"model_type {config.model_type!r} is no LLaVA; known: {', '.join(_CLASSES)}")
    return _CLASSES[config.model_type]


def kind_of(config: Any) -> ConnectorKind:
    """The connector of a multimodal model's configuration."""
    if config.model_type == "aya_vision":
        return "pooled"
    return "linear" if config.projector_hidden_act == "linear" else "mlp2x_gelu"


def tokens_per_image(kind: ConnectorKind, vision: PreTrainedConfig) -> int:
    """Placeholders of an image: the tower's rows, or a quarter of them.

    Raises:
        ModelError: ``pooled`` with a tower whose patches cannot be grouped.
    """
    rows = image_tokens_of(vision)
    if kind != "pooled":
        return rows
    side = math.isqrt(rows)
    if registers_of(vision) or side % POOLED_SIDE:
        why = "has register tokens between its patches" if registers_of(vision) else f"has {side} x {side} patches"
        raise ModelError(
            f"connector pooled groups {POOLED_SIDE} x {POOLED_SIDE} patches; the tower ({vision.model_type}) {why}; "
            "use one with an even side (CLIP-L/14 at 336: 24; SigLIP 2 patch16 at 384: 24) or connector mlp2x_gelu"
        )
    return rows // POOLED_SIDE**2


def empty_model(
    kind: ConnectorKind, *, text: Any, vision: Any, image_token_id: int, vision_feature_layer: int
) -> MultimodalModel:
    """The model on the meta device: shapes only.

    Raises:
        ModelError: see :func:`tokens_per_image`.
    """
    shared: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": image_token_id,
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": select_strategy(vision),
        "tie_word_embeddings": bool(text.tie_word_embeddings),
    }
    tokens = tokens_per_image(kind, vision)
    if kind == "pooled":
        # SwiGLU halves it: as wide inside as LLaVA's
        shared |= {"downsample_factor": POOLED_SIDE, "alignment_intermediate_size": 2 * int(text.hidden_size)}
        config: PreTrainedConfig = AyaVisionConfig(**shared)
    else:
        activation = "linear" if kind == "linear" else "gelu"
        config = LlavaConfig(**shared, image_seq_length=tokens, projector_hidden_act=activation)
    with torch.device("meta"):
        model: MultimodalModel = classes_of(config)[1](config)
    return model


def frozen_names(kind: ConnectorKind) -> tuple[str, ...]:
    """Parameters of the projector that are never trained."""
    return ("linear_2.weight", "linear_2.bias") if kind == "linear" else ()


@torch.no_grad()
def draw_connector(projector: nn.Module, kind: ConnectorKind, seed: int) -> None:
    """torch's own start of a linear layer, U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for weights and biases (as LLaVA).

    LayerNorm starts at ones and zeros, ``linear``'s second layer is the identity.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in LINEAR_NAMES if kind == "linear" else CONNECTOR_NAMES:
        layer = projector.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, nn.Linear)
        bound = 1.0 / math.sqrt(layer.in_features)
        projector.get_parameter(name).uniform_(-bound, bound, generator=generator)
    if kind == "linear":
        weight_HH = projector.get_parameter("linear_2.weight")
        weight_HH.copy_(torch.eye(len(weight_HH)))
        projector.get_parameter("linear_2.bias").zero_()
    if kind == "pooled":
        projector.get_parameter("layernorm.weight").fill_(1)
        projector.get_parameter("layernorm.bias").zero_()


def with_identity(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A single linear layer (``weight``, ``bias``) as LLaVA's projector holds it; anything else as it is."""
    if set(state) != {"weight", "bias"}:
        return dict(state)
    width = len(state["weight"])
    return {
        "linear_1.weight": state["weight"],
        "linear_1.bias": state["bias"],
        "linear_2.weight": torch.eye(width),
        "linear_2.bias": torch.zeros(width),
    }


def kind_of_state(state: Mapping[str, Tensor]) -> ConnectorKind:
    """The connector that these tensors, by transformers' names, are of."""
    if "layernorm.weight" in state:
        return "pooled"
    weight_HH = state["linear_2.weight"]
    identity = weight_HH.shape[0] == weight_HH.shape[1] and not state["linear_2.bias"].any()
    identity = identity and torch.equal(weight_HH.float().cpu(), torch.eye(len(weight_HH)))
    return "linear" if identity else "mlp2x_gelu"


def shapes(kind: ConnectorKind, *, tower: int, llm: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what joins a tower of width ``tower`` to an LLM of width ``llm``."""
    if kind != "pooled":
        first: dict[str, tuple[int, ...]] = {"linear_1.weight": (llm, tower), "linear_1.bias": (llm,)}
        return first | {"linear_2.weight": (llm, llm), "linear_2.bias": (llm,)}
    grouped = tower * POOLED_SIDE**2
    norm: dict[str, tuple[int, ...]] = {"layernorm.weight": (grouped,), "layernorm.bias": (grouped,)}
    first = {"linear_1.weight": (2 * llm, grouped), "linear_1.bias": (2 * llm,)}
    return norm | first | {"linear_2.weight": (llm, llm), "linear_2.bias": (llm,)}


def check_kind(state: Mapping[str, Tensor], path: Path, wanted: ConnectorKind) -> None:
    """
    Raises:
        ModelError: the file's connector is not the recipe's.
    """
    found = kind_of_state(state)
    if found != wanted:
        raise ModelError(f"{path} holds a connector {found}, model.connector says {wanted}; set it to {found}")
