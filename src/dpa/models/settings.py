"""Settings of the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from dpa.settings import Strict


class ModelSettings(Strict):
    """Which parts are joined, and how. Ids are ``lab:llm``/``lab:tower`` (shipped), a local folder, or a hub id."""

    llm: str = "lab:llm"
    llm_revision: str | None = None
    vision_tower: str = "lab:tower"
    vision_tower_revision: str | None = None
    connector: Literal["linear", "mlp2x_gelu", "pooled"] = "mlp2x_gelu"
    """``mlp2x_gelu``: Linear, GELU, Linear (LLaVA-1.5; paper, section 4.1). ``linear``: one layer (LLaVA-1.0).
    ``pooled``: 2 x 2 patches become one token; saved as ``AyaVisionForConditionalGeneration``, see docs/models.md."""
    connector_from: Path | None = None
    """Start stage 2 from this connector (``mm_projector.bin``, safetensors, a checkpoint folder); None: at random."""
    start_from: str | None = None
    """Stage 3 alone, from a whole LLaVA checkpoint (a folder or hub id of class ``LlavaForConditionalGeneration``): its
    LLM, tower, connector, tokenizer and image token. Stages 1 and 2 do not run."""
    start_from_revision: str | None = None
    vision_feature_layer: int = -2
    """Hidden state of the tower that the connector reads (LLaVA-1.5: the penultimate)."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """``auto``: sdpa, and eager for families whose attention has a soft-cap (Gemma-2)."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSettings:
        if self.start_from is None:
            return self
        for name in _BROUGHT_ALONG:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"start_from brings its own {name}: leave out model.{name}, or leave out start_from")
        return self


_BROUGHT_ALONG = (
    "llm",
    "llm_revision",
    "vision_tower",
    "vision_tower_revision",
    "connector",
    "connector_from",
    "vision_feature_layer",
)
"""What a whole checkpoint fixes."""


class LoraSettings(Strict):
    """The proxy LLM's adapter (paper, section 4.1: rank 256, alpha 512, all linear layers but the head)."""

    rank: int = Field(default=256, ge=1)
    alpha: float = Field(default=512, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
