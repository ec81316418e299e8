"""Settings of ``dpa conflict``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from dpa.settings import Strict


class ConflictSettings(Strict):
    """How the conflict is measured. The proxy's are those of a short stage 1, not the paper's long one."""

    seed: int = Field(default=0, ge=0)
    """Of the halves, the adapter's first weights, the order of captions, and the intervals."""
    rank: int = Field(default=32, ge=1)
    """Of the proxy's LoRA; alpha is twice the rank, as in the paper (256 and 512)."""
    adapt_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the proxy; None: 64, or 4 passes over its half of a small sample (``proxy``)."""
    captions_per_step: int = Field(default=16, ge=1)
    """Captions per optimizer step."""
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Peak; None: by the LLM's width (``proxy.learning_rate_of``)."""
    proxy: Path | None = None
    """An adapter that exists already (PEFT's folder), in place of a short adaptation."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens of a caption that are read; the rest is cut."""
    tokens_per_batch: int | None = Field(default=None, ge=1)
    """Per forward, padding included; a longer caption goes alone. None: ``passes.BATCH_TOKENS`` of the device."""
    min_phrase_count: int | None = Field(default=None, ge=1)
    """A phrase counts from so many different captions on; None: 5, or 1 % of the captions where that is more."""

    @model_validator(mode="after")
    def _one_proxy(self) -> ConflictSettings:
        if self.proxy is not None:
            for name in ("adapt_steps", "learning_rate"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for a proxy that is adapted here; leave it out, or leave out proxy")
        return self
