"""A stage's data: what the recipe's sources become under a tokenizer, an image transform and a format.

Legend: T tokens, K images of a sample, C channels, R image side in pixels.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dpa.data.chat import Encoded, encode_chat, encode_plain
from dpa.data.images import ImageTransform, load_image, safe_join
from dpa.data.records import Records
from dpa.data.samples import Sample
from dpa.data.shuffle import Indices
from dpa.errors import DataError, ModelError
from dpa.types import TextRules

TextFormat = Literal["plain", "chat"]


@dataclass(frozen=True, slots=True)
class Item:
    """One sample, ready to be collated."""

    encoded: Encoded
    pixel_values: Tensor | None
    """float32 [K, C, R, R]; None without images."""
    sample_id: str
    where: str


class StageData:
    """The samples of one stage, encoded when they are asked for. Picklable; each process opens its own memory maps.

    Samples are numbered over all sources, in the sources' order.
    """

    def __init__(
        self,
        sources: Sequence[Records],
        tokenizer: Any,
        rules: TextRules,
        *,
        format: TextFormat,
        with_images: bool,
        max_length: int,
        transform: ImageTransform | None,
        max_image_pixels: int,
    ) -> None:
        """
        Args:
            sources: from :func:`dpa.data.records.read_records`.
            tokenizer: the LLM's.
            rules: its family's.
            format: ``plain`` for captions, ``chat`` for conversations.
            with_images: False reads and encodes text alone (stage 1).
            max_length: T at most.
            transform: needed with images.
            max_image_pixels: larger images are refused before they are decoded.

        Raises:
            ModelError: the tokenizer cannot say which characters a token stands for.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} is not a fast tokenizer and cannot tell "
                "which tokens are the answer; add a tokenizer.json to the model's folder"
            )
        assert transform is not None or not with_images
        assert with_images or format == "plain", "only captions have a text-only form"
        self.sources = tuple(sources)
        self.tokenizer = tokenizer
        self.rules = rules
        self.format: TextFormat = format
        self.with_images = with_images
        self.max_length = max_length
        self.transform = transform
        self.max_image_pixels = max_image_pixels
        self.starts = (0, *itertools.accumulate(len(source) for source in self.sources))
        """First number of each source, and the number of all samples."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Item:
        """Raises DataError, with sample, file and record, if it cannot be encoded or an image cannot be read."""
        sample = self.sample(index)
        try:
            encoded = self.encode(sample)
            pixel_values = self._pixels(sample, self.sources[self._source_of(index)].root)
        except DataError as error:
            raise DataError(f"sample {sample.id!r} ({sample.where}): {error}") from None
        return Item(encoded=encoded, pixel_values=pixel_values, sample_id=sample.id, where=sample.where)

    def sample(self, index: int) -> Sample:
        """The record as it was read."""
        place = range(len(self))[index]
        source = self._source_of(place)
        return self.sources[source][place - self.starts[source]]

    def encode(self, sample: Sample) -> Encoded:
        """The sample's tokens.

        Raises:
            DataError: the reason alone.
        """
        if self.format == "plain":
            return encode_plain(
                sample, self.tokenizer, self.rules, max_length=self.max_length, with_image=self.with_images
            )
        return encode_chat(sample, self.tokenizer, self.rules, max_length=self.max_length)

    def images(self) -> Iterator[tuple[str, ...]]:
        """Image paths per sample, relative to their source's root; all empty in a text-only stage."""
        if not self.with_images:
            return itertools.repeat((), len(self))
        return itertools.chain.from_iterable(source.images() for source in self.sources)

    def select(self, places: Indices) -> StageData:
        """The samples at these places, which must ascend (as the audit's ``kept``)."""
        assert bool(np.all(np.diff(places) > 0))
        bounds = np.searchsorted(places, self.starts)
        sources = [
            source.select(places[low:high] - start)
            for source, start, low, high in zip(self.sources, self.starts, bounds[:-1], bounds[1:], strict=False)
        ]
        return StageData(
            sources,
            self.tokenizer,
            self.rules,
            format=self.format,
            with_images=self.with_images,
            max_length=self.max_length,
            transform=self.transform,
            max_image_pixels=self.max_image_pixels,
        )

    def _source_of(self, index: int) -> int:
        return bisect_right(self.starts, range(len(self))[index]) - 1

    def _pixels(self, sample: Sample, root: Path) -> Tensor | None:
        if not self.with_images or not sample.images:
            return None
        assert self.transform is not None
        pixels = []
        for name in sample.images:
            path = safe_join(root, name)
            image = load_image(path, max_pixels=self.max_image_pixels)
            pixels.append(self.transform(image))
        return torch.stack(pixels)
