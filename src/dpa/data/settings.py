"""Settings of the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from dpa.settings import Strict

FormatName = Literal["auto", "llava", "messages", "pixmo"]


class DataSource(Strict):
    """Samples of one kind and where their images are (docs/data.md)."""

    path: Path
    """``.json``, ``.jsonl`` or ``.parquet`` file, a folder of parquet files, a folder written by ``save_to_disk``, or a
    pattern (``shards/*.parquet``)."""
    images: Path | dict[str, Path] | None = None
    """Folder that image paths are relative to; default: the folder of ``path``.

    Or first part(s) of a path -> folder that stands for it: with ``{coco: /data/coco}`` the image
    ``coco/train2017/1.jpg`` is ``/data/coco/train2017/1.jpg``. The longest match counts; the key ``""`` takes the rest.
    """
    format: FormatName = "auto"
    """``auto``: from the columns. ``llava``: conversations, image; ``messages``: messages, images; ``pixmo``:
    image_url, caption."""
    limit: int | None = Field(default=None, ge=1)
    """Use only this many samples, drawn with the run's seed; None uses all."""
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    """How often an epoch reads a sample of this source, after ``limit``: 2 reads each twice, 0.5 reads half of them,
    1.5 each once and half of them twice; which half is drawn with the run's seed and the same in every epoch."""

    @field_validator("images")
    @classmethod
    def _prefixes(cls, value: Path | dict[str, Path] | None) -> Path | dict[str, Path] | None:
        if not isinstance(value, dict):
            return value
        if not value:
            raise ValueError("images is an empty mapping: name a folder, or prefix: folder")
        cleaned: dict[str, Path] = {}
        for prefix, folder in value.items():
            parts = [part for part in prefix.split("/") if part not in ("", ".")]
            if prefix.startswith("/") or ".." in parts:
                raise ValueError(f"images: the prefix {prefix!r} is not the beginning of a relative path")
            key = "/".join(parts)
            if key in cleaned:
                raise ValueError(f"images names the prefix {key!r} twice")
            cleaned[key] = folder
        return cleaned


def _as_sources(value: Any) -> Any:
    return [value] if isinstance(value, (dict, str, Path, DataSource)) else value


class DataSettings(Strict):
    """What the stages read. A bare path or one mapping stands for a list of one source."""

    captions: tuple[DataSource, ...] = ()
    """Stage 1 (text alone) and stage 2; needed unless ``model.start_from`` leaves these out."""
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
