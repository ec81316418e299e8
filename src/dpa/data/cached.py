"""What a stage reads from disk in place of a forward pass: text-only log-probs of a frozen LLM, features of the tower.

Both are filled before the stage's first step (``train.prepare``), chunk by chunk. Chunks depend on the data alone, so a
number is the same whoever made it, whenever, and whatever was there before.

Legend: N samples, n supervised tokens of a sample, I images of a chunk, C channels, R image side, P rows per image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpa.data.collate import collate
from dpa.data.dataset import Item, StageData, TextNumbers
from dpa.data.loader import read_ahead
from dpa.data.row_cache import Layout, RowCache
from dpa.data.shuffle import Indices
from dpa.errors import DpaError, UserError
from dpa.types import Batch, TextRules

_CHUNK_TOKENS = 4096
"""Text tokens, padding included, of a chunk of the text cache, which is one forward."""
_CHUNK_IMAGES = 32


class TextCache:
    """Text-only log-probs (and logits) of every supervised token of a stage."""

    def __init__(
        self,
        data: StageData,
        rules: TextRules,
        *,
        root: Path,
        inputs: Mapping[str, Any],
        lengths: NDArray[np.int32],
        has_image: NDArray[np.bool_],
        labels: NDArray[np.int32],
        logits: bool,
    ) -> None:
        """
        Args:
            data: the samples to train on.
            rules: for collating.
            root: folder of all caches.
            inputs: everything that the numbers depend on, but for their layout.
            lengths: [N] tokens per sample.
            has_image: [N].
            labels: [N] supervised tokens per sample.
            logits: keep the labels' logits, too.
        """
        assert len(data) == len(lengths) == len(has_image) == len(labels)
        self.columns = 2 if logits else 1
        text = lengths.astype(np.int64) - has_image * rules.image_tokens
        order = np.argsort(text, kind="stable").astype(np.int64)
        layout = Layout(labels.astype(np.int64) * self.columns, order, _bounds(text[order]))
        self.rows = RowCache(root, "text", {"rules": asdict(rules), "logits": logits, **inputs}, layout, np.float32)
        self._data = data
        self._rules = rules

    def read(self, index: int) -> TextNumbers:
        """One sample's numbers."""
        columns = torch.from_numpy(self.rows.read(index).reshape(-1, self.columns))
        return TextNumbers(columns[:, 0], columns[:, 1] if self.columns == 2 else None)

    def batches(self, chunks: Sequence[int], workers: int, *, pin_memory: bool) -> Iterator[Batch]:
        """The samples of these chunks, one batch each, without pixels.

        Raises:
            DataError: a sample cannot be encoded.
        """
        yield from _raising(read_ahead(_TextChunks(self), chunks, workers, pin_memory=pin_memory))

    def write(self, chunk: int, logp: Tensor, logit: Tensor | None) -> None:
        """Stores what a pass said about a batch of :meth:`batches`, [all its supervised tokens].

        Raises:
            StorageError, UserError: the disk is full or not writable.
        """
        columns = [logp] if logit is None else [logp, logit]
        assert len(columns) == self.columns
        self.rows.write(chunk, torch.stack(columns, dim=1).cpu().numpy())

    def batch(self, chunk: int) -> Batch:
        """One of :meth:`batches`."""
        items = [self._data.text_item(int(row)) for row in self.rows.layout.rows(chunk)]
        return collate(items, self._rules, text_only=True)


class VisionCache:
    """The tower's rows of every image of a stage, float16. The tower is frozen, so no gradient is lost."""

    def __init__(self, data: StageData, *, root: Path, inputs: Mapping[str, Any], rows: int, channels: int) -> None:
        """
        Args:
            data: the samples to train on.
            root: folder of all caches.
            inputs: everything that the features depend on, but for their layout.
            rows: P.
            channels: C, of the tower.
        """
        self._data = data
        self._images = data.image_table()
        self._shape = (rows, channels)
        count = len(self._images.names)
        bounds = np.append(np.arange(0, count, _CHUNK_IMAGES, dtype=np.int64), count)
        layout = Layout(np.full(count, rows * channels, dtype=np.int64), np.arange(count, dtype=np.int64), bounds)
        self.rows = RowCache(root, "vision", inputs, layout, np.float16)

    def read(self, index: int) -> Tensor | None:
        """float16 [K, P, C] of one sample; None without images."""
        places = self._images.of(index)
        if not places:
            return None
        return torch.from_numpy(np.stack([self.rows.read(place).reshape(self._shape) for place in places]))

    def pixels(self, chunks: Sequence[int], workers: int, *, pin_memory: bool) -> Iterator[Tensor]:
        """float32 [I, C, R, R] per chunk.

        Raises:
            DataError: an image cannot be read.
        """
        yield from _raising(read_ahead(_PixelChunks(self), chunks, workers, pin_memory=pin_memory))

    def write(self, chunk: int, features: Tensor) -> None:
        """Stores a chunk's features, [I, P, C].

        Raises:
            UserError: a number is beyond float16.
            StorageError, UserError: the disk is full or not writable.
        """
        assert tuple(features.shape[1:]) == self._shape, (features.shape, self._shape)
        half = features.to(torch.float16)
        if not bool(half.isfinite().all()):
            largest = features.float().abs().max()
            raise UserError(
                f"{self.rows.folder}: the vision tower's features reach {largest:.3g}, float16 ends at 65504; "
                "set train.vision_cache=false"
            )
        self.rows.write(chunk, half.cpu().numpy())

    def chunk_pixels(self, chunk: int) -> Tensor:
        """One of :meth:`pixels`."""
        names = [self._images.names[row] for row in self.rows.layout.rows(chunk)]
        return torch.stack([self._data.pixels(source, name) for source, name in names])


@dataclass(frozen=True, slots=True)
class CachedData:
    """What ``StageData`` is to the loader, with numbers from filled caches where there are some."""

    data: StageData
    text: TextCache | None = None
    vision: VisionCache | None = None
    """With it no image is opened."""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        item = self.data[index] if self.vision is None else self.data.text_item(index)
        if self.vision is not None:
            item = replace(item, features=self.vision.read(index))
        return item if self.text is None else replace(item, text=self.text.read(index))


@dataclass(frozen=True, slots=True)
class _TextChunks:
    """Run in the workers."""

    cache: TextCache

    def __getitem__(self, chunk: int) -> Batch | DpaError:
        try:
            return self.cache.batch(chunk)
        except DpaError as error:
            return error


@dataclass(frozen=True, slots=True)
class _PixelChunks:
    """Run in the workers."""

    cache: VisionCache

    def __getitem__(self, chunk: int) -> Tensor | DpaError:
        try:
            return self.cache.chunk_pixels(chunk)
        except DpaError as error:
            return error


def _raising(made: Iterator[Any]) -> Iterator[Any]:
    """Errors for users come out of the workers as values."""
    for value in made:
        if isinstance(value, DpaError):
            raise value
        yield value


def _bounds(lengths: NDArray[np.int64]) -> Indices:
    """Where chunks of ascending lengths begin and end: rows x longest <= _CHUNK_TOKENS, one row at least."""
    bounds = [0]
    for place, length in enumerate(lengths.tolist()):
        if (place + 1 - bounds[-1]) * length > _CHUNK_TOKENS and place > bounds[-1]:
            bounds.append(place)
    return np.array([*bounds, len(lengths)], dtype=np.int64)
