"""Settings of the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from dpa.settings import Strict


class DataSource(Strict):
    """One file of samples and the folder of its images."""

    path: Path
    """LLaVA ``.json`` (a list) or ``.jsonl`` (a sample a line)."""
    images: Path | None = None
    """Folder that image paths are relative to; default: the folder of ``path``."""
    format: Literal["auto", "llava"] = "auto"
    limit: int | None = Field(default=None, ge=1)
    """Use only this many samples, drawn with the run's seed; None uses all."""


def _as_sources(value: Any) -> Any:
    return [value] if isinstance(value, (dict, str, Path, DataSource)) else value


class DataSettings(Strict):
    """What the stages read. A bare path or one mapping stands for a list of one source."""

    captions: tuple[DataSource, ...]
    """Stage 1 (text alone) and stage 2."""
    proxy_captions: tuple[DataSource, ...] | None = None
    """For stage 1 alone, where its text lies in a file of its own; None: ``captions``, without their images."""
    instructions: tuple[DataSource, ...]
    """Stage 3; samples without image are welcome."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Missing or broken samples are quarantined up to this share of a source; above it the run does not start."""
    max_image_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused before they are decoded (decompression bombs)."""
    reduced_decode: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size where twice the tower's side is left: faster for photographs, and
    pixels differ a little (docs/architecture.md, "Caches and the loader")."""
    workers: int | None = Field(default=None, ge=0)
    """Loader processes per rank; None: chosen from the number of cores (0 on small machines)."""

    @field_validator("captions", "proxy_captions", "instructions", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        sources = _as_sources(value)
        if isinstance(sources, (list, tuple)):
            return [{"path": item} if isinstance(item, (str, Path)) else item for item in sources]
        return sources
