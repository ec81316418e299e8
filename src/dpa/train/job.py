"""What a stage's training is given, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn import Parameter

from dpa.train.batches import BatchSource
from dpa.train.progress import ProgressSink
from dpa.train.settings import ParallelName, StageSettings, TrainSettings
from dpa.train.step import StepSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """Which caches a stage uses, and what their numbers depend on."""

    root: Path = Path()
    """Folder of all caches."""
    text: dict[str, Any] | None = None
    """Inputs of the text cache (JSON-able); None: the text-only pass is made in each step."""
    vision: dict[str, Any] | None = None
    """Inputs of the vision cache; None: images are decoded in each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageJob:
    """One stage. The model is changed in place; what to do with it afterwards is the caller's."""

    stage: str
    """Name in metrics and messages."""
    model: nn.Module
    """A LLaVA, or an LLM with its adapter; ``set_trainable`` has been called. Ranks start from rank 0's weights; the
    others' may be on the meta device, as may the reference's."""
    step: StepSettings
    """The objective (``step_settings``)."""
    settings: StageSettings
    train: TrainSettings
    seed: int
    """Of dropout; the data's order has its own, from the source."""
    batches: BatchSource
    work: Path
    """An existing folder, of this job alone: ``metrics.jsonl`` and ``states/``."""
    fingerprint: str
    """Of everything that the result depends on; saved states of another job are refused."""
    parallel: ParallelName = "ddp"
    """How ranks share the work; with one rank it makes no difference."""
    reference: nn.Module | None = None
    """The frozen text-only LLM of objective ``prior``."""
    caches: Caches = Caches()
    """What is read from disk in place of passes; filled before the first step."""
    log_dir: Path | None = None
    """For the trackers; None: ``work/logs``."""
    progress: ProgressSink | None = None
    """None: a bar or lines on stderr."""
    on_step: tuple[Callable[[Mapping[str, Any]], None], ...] = field(default=())
    """Called on every rank after each optimizer step with its line of metrics (timings are the rank's own)."""

    evaluate: Callable[[int], Mapping[str, Any] | None] | None = None
    """Called on every rank after each optimizer step with its number. What it returns (the same on every rank) becomes
    a line of metrics.jsonl of kind ``evaluation``. It leaves weights, flags and random generators as they are."""

    @property
    def metrics(self) -> Path:
        """One line per optimizer step, and one per evaluation."""
        return self.work / "metrics.jsonl"

    @property
    def states(self) -> Path:
        """Saved states."""
        return self.work / "states"

    def trained(self) -> dict[str, Parameter]:
        """Name -> trainable parameter, in the model's order."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a finished stage says about itself. The weights are in the job's model."""

    steps: int
    resumed_from: int
    """Steps that an earlier start had done."""
    skipped: int
    """Steps without any weighted token: nothing was learnt in them."""
    samples: int
    tokens: int
    """Supervised."""
    sequence_tokens: int
    loss_first: float
    """Mean over the first twentieth of the steps, nats per token; NaN where every step was skipped."""
    loss_last: float
    """Mean over the last twentieth."""
    trainable_parameters: int
    seconds: float
    """Of all steps, over all starts, saving not included."""
    metrics: Path

    def summary(self) -> dict[str, Any]:
        """For manifests; JSON-able."""
        names = ("steps", "skipped", "samples", "tokens", "sequence_tokens", "loss_first", "loss_last")
        values = {name: getattr(self, name) for name in names}
        return values | {"trainable_parameters": self.trainable_parameters, "seconds": round(self.seconds, 3)}
