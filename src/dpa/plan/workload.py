"""How much a stage reads: the samples' lengths as they are, or as a data set that is not here usually has them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpa.data.audit import Audit
from dpa.data.sampler import BatchPlan
from dpa.plan.count import Load
from dpa.plan.known import DataSet
from dpa.recipe import StageName
from dpa.train.settings import StageSettings

_LOOKED_AT = 100
"""Steps whose micro-batches are looked at one by one for the largest."""
_SPREAD = 0.5
"""Sigma of the lognormal that stands for unknown lengths."""
_FULL = 0.97
"""Share of a packed row's slots that hold tokens."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Per sample of a stage."""

    text: NDArray[np.int64]
    """Tokens without image placeholders."""
    images: NDArray[np.int64]
    """Their number."""
    supervised: NDArray[np.int64]
    different_images: int
    """Files; several samples may show the same."""
    counted: bool
    """From the files; False: assumed."""

    def __len__(self) -> int:
        return len(self.text)


def counted(audit: Audit, image_tokens: int) -> Samples:
    """Of data that is here.

    Args:
        audit: of the stage.
        image_tokens: of one image.
    """
    images = audit.image_counts.astype(np.int64)
    text = audit.lengths.astype(np.int64) - images * image_tokens
    return Samples(text, images, audit.labels.astype(np.int64), audit.images, counted=True)


def assumed(sets: list[tuple[DataSet, int]], stage: StageName, max_length: int) -> Samples:
    """Lengths of data sets that are not here: lognormal around their mean, the same in every call.

    Args:
        sets: with their number of samples.
        stage: stage 1 reads no image.
        max_length: nothing is longer.
    """
    generator = np.random.default_rng(0)
    text, images, supervised = [], [], []
    for known, count in sets:
        mean = known.text_tokens
        drawn = generator.lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, count)
        tokens = np.clip(np.rint(drawn), 2, max_length).astype(np.int64)
        text.append(tokens)
        supervised.append(np.maximum(1, np.rint(tokens * known.supervised_share)).astype(np.int64))
        has = generator.random(count) < known.image_share
        images.append((has & (stage != "proxy")).astype(np.int64))
    shown = np.concatenate(images)
    return Samples(np.concatenate(text), shown, np.concatenate(supervised), int(shown.sum()), counted=False)


@dataclass(frozen=True, slots=True)
class Workload:
    """A stage's batches."""

    steps: int
    micro_batches: float
    """Per step and rank, on average."""
    mean: Load
    """Of a micro-batch."""
    peak: Load
    """The micro-batch with the most positions (of those looked at)."""
    samples_seen: int
    tokens: float
    """Image placeholders included, over the whole stage."""


def workload(
    samples: Samples, settings: StageSettings, *, image_tokens: int, ranks: int, packing: bool, seed: int
) -> Workload:
    """Deals a stage's samples as training does.

    Raises:
        DataError: no samples.
    """
    lengths = np.minimum(samples.text + samples.images * image_tokens, np.int64(1) << 40)
    plan = BatchPlan(
        lengths,
        samples.images > 0,
        global_batch=settings.global_batch,
        micro_batch=settings.micro_batch,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        ranks=ranks,
        seed=seed,
        group_by_length=settings.group_by_length,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
    )
    looked = np.unique(np.linspace(0, plan.steps - 1, min(plan.steps, _LOOKED_AT)).astype(np.int64))
    loads = [
        _load(samples, lengths, np.asarray(micro.indices), packing=packing)
        for step in looked
        for rank in plan.step(int(step))
        for micro in rank
    ]
    table = np.array(loads)
    mean, peak = table.mean(axis=0), table[np.argmax(table[:, 1])]
    per_step = len(loads) / len(looked) / ranks
    epochs = plan.steps / plan.steps_per_epoch
    return Workload(
        steps=plan.steps,
        micro_batches=per_step,
        mean=Load(*mean.tolist()),
        peak=Load(*peak.tolist()),
        samples_seen=round(epochs * plan.samples),
        tokens=float(lengths.mean()) * epochs * plan.samples,
    )


def _load(
    samples: Samples, lengths: NDArray[np.int64], chosen: NDArray[np.int64], *, packing: bool
) -> tuple[float, ...]:
    """The fields of ``Load`` in their order."""
    length, text = lengths[chosen].astype(float), samples.text[chosen].astype(float)
    shown = samples.images[chosen] > 0
    longest = float(length.max())
    positions = float(length.sum()) / _FULL if packing and len(chosen) > 1 else longest * len(chosen)
    return (
        float(samples.images[chosen].sum()),
        positions,
        float(text[shown].sum()),
        float(samples.supervised[chosen].sum()),
        float((length**2).sum()),
        float((text[shown] ** 2).sum()),
        longest,
    )
