"""Where the loop's micro-batches come from: a stage's data, dealt to the ranks that there are."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from dpa.data.cached import CachedData, TextCache, VisionCache
from dpa.data.dataset import StageData
from dpa.data.loader import Loaded, make_loader
from dpa.data.sampler import BatchPlan
from dpa.train.settings import StageSettings
from dpa.types import TextRules

_CORES_PER_WORKER = 4
_MOST_WORKERS = 8


class BatchSource(Protocol):
    """What the loop asks for."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage, whatever the number of ranks."""

    def open(
        self,
        *,
        start: int,
        rank: int,
        ranks: int,
        pin_memory: bool,
        text: TextCache | None = None,
        vision: VisionCache | None = None,
    ) -> Generator[Loaded]:
        """One rank's micro-batches from step ``start`` (from 0) to the end, on the CPU.

        In each step every rank has as many with images (first) and as many without as every other rank. ``text`` and
        ``vision`` are this source's caches, filled.
        """

    def text_cache(self, root: Path, inputs: Mapping[str, Any], *, logits: bool) -> TextCache:
        """The cache of this data's text-only numbers; see there."""

    def vision_cache(self, root: Path, inputs: Mapping[str, Any], *, channels: int) -> VisionCache:
        """The cache of this data's tower features; see there."""

    def workers_for(self, ranks: int) -> int:
        """Processes that read ahead, per rank."""


@dataclass(frozen=True, slots=True)
class StageBatches:
    """A stage's data under its settings."""

    data: StageData
    """The samples to train on (``stage_data.select(audit.kept)``)."""
    lengths: ArrayLike
    """Tokens per sample (the audit's)."""
    has_image: ArrayLike
    """Per sample (the audit's)."""
    rules: TextRules
    settings: StageSettings
    seed: int
    """The run's."""
    workers: int | None = None
    """Loader processes per rank; None: see :func:`default_workers`."""
    labels: ArrayLike | None = None
    """Supervised tokens per sample (the audit's); needed for a text cache."""

    @property
    def steps(self) -> int:
        return self._plan(ranks=1).steps

    def open(
        self,
        *,
        start: int,
        rank: int,
        ranks: int,
        pin_memory: bool,
        text: TextCache | None = None,
        vision: VisionCache | None = None,
    ) -> Generator[Loaded]:
        workers = self.workers_for(ranks)
        data = CachedData(self.data, text, vision)
        yield from make_loader(data, self._plan(ranks), rank, start, self.rules, workers, pin_memory)

    def text_cache(self, root: Path, inputs: Mapping[str, Any], *, logits: bool) -> TextCache:
        assert self.labels is not None, "a text cache without the number of labels"
        return TextCache(
            self.data,
            self.rules,
            root=root,
            inputs=inputs,
            lengths=np.asarray(self.lengths),
            has_image=np.asarray(self.has_image),
            labels=np.asarray(self.labels),
            logits=logits,
        )

    def vision_cache(self, root: Path, inputs: Mapping[str, Any], *, channels: int) -> VisionCache:
        return VisionCache(self.data, root=root, inputs=inputs, rows=self.rules.image_tokens, channels=channels)

    def workers_for(self, ranks: int) -> int:
        return default_workers(ranks) if self.workers is None else self.workers

    def _plan(self, ranks: int) -> BatchPlan:
        return BatchPlan(
            self.lengths,
            self.has_image,
            global_batch=self.settings.global_batch,
            micro_batch=self.settings.micro_batch,
            tokens_per_micro_batch=self.settings.tokens_per_micro_batch,
            ranks=ranks,
            seed=self.seed,
            group_by_length=self.settings.group_by_length,
            epochs=self.settings.epochs,
            max_steps=self.settings.max_steps,
        )


def default_workers(ranks: int) -> int:
    """Loader processes per rank: a quarter of its share of the cores, 8 at most; none on small machines."""
    return min((os.cpu_count() or 1) // (_CORES_PER_WORKER * ranks), _MOST_WORKERS)
