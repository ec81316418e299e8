"""Sizes of an LLM and a tower, from their configurations; parameters counted on a meta device, so exactly.

Legend: H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from dpa.errors import ModelError
from dpa.models.connectors import ConnectorKind, frozen_names, kind_of, shapes, tokens_per_image
from dpa.models.parts import image_tokens_of, resolve_part, tower_row
from dpa.models.settings import ModelSettings
from dpa.plan.known import LLMS, TOWERS

Source = Literal["folder", "hub cache", "table", "hub"]


@dataclass(frozen=True, slots=True)
class LlmShape:
    """A decoder with gated MLPs, as all families here have."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    eager: bool = False
    """Attention keeps its probabilities (Gemma-2's soft-cap)."""

    @property
    def query(self) -> int:
        """Width of all queries together."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all keys together."""
        return self.kv_heads * self.head_dim

    @property
    def layer(self) -> int:
        """Numbers in one layer's matrices (biases and norms are negligible)."""
        return 2 * self.hidden * self.query + 2 * self.hidden * self.key + 3 * self.hidden * self.intermediate

    @property
    def matrices(self) -> int:
        """Of all layers and the embeddings; a head of its own counts."""
        return self.layers * self.layer + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def lora(self, rank: int) -> int:
        """Numbers in the adapter of all linear layers but the head."""
        ends = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * ends


@dataclass(frozen=True, slots=True)
class TowerShape:
    """A vision transformer."""

    hidden: int
    intermediate: int
    layers: int
    image_tokens: int
    """Rows that the connector gets per image."""
    side: int
    """Pixels."""

    @property
    def matrices(self) -> int:
        """Of the layers."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a recipe's model is made of."""

    llm: LlmShape
    tower: TowerShape
    llm_parameters: int
    """All of the LLM, its head included."""
    tower_parameters: int
    connector_parameters: int
    lora_parameters: int
    image_tokens: int
    """Placeholders of an image: the tower's rows, fewer with connector ``pooled``."""
    sources: dict[str, Source]
    """``llm``, ``vision_tower`` -> where the configuration came from."""


def read_parts(settings: ModelSettings, *, lora_rank: int) -> Parts:
    """Reads or knows the configurations; downloads one only where no table has it.

    Raises:
        ModelError: a configuration cannot be had.
    """
    kind = settings.connector
    if settings.start_from is not None:
        whole, llm_source = _config(settings.start_from, settings.start_from_revision, {}, False)
        text, vision, tower_source, kind = whole.text_config, whole.vision_config, llm_source, kind_of(whole)
    else:
        llm_config, llm_source = _config(settings.llm, settings.llm_revision, LLMS, settings.trust_remote_code)
        seen_config, tower_source = _config(settings.vision_tower, settings.vision_tower_revision, TOWERS, False)
        text = llm_config.get_text_config()
        vision = seen_config.vision_config if hasattr(seen_config, "vision_config") else seen_config
    row = tower_row(vision)
    with torch.device("meta"):
        llm: nn.Module = AutoModelForCausalLM.from_config(text)  # type: ignore[no-untyped-call]
        tower: nn.Module = row.model_class(vision)
    heads = int(text.num_attention_heads)
    own_width = text.head_dim if hasattr(text, "head_dim") else None
    shape = LlmShape(
        hidden=int(text.hidden_size),
        intermediate=int(text.intermediate_size),
        layers=int(text.num_hidden_layers),
        heads=heads,
        kv_heads=int(text.num_key_value_heads),
        head_dim=int(own_width or text.hidden_size // heads),
        vocabulary=int(text.vocab_size),
        tied=bool(text.tie_word_embeddings),
        eager=settings.attention == "eager" or (settings.attention == "auto" and text.model_type == "gemma2"),
    )
    seen = TowerShape(
        hidden=int(vision.hidden_size),
        intermediate=int(vision.intermediate_size)
        if hasattr(vision, "intermediate_size")
        else int(vision.hidden_size * vision.mlp_ratio),
        layers=int(vision.num_hidden_layers),
        image_tokens=image_tokens_of(vision),
        side=int(vision.image_size),
    )
    linears = [module for name, module in llm.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    return Parts(
        llm=shape,
        tower=seen,
        llm_parameters=_numbers(llm),
        tower_parameters=_numbers(tower),
        connector_parameters=_connector(kind, tower=seen.hidden, llm=shape.hidden),
        lora_parameters=sum(lora_rank * (linear.in_features + linear.out_features) for linear in linears),
        image_tokens=tokens_per_image(kind, vision),
        sources={"llm": llm_source, "vision_tower": tower_source},
    )


def _connector(kind: ConnectorKind, *, tower: int, llm: int) -> int:
    fixed = frozen_names(kind)
    return sum(math.prod(size) for name, size in shapes(kind, tower=tower, llm=llm).items() if name not in fixed)


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _config(name: str, revision: str | None, table: dict[str, dict[str, Any]], trust: bool) -> tuple[Any, Source]:
    source = resolve_part(name)
    if Path(source).is_dir():
        return AutoConfig.from_pretrained(source, trust_remote_code=trust), "folder"
    try:
        here = cached_file(source, "config.json", revision=revision, local_files_only=True)
    except OSError:
        here = None
    if here is not None:
        return AutoConfig.from_pretrained(Path(here).parent, trust_remote_code=trust), "hub cache"
    if source in table:
        fields = dict(table[source])
        return AutoConfig.for_model(fields.pop("model_type"), **fields), "table"
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust), "hub"
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: its configuration is neither here nor known ({str(error).splitlines()[0]}); known without a "
            f"download: {', '.join(table)}. Download it once (hf download {name} config.json) or give a local folder"
        ) from None
