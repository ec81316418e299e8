"""Batches in the plan's order, read ahead by worker processes where there are some."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader

from dpa.data.collate import collate
from dpa.data.dataset import Item
from dpa.data.sampler import BatchPlan, MicroBatch, MicroBatchStream
from dpa.errors import DpaError
from dpa.types import Batch, TextRules

PARALLEL_FROM = 20_000
"""Samples or images; fewer are done before worker processes are up."""


@dataclass(frozen=True, slots=True)
class MicroInfo:
    """What a micro-batch is within its step."""

    number: int
    """From 0."""
    count: int
    """Micro-batches of this rank in the step; the same on every rank."""
    image_count: int
    """How many of them have images: numbers 0 to ``image_count - 1``; the same on every rank."""
    micro: MicroBatch
    seconds: float
    """Time to read, decode, tokenise and collate it, wherever that happened."""


class Loaded(NamedTuple):
    """What the loop gets."""

    step: int
    is_last_of_step: bool
    batch: Batch
    info: MicroInfo


_Key = tuple[int, int, int, int, MicroBatch]
"""Step, number in the step, count, image count, micro-batch."""


class Samples(Protocol):
    """What is read: ``StageData``, or ``CachedData`` around it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Item:
        """Raises DataError if the sample cannot be used."""


class _Keys:
    """MicroBatchStream with the step's counts."""

    def __init__(self, stream: MicroBatchStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[_Key]:
        for step, micros in self._stream.by_step():
            image_count = sum(micro.has_image for micro in micros)
            for number, micro in enumerate(micros):
                yield step, number, len(micros), image_count, micro


class _Batches:
    """A map from keys to batches, run in the workers. Errors for users travel as values: torch would wrap them."""

    def __init__(self, data: Samples, rules: TextRules) -> None:
        self._data = data
        self._rules = rules

    def __getitem__(self, key: _Key) -> Loaded | DpaError:
        began = time.perf_counter()
        step, number, count, image_count, micro = key
        try:
            items = [self._data[index] for index in micro.indices]
        except DpaError as error:
            return error
        batch = collate(items, self._rules, filler=micro.filler)
        info = MicroInfo(number, count, image_count, micro, time.perf_counter() - began)
        return Loaded(step, number == count - 1, batch, info)


def make_loader(
    data: Samples,
    plan: BatchPlan,
    rank: int,
    start_step: int,
    rules: TextRules,
    workers: int,
    pin_memory: bool,
) -> Iterator[Loaded]:
    """The batches of one rank from ``start_step`` to the end of the plan; the same with any number of workers.

    Touches no global random generator. Close the iterator (or drop it) to end the workers.

    Args:
        data: the samples that ``plan`` numbers (``stage_data.select(audit.kept)``).
        plan: see :class:`BatchPlan`.
        rank: of this process.
        start_step: 0, or where a run continues.
        rules: for collating.
        workers: processes that read ahead; 0 reads in this one.
        pin_memory: for faster copies to a GPU.

    Raises:
        DataError: a sample cannot be used; raised here, as it was raised in the worker.
        DpaError: a worker died.
    """
    assert len(data) == plan.samples, (len(data), plan.samples)
    keys = _Keys(MicroBatchStream(plan, rank, start_step))
    for loaded in read_ahead(_Batches(data, rules), keys, workers, pin_memory=pin_memory):
        if isinstance(loaded, DpaError):
            raise loaded
        yield loaded


def workers_for(count: int) -> int:
    """Processes for a pass over ``count`` things of about a millisecond each; 0: do it in this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if count >= PARALLEL_FROM and cores > 1 else 0


def read_ahead(dataset: Any, keys: Any, workers: int, *, pin_memory: bool = False) -> Iterator[Any]:
    """``dataset[key]`` for each key, in order, by ``workers`` processes (0: in this one).

    Raises:
        DpaError: a worker died.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,  # the keys are batches already
        sampler=keys,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        # torch draws a seed for the workers; from the global generator, training would differ with the loader
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    while True:
        try:
            loaded = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):  # torch's words for a process that is gone
                raise
            raise DpaError(
                f"a data worker died: {error}. Often memory or /dev/shm is full: lower data.workers (0 reads in the "
                "training process); the same command continues the run"
            ) from error
        yield loaded


def _as_it_is(value: Any) -> Any:
    return value
