"""The loop: micro-batches -> sums over the step and the ranks -> one division -> clip -> optimizer step -> log, save.

A step's loss is sum(w * CE) / sum(w) over all its tokens, on all ranks and in all micro-batches, so the result does not
depend on how a batch is split. Gradients of sums are accumulated and scaled once; clipping comes after that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import nn

from dpa.data.loader import Loaded
from dpa.errors import NonFiniteError, StorageError
from dpa.log import get_logger
from dpa.models.connectors import MULTIMODAL
from dpa.objectives import text_only_weight
from dpa.train.batches import BatchSource, StageBatches
from dpa.train.checkpoint import StateStore
from dpa.train.compiled import compiled
from dpa.train.determinism import controlled, seed_everything, set_random_state
from dpa.train.diagnose import find_non_finite
from dpa.train.job import StageJob, StageResult
from dpa.train.metrics import EVALUATION, MetricsFile, StepSums, first_and_last, read_metrics, step_row, totals
from dpa.train.optim import make_optimizer, make_schedule
from dpa.train.parallel import Parallel, compute_dtype, sharing_of
from dpa.train.prepare import Prepared, prepare
from dpa.train.progress import NoProgress, make_progress
from dpa.train.ranks import join_ranks, raise_everywhere
from dpa.train.resume import Training, restore, save
from dpa.train.step import StepOutput, TrainStep
from dpa.types import Batch

__all__ = ["BatchSource", "StageBatches", "StageJob", "StageResult", "set_checkpointing", "train_stage"]

log = get_logger(__name__)


def train_stage(job: StageJob) -> StageResult:
    """Trains a stage to its end; continues from the newest good state in ``job.work``.

    On a CPU (same threads, same ranks) a continued run ends with the bits of an uninterrupted one. The caller's random
    generators, threads and the model's training flags are put back.

    Raises:
        NonFiniteError: loss or gradient is not finite; nothing is saved after that.
        CheckpointError: the saved states are another job's.
        DataError: a sample cannot be used.
        StorageError: the metrics cannot be written at the end, or there is no room for a cache.
        UserError: the objective lacks its reference, or a tracker its package.
    """
    dtype = compute_dtype(job.train)
    sharing = sharing_of(job.parallel, job.stage, join_ranks(job.train).world)
    log_dir = job.work / "logs" if job.log_dir is None else job.log_dir
    parallel = Parallel(job.train, sharing=sharing, log_dir=log_dir)
    low_precision = dtype != torch.float32
    with (
        controlled(job.train, parallel.device, low_precision=low_precision),
        _training(job.model, checkpointing=job.settings.gradient_checkpointing),
        compiled(job.model) if job.train.compile else nullcontext(),
    ):
        step = TrainStep(job.model, job.step, reference=job.reference, autocast=dtype if low_precision else None)
        return _Stage(job, parallel, step).run()


@contextmanager
def _training(model: nn.Module, *, checkpointing: bool) -> Iterator[None]:
    """Training mode, but for the vision tower, which is frozen; optionally with gradient checkpointing."""
    before = {module: module.training for module in model.modules()}
    model.train()
    if isinstance(model, MULTIMODAL):
        nn.Module.eval(model.model.vision_tower)
    if checkpointing:
        set_checkpointing(model, True)
    try:
        yield
    finally:
        if checkpointing:
            set_checkpointing(model, False)
        for module, training in before.items():
            module.training = training


def set_checkpointing(model: Any, on: bool) -> None:
    """Gradient checkpointing of all layers, without reentrant autograd, under transformers' new or old name."""
    # transformers 5.23 has renamed it and warns about the old name, which is all that its predecessors know
    renamed = hasattr(model, "activation_checkpointing_enable")
    prefix = "activation" if renamed else "gradient"
    if on:
        settings = {f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{prefix}_checkpointing_enable")(**settings)
    else:
        getattr(model, f"{prefix}_checkpointing_disable")()


class _Stage:
    """One start of a stage."""

    def __init__(self, job: StageJob, parallel: Parallel, step: TrainStep) -> None:
        self.job = job
        self.parallel = parallel
        self.module = parallel.wrap(step)
        self.bare = step
        self.steps = job.batches.steps
        trained = job.trained()
        optimizer = make_optimizer(trained.values(), job.settings)
        self.training = Training(trained, optimizer, make_schedule(optimizer, job.settings, self.steps))
        self.store = StateStore(job.states, fingerprint=job.fingerprint, keep=job.train.keep_states)
        self.metrics = MetricsFile(job.metrics) if parallel.is_main else None
        shown = make_progress() if job.progress is None else job.progress
        self.progress = shown if parallel.is_main else NoProgress()

    def run(self) -> StageResult:
        parallel, job = self.parallel, self.job
        restored = restore(parallel, self.store, self.training, self.metrics)
        if restored.step and parallel.is_main:
            log.info("stage %s: continues after step %d of %d", job.stage, restored.step, self.steps)
        parallel.start_trackers(job.stage, asdict(job.step), first_step=restored.step + 1)
        # a stage that is done needs no cache to say so
        caches = prepare(job, self.bare, parallel) if restored.step < self.steps else Prepared(None, None)
        self.progress.start(job.stage, steps=self.steps, done=restored.step)
        micro_batches = job.batches.open(
            start=restored.step,
            rank=parallel.rank,
            ranks=parallel.world,
            pin_memory=parallel.device.type == "cuda",
            text=caches.text,
            vision=caches.vision,
        )
        if restored.random is None:  # last of all, so that nothing above draws from the stage's numbers
            seed_everything(job.seed, stage=job.stage, rank=parallel.rank)
        else:
            set_random_state(restored.random, parallel.device)
        try:
            with closing(micro_batches):  # ends the workers
                for number in range(restored.step, self.steps):
                    self._report(self._step(number, micro_batches))
                    self._evaluate(number + 1)
                    if (number + 1) % job.settings.save_steps == 0 or number + 1 == self.steps:
                        save(parallel, self.store, number + 1, self.training, self.metrics)
        except BaseException:
            if self.metrics is not None:
                with suppress(StorageError):  # the lines after the last saved state will be made again
                    self.metrics.close()
            raise
        finally:
            self.progress.finish()
            parallel.finish_trackers()
        parallel.whole(job.model)
        return self._result(resumed_from=restored.step)

    def _step(self, number: int, micro_batches: Iterator[Loaded]) -> dict[str, Any]:
        """One optimizer step (``number`` from 0); returns its line of metrics."""
        began = time.perf_counter()
        sums = StepSums(self.parallel.device)
        tried: list[tuple[Batch, float | None]] = []
        waited = self._accumulate(number, micro_batches, sums, tried)
        total = totals(self.parallel.sum(sums.tensor()))
        if not math.isfinite(total["loss"]):
            self._stop(number, f"the loss is {total['loss']}", tried)
        optimizer, schedule = self.training.optimizer, self.training.schedule
        lr, grad_norm = float(schedule.get_last_lr()[0]), None
        if total["divisor"] > 0:
            grad_norm = self._divide_and_clip(total["divisor"])
            if not math.isfinite(grad_norm):
                self._stop(number, f"the gradient's norm is {grad_norm}", tried)
        else:
            optimizer.zero_grad(set_to_none=True)
            if self.parallel.is_main:
                log.warning("stage %s, step %d: no token has any weight; it is skipped", self.job.stage, number + 1)
        optimizer.step()  # without gradients it moves nothing
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        return step_row(
            stage=self.job.stage,
            step=number + 1,
            total=total,
            lr=lr,
            grad_norm=grad_norm,
            seconds=time.perf_counter() - began,
            waited=waited,
        )

    def _accumulate(
        self,
        number: int,
        micro_batches: Iterator[Loaded],
        sums: StepSums,
        tried: list[tuple[Batch, float | None]],
    ) -> float:
        """Forward and backward of a step's micro-batches; returns the seconds spent waiting for data.

        All with images come first. Before the first one without, ranks add up their images' weights, if the policy asks
        for the mean; every rank has as many of either kind, so all meet there.
        """
        waited, text_weight, last = 0.0, None, False
        while not last:
            asked = time.perf_counter()
            loaded = next(micro_batches)
            waited += time.perf_counter() - asked
            assert loaded.step == number, f"the loader is at step {loaded.step}, the loop at {number}"
            last = loaded.is_last_of_step
            if text_weight is None and self.job.step.needs_mean_weight and not loaded.info.micro.has_image:
                text_weight = self._mean_image_weight(sums)
            tried.append((loaded.batch, text_weight))
            with self.parallel.accumulate(self.module, last=last):
                output: StepOutput = self.module(loaded.batch.to(self.parallel.device, non_blocking=True), text_weight)
                torch.autograd.backward(output.loss_sum)
            sums.add(output, loaded.batch)
        return waited

    def _mean_image_weight(self, sums: StepSums) -> float:
        weight, tokens = self.parallel.sum(sums.image_share()).tolist()
        return text_only_weight(
            self.job.step.text_only, image_weight_sum=weight, image_tokens=tokens, minimum=self.job.step.minimum
        )

    def _divide_and_clip(self, divisor: float) -> float:
        """Gradients of sums -> of the step's mean, then clipped; returns the norm before clipping."""
        parameters = list(self.training.trained.values())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # times the number of ranks: DDP has averaged over them what is to be summed
        torch._foreach_mul_(gradients, self.parallel.world / divisor)
        return float(self.parallel.clip(parameters, self.job.settings.max_grad_norm))

    def _stop(self, number: int, what: str, tried: list[tuple[Batch, float | None]]) -> NoReturn:
        """All ranks come here together: sums and norms are the same on each.

        Raises:
            NonFiniteError: always.
        """
        found = self.parallel.ranks.gather(find_non_finite(self.bare, tried, self.parallel.device))
        details = [f"rank {rank}: {text}" if len(found) > 1 else text for rank, text in enumerate(found) if text]
        newest = self.parallel.ranks.from_main(self.store.newest())
        good = "there is no saved state yet" if newest is None else f"the last good state is {newest}"
        error = NonFiniteError(
            f"stage {self.job.stage}, step {number + 1} of {self.steps}: {what}; "
            + ("; ".join(details) or "each micro-batch alone is finite, their sum is not")
            + f"; {good}. Nothing was saved after it. Look at these samples, or lower the stage's learning_rate or "
            "max_grad_norm; with the same settings the same command stops here again"
        )
        raise_everywhere(error)

    def _report(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(row)
        self.progress.step(row)
        figures = {name: value for name, value in row.items() if name not in ("step", "stage") and value is not None}
        self.parallel.track(figures, row["step"])
        for hook in self.job.on_step:
            hook(row)

    def _evaluate(self, step: int) -> None:
        """Before the state of this step is saved, so that a continued run has the line once."""
        figures = None if self.job.evaluate is None else self.job.evaluate(step)
        if figures is None:
            return
        if self.metrics is not None:
            self.metrics.write({"kind": EVALUATION, "step": step, "stage": self.job.stage, **figures})
        of = figures["benchmarks"].items()
        self.parallel.track({f"{name} accuracy": result["accuracy"] for name, result in of}, step)

    def _result(self, *, resumed_from: int) -> StageResult:
        rows: list[dict[str, Any]] = []
        if self.metrics is not None:
            self.metrics.close()
            rows = read_metrics(self.metrics.path)
            assert [row["step"] for row in rows] == list(range(1, self.steps + 1)), f"{self.metrics.path}: steps"
        rows = self.parallel.ranks.from_main(rows)
        first, last = first_and_last(rows)
        return StageResult(
            steps=self.steps,
            resumed_from=resumed_from,
            skipped=sum(row["skipped"] for row in rows),
            samples=sum(row["samples"] for row in rows),
            tokens=sum(row["tokens"] for row in rows),
            sequence_tokens=sum(row["sequence_tokens"] for row in rows),
            loss_first=first,
            loss_last=last,
            trainable_parameters=sum(parameter.numel() for parameter in self.training.trained.values()),
            seconds=sum(row["seconds"] for row in rows),
            metrics=self.job.metrics,
        )
