"""Which samples a step reads, on which rank, in which micro-batch: a function of the step's number alone.

Nothing is remembered, so a run that continues at any step, on any number of ranks, reads what it would have read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpa.data.shuffle import Indices, permutation
from dpa.errors import DataError

WINDOW = 16
"""Global batches that are sorted by length together: long enough to find alike, short enough to stay random."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward of one rank."""

    indices: tuple[int, ...]
    """Samples; all with image or all without."""
    has_image: bool
    filler: bool = False
    """A copy of some sample with nothing supervised: other ranks have one more micro-batch of this kind."""


class BatchPlan:
    """The batches of a whole stage.

    The *set* of samples of a step depends on the data, the seed, the step and ``global_batch`` (and
    ``group_by_length``), never on ranks, ``micro_batch`` or ``tokens_per_micro_batch``. An epoch reads every sample
    once; its last batch may be smaller. Grouped by length, windows of :data:`WINDOW` batches are sorted so that samples
    of similar length share a batch, each batch keeping the window's share of samples without image, and the batches'
    order is drawn anew.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        has_image: ArrayLike,
        *,
        global_batch: int,
        micro_batch: int,
        ranks: int,
        seed: int,
        group_by_length: bool,
        tokens_per_micro_batch: int | None = None,
        epochs: float | None = None,
        max_steps: int | None = None,
    ) -> None:
        """
        Args:
            lengths: tokens per sample (the audit's).
            has_image: per sample (the audit's).
            global_batch: samples per step over all ranks.
            micro_batch: samples per forward at most.
            ranks: number of processes.
            seed: the run's.
            group_by_length: see above.
            tokens_per_micro_batch: tokens per forward at most, in place of ``micro_batch``; a longer sample goes alone.
                Samples of a step then share a forward with those of similar length.
            epochs: passes over the data, fractions allowed.
            max_steps: number of steps; wins over ``epochs``.

        Raises:
            DataError: no samples.
        """
        self._lengths: NDArray[np.int64] = np.asarray(lengths, dtype=np.int64)
        self._has_image: NDArray[np.bool_] = np.asarray(has_image, dtype=np.bool_)
        assert self._lengths.shape == self._has_image.shape == (len(self._lengths),)
        assert min(global_batch, micro_batch, ranks) > 0, (global_batch, micro_batch, ranks)
        if not len(self._lengths):
            raise DataError("no samples to train on")
        self.samples = len(self._lengths)
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.ranks = ranks
        self.seed = seed
        self.group_by_length = group_by_length
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.steps_per_epoch = -(-self.samples // global_batch)
        if max_steps is None:
            assert epochs is not None, "epochs or max_steps"
            assert epochs > 0, epochs
            # the subtraction: 0.1 x 30 is a little more than 3 in floating point
            max_steps = max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        self.steps = max_steps
        """Optimizer steps of the stage."""
        self._order: tuple[int, Indices] | None = None

    def samples_of(self, step: int) -> Indices:
        """The samples of one step over all ranks, in the order in which they are dealt."""
        assert 0 <= step < self.steps, (step, self.steps)
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch(epoch))
        start = place * self.global_batch
        return self._order[1][start : start + self.global_batch]

    def step(self, step: int) -> list[list[MicroBatch]]:
        """Per rank its micro-batches: those with images first, the same number of each kind on every rank."""
        samples = self.samples_of(step)
        with_image = self._has_image[samples]
        dealt = [self._deal(samples[with_image], True), self._deal(samples[~with_image], False)]
        return [[micro for kind in dealt for micro in kind[rank]] for rank in range(self.ranks)]

    def _deal(self, samples: Indices, has_image: bool) -> list[list[MicroBatch]]:
        """Per rank its micro-batches of one kind, about equally large: in samples, or with a budget in tokens."""
        ranks: list[list[MicroBatch]] = [[] for _ in range(self.ranks)]
        if not len(samples):
            return ranks
        if self.group_by_length or self.tokens_per_micro_batch is not None:
            samples = samples[np.argsort(self._lengths[samples], kind="stable")]
        if self.tokens_per_micro_batch is None:
            per_rank = -(-len(samples) // (self.ranks * self.micro_batch))
            chunks = np.array_split(samples, self.ranks * per_rank)
        else:
            ends = cut_by_tokens(self._lengths[samples], self.tokens_per_micro_batch, multiple_of=self.ranks)
            chunks = np.split(samples, ends)
        shortest = int(samples[np.argmin(self._lengths[samples])])
        # Neighbours go to different ranks, so that all ranks have micro-batches of similar length at the same time.
        for place, chunk in enumerate(chunks):
            micro = MicroBatch(tuple(chunk.tolist()), has_image)
            ranks[place % self.ranks].append(micro if micro.indices else MicroBatch((shortest,), has_image, True))
        return ranks

    def _epoch(self, epoch: int) -> Indices:
        order = permutation(self.samples, seed=self.seed, stream=f"epoch {epoch}")
        if not self.group_by_length:
            return order
        whole = self.samples // self.global_batch * self.global_batch
        width = WINDOW * self.global_batch
        windows = [self._sorted(order[start : min(start + width, whole)]) for start in range(0, whole, width)]
        if not windows:
            return order
        batches = np.concatenate(windows).reshape(-1, self.global_batch)
        shuffled = batches[permutation(len(batches), seed=self.seed, stream=f"batches of epoch {epoch}")]
        return np.concatenate([shuffled.ravel(), order[whole:]])

    def _sorted(self, window: Indices) -> Indices:
        """By length, each kind by itself, then merged so that every stretch has the window's share of both.

        Sorting both kinds as one would part them (an image alone is hundreds of tokens), and a step without any image
        has no image token whose weight its text tokens could take over (method, text-only policy).
        """
        with_image = self._has_image[window]
        kinds = [window[with_image], window[~with_image]]
        ordered = [kind[np.argsort(self._lengths[kind], kind="stable")] for kind in kinds]
        ranks = [(np.arange(len(kind)) + 0.5) / max(1, len(kind)) for kind in ordered]
        merged: Indices = np.concatenate(ordered)[np.argsort(np.concatenate(ranks), kind="stable")]
        return merged


def cut_by_tokens(lengths: NDArray[np.int64], budget: int, *, multiple_of: int) -> list[int]:
    """Where to cut a sequence of samples so that no piece has more tokens than ``budget``, one long sample apart.

    As few pieces as that allows, rounded up to a multiple (of the ranks), and then the largest as small as possible: a
    last piece of a few tokens would let the other ranks wait.

    Args:
        lengths: int64 [n], tokens per sample; n is at least 1.

    Returns:
        The ends of all pieces but the last, ascending; pieces at the end are empty where there are too few samples.
    """
    summed = np.cumsum(lengths)

    def ends(limit: int) -> list[int]:
        found = [0]
        while found[-1] < len(lengths):
            before = int(summed[found[-1] - 1]) if found[-1] else 0
            found.append(max(int(np.searchsorted(summed, before + limit, side="right")), found[-1] + 1))
        return found[1:]

    pieces = -(-len(ends(budget)) // multiple_of) * multiple_of
    low, high = 1, budget  # the smallest limit that needs no more pieces; a smaller limit never needs fewer
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(ends(middle)) <= pieces else (middle + 1, high)
    found = ends(low)
    return [*found, *[len(lengths)] * (pieces - len(found))][:-1]


class MicroBatchStream:
    """The micro-batches of one rank from a step on, as a sampler: ``(step, number in the step, micro-batch)``."""

    def __init__(self, plan: BatchPlan, rank: int, start_step: int = 0) -> None:
        assert 0 <= rank < plan.ranks, (rank, plan.ranks)
        self.plan = plan
        self.rank = rank
        self.start_step = start_step

    def __iter__(self) -> Iterator[tuple[int, int, MicroBatch]]:
        for step, micros in self.by_step():
            for number, micro in enumerate(micros):
                yield step, number, micro

    def by_step(self) -> Iterator[tuple[int, Sequence[MicroBatch]]]:
        """The same, step by step."""
        for step in range(self.start_step, self.plan.steps):
            yield step, self.plan.step(step)[self.rank]
