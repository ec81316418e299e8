"""Fills a stage's caches before its first step: what the frozen parts say is computed once, not in every step.

Each chunk is a forward of its own, over samples that the data alone choose, so the numbers do not depend on ranks, on
where an earlier start was stopped or on what was there already. What the last bits depend on besides (device, threads,
versions) is part of the key: a run that finds a cache ends with the weights of the run that made it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from dpa.data.cached import TextCache, VisionCache
from dpa.data.row_cache import RowCache, for_people
from dpa.errors import DpaError, StorageError
from dpa.log import get_logger
from dpa.models.connectors import MULTIMODAL
from dpa.train.job import StageJob
from dpa.train.parallel import Parallel
from dpa.train.progress import LINE_SECONDS, duration
from dpa.train.step import TrainStep

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A stage's caches, filled; None where it uses none."""

    text: TextCache | None
    vision: VisionCache | None


def prepare(job: StageJob, step: TrainStep, parallel: Parallel) -> Prepared:
    """Makes what is missing in the caches that the job names; all ranks call it and share the work.

    Args:
        job: names the caches.
        step: the unwrapped module, on its device, frozen as the stage wants it.
        parallel: the ranks.

    Raises:
        StorageError: a disk is full or not writable, or the ranks do not share it.
        DataError: a sample or an image cannot be used.
        UserError: the tower's features do not fit into float16.
    """
    filling = _Filling(job, step, parallel)
    return Prepared(text=filling.text(), vision=filling.vision())


class _Filling:
    """One rank's part of the work."""

    def __init__(self, job: StageJob, step: TrainStep, parallel: Parallel) -> None:
        self.job = job
        self.step = step
        self.parallel = parallel
        self.numerics = _numerics(parallel.device)
        self.loader: dict[str, Any] = {"pin_memory": parallel.device.type == "cuda"}
        self.workers = job.batches.workers_for(parallel.world)

    def text(self) -> TextCache | None:
        inputs = self.job.caches.text
        if inputs is None:
            return None
        cache = self.job.batches.text_cache(self.job.caches.root, self.numerics | inputs, logits=self.step.needs_logits)

        def make(chunks: Sequence[int]) -> Iterator[None]:
            for chunk, batch in zip(chunks, cache.batches(chunks, self.workers, **self.loader), strict=True):
                read = self.step.text_only(batch.to(self.parallel.device, non_blocking=True))
                cache.write(chunk, read.logp, read.logit)
                yield

        self._fill(cache.rows, "text-only log-probs", make)
        return cache

    def vision(self) -> VisionCache | None:
        inputs = self.job.caches.vision
        if inputs is None:
            return None
        assert isinstance(self.step.model, MULTIMODAL), "features of a model without a tower"
        tower: Any = self.step.model.config.vision_config
        cache = self.job.batches.vision_cache(
            self.job.caches.root, self.numerics | inputs, channels=int(tower.hidden_size)
        )

        def make(chunks: Sequence[int]) -> Iterator[None]:
            for chunk, pixels in zip(chunks, cache.pixels(chunks, self.workers, **self.loader), strict=True):
                cache.write(chunk, self.step.tower(pixels.to(self.parallel.device, non_blocking=True)))
                yield

        self._fill(cache.rows, "vision features", make)
        return cache

    def _fill(self, rows: RowCache, what: str, make: Callable[[Sequence[int]], Iterator[None]]) -> None:
        parallel, chunks = self.parallel, rows.layout.chunks
        self._together(rows.create if parallel.is_main else _nothing)
        missing = rows.missing(range(parallel.rank, chunks, parallel.world))
        absent = sum(parallel.gather(len(missing)))
        if parallel.is_main:
            state = f"{chunks - absent} of {chunks} parts are there" if absent else "complete"
            log.info("stage %s: %s, %s in %s: %s", self.job.stage, what, for_people(rows.size), rows.folder, state)
        self._together(lambda: self._make(make(missing), what, len(missing)))
        self._together(lambda: _complete(rows))

    def _make(self, made: Iterator[None], what: str, count: int) -> None:
        began = last = time.monotonic()
        for done, _ in enumerate(made, 1):
            now = time.monotonic()
            if self.parallel.is_main and (now - last >= LINE_SECONDS or done == count):
                left = duration((now - began) / done * (count - done))
                log.info("stage %s: %s %d/%d  %s left", self.job.stage, what, done, count, left)
                last = now

    def _together(self, action: Callable[[], None]) -> None:
        """Runs it on every rank and waits; an error of one is raised on all, so that none waits for ever."""
        failed: DpaError | None = None
        try:
            action()
        except DpaError as error:
            failed = error
        errors = [error for error in self.parallel.gather(failed) if error is not None]
        if errors:
            raise errors[0]


def _nothing() -> None:
    return None


def _complete(rows: RowCache) -> None:
    made = sum(rows.made(chunk) for chunk in range(rows.layout.chunks))
    if made != rows.layout.chunks:
        raise StorageError(
            f"{rows.folder}: this rank sees {made} of {rows.layout.chunks} parts; all ranks need one store on a "
            "shared disk (DPA_STORE)"
        )


def _numerics(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result depend on besides its inputs."""
    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device)}
    kernels = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    return found | {"device": f"{device.type} {kernels}", "threads": torch.get_num_threads()}
