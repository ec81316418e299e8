"""A stage's data: what the recipe's sources become under a tokenizer, an image transform and a format.

Legend: T tokens, n supervised tokens of a sample, K images of a sample, C channels (of pixels or of the tower), R image
side in pixels, P rows per image.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpa.data.chat import Encoded, encode_chat, encode_plain
from dpa.data.images import ImageTransform
from dpa.data.records import Records
from dpa.data.samples import Sample
from dpa.data.shuffle import Indices
from dpa.errors import DataError, ModelError
from dpa.types import TextRules

TextFormat = Literal["plain", "chat"]


@dataclass(frozen=True, slots=True)
class TextNumbers:
    """What the frozen LLM says about a sample's labels from their text alone (``models.text_pass``)."""

    logp: Tensor
    """float32 [n]; NaN where there is no text-only prediction."""
    logit: Tensor | None
    """float32 [n]; for objectives that read logits."""

    def none(self) -> TextNumbers:
        """Of a sample in which nothing is supervised (a filler)."""
        return TextNumbers(self.logp[:0], None if self.logit is None else self.logit[:0])


@dataclass(frozen=True, slots=True)
class Item:
    """One sample, ready to be collated."""

    encoded: Encoded
    pixel_values: Tensor | None
    """float32 [K, C, R, R]; None without images, or where they are not read."""
    sample_id: str
    where: str
    features: Tensor | None = None
    """float16 [K, P, C]; the tower's rows, where they are read in place of the images."""
    text: TextNumbers | None = None
    """Where the text-only pass was made before."""


@dataclass(frozen=True, slots=True)
class ImageTable:
    """The different images of a stage."""

    names: tuple[tuple[int, str], ...]
    """Source and path of each, in order of first use."""
    ids: Indices
    """int64: for each image of each sample, in order, its place in ``names``."""
    starts: Indices
    """int64 [samples + 1]: sample i has ``ids[starts[i] : starts[i + 1]]``."""

    def of(self, sample: int) -> list[int]:
        """Places of one sample's images."""
        places: list[int] = self.ids[self.starts[sample] : self.starts[sample + 1]].tolist()
        return places


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
        reduced_decode: bool = False,
        document_start: bool = False,
        marks: bool = False,
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
            reduced_decode: JPEGs are decoded at a fraction of their size where that is enough (``load_image``).
            document_start, marks: see :func:`dpa.data.chat.encode_plain`.

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
        assert format == "plain" or not marks, "only captions are marked"
        self.sources = tuple(sources)
        self.tokenizer = tokenizer
        self.rules = rules
        self.format: TextFormat = format
        self.with_images = with_images
        self.max_length = max_length
        self.transform = transform
        self.max_image_pixels = max_image_pixels
        self.reduced_decode = reduced_decode
        self.document_start = document_start
        self.marks = marks
        self.starts = (0, *itertools.accumulate(len(source) for source in self.sources))
        """First number of each source, and the number of all samples."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Item:
        """Raises DataError, with sample, file and record, if it cannot be encoded or an image cannot be read."""
        return self._item(index, with_pixels=self.with_images)

    def text_item(self, index: int) -> Item:
        """The same without ``pixel_values``: no image is read. Raises DataError if it cannot be encoded."""
        return self._item(index, with_pixels=False)

    def _item(self, index: int, *, with_pixels: bool) -> Item:
        sample = self.sample(index)
        source = self._source_of(index)
        try:
            encoded = self.encode(sample)
            pixels = [self.pixels(source, name) for name in sample.images] if with_pixels else []
        except DataError as error:
            raise DataError(f"sample {sample.id!r} ({sample.where}): {error}") from None
        pixel_values = torch.stack(pixels) if pixels else None
        return Item(encoded=encoded, pixel_values=pixel_values, sample_id=sample.id, where=sample.where)

    def pixels(self, source: int, name: str) -> Tensor:
        """float32 [C, R, R]: one image of a source.

        Raises:
            DataError: it cannot be read.
        """
        assert self.transform is not None
        reduce_to = self.transform if self.reduced_decode else None
        store = self.sources[source].store
        return self.transform(store.load(name, max_pixels=self.max_image_pixels, reduce_to=reduce_to))

    def picture(self, index: int, name: str) -> Image.Image:
        """One image of a sample, as stored, for people to look at.

        Raises:
            DataError: it cannot be read.
        """
        return self.sources[self._source_of(index)].store.load(name, max_pixels=self.max_image_pixels)

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
                sample,
                self.tokenizer,
                self.rules,
                max_length=self.max_length,
                with_image=self.with_images,
                document_start=self.document_start,
                marks=self.marks,
            )
        return encode_chat(sample, self.tokenizer, self.rules, max_length=self.max_length)

    def images(self) -> Iterator[tuple[str, ...]]:
        """Image paths per sample, relative to their source's root; all empty in a text-only stage."""
        if not self.with_images:
            return itertools.repeat((), len(self))
        return itertools.chain.from_iterable(source.images() for source in self.sources)

    def image_table(self) -> ImageTable:
        """The different images, and which sample has which."""
        places: dict[tuple[int, str], int] = {}
        ids: list[int] = []
        counts = np.zeros(len(self), dtype=np.int64)
        for index, names in enumerate(self.images()):
            counts[index] = len(names)
            source = self._source_of(index) if names else 0
            ids += [places.setdefault((source, name), len(places)) for name in names]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return ImageTable(tuple(places), np.array(ids, dtype=np.int64), starts)

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
            reduced_decode=self.reduced_decode,
            document_start=self.document_start,
            marks=self.marks,
        )

    def _source_of(self, index: int) -> int:
        return bisect_right(self.starts, range(len(self))[index]) - 1
