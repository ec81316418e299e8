"""``dpa eval``: any checkpoint that transformers loads, ours or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils.hub import cached_file

from dpa.errors import ModelError, UserError
from dpa.evaluate.benchmarks import BENCHMARKS, check_benchmarks, run_benchmarks
from dpa.evaluate.generate import Progress
from dpa.evaluate.settings import EvaluateSettings
from dpa.evaluate.tables import accuracy_table
from dpa.models.parts import resolve_part


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """What ``dpa eval`` prints."""

    checkpoint: str
    predictions: Path
    results: dict[str, dict[str, Any]]
    """Benchmark -> result."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"checkpoint": self.checkpoint, "predictions": str(self.predictions), "benchmarks": self.results}

    def text(self) -> str:
        """For people."""
        tables = [accuracy_table({"model": result}).text(title=name) for name, result in self.results.items()]
        return "\n\n".join([*tables, f"predictions: {self.predictions}"])


def evaluate_checkpoint(
    checkpoint: str,
    *,
    settings: EvaluateSettings,
    out: Path | None = None,
    progress: Progress | None = None,
) -> CheckpointResult:
    """Loads a checkpoint with stock transformers, in the precision that it is stored in, and evaluates it.

    Args:
        checkpoint: folder or hub id.
        settings: a recipe's, or :func:`settings_of`.
        out: folder of predictions; None: ``CHECKPOINT.eval`` beside the folder, ``eval/ID`` for a hub id.

    Raises:
        UserError: wrong files, or a checkpoint that does not load.
        DpaError: generation failed.
    """
    check_benchmarks(settings)
    folder = Path(checkpoint)
    if out is None:
        # the name as given: in a run's folder the checkpoint is a link into the store
        out = (
            folder.with_name(folder.name + ".eval") if folder.is_dir() else Path("eval", checkpoint.replace("/", "--"))
        )
    model, processor = load_checkpoint(checkpoint)
    results = run_benchmarks(model, processor, settings, out, progress=progress)
    return CheckpointResult(checkpoint=checkpoint, predictions=out, results=results)


def load_checkpoint(checkpoint: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model, on the accelerator where there is one, in evaluation mode, and processor.

    Raises:
        ModelError: it does not load.
    """
    source = resolve_part(checkpoint)
    try:
        if not Path(checkpoint).is_dir():
            cached_file(source, "config.json")  # one look decides whether the hub has it and can be reached
        # PIL's pixels, with and without torchvision: the ones that training saw
        processor = AutoProcessor.from_pretrained(source, backend="pil")  # type: ignore[no-untyped-call]
        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise ModelError(f"{checkpoint} does not load as an image-text-to-text model: {error}") from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    model.to(torch.device("cpu") if accelerator is None else accelerator).eval()
    return model, processor


def settings_of(*, benchmarks: Sequence[str], data: Path, limit: int | None, batch_size: int) -> EvaluateSettings:
    """Settings from the command line.

    Raises:
        UserError: an unknown benchmark, or a number out of range.
    """
    unknown = [name for name in benchmarks if name not in BENCHMARKS]
    if unknown or not benchmarks:
        raise UserError(f"no benchmark {', '.join(unknown) or 'is named'}; known: {', '.join(BENCHMARKS)}")
    try:
        return EvaluateSettings.model_validate(
            {"benchmarks": tuple(benchmarks), "data": data, "limit": limit, "batch_size": batch_size}
        )
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"evaluation: {told}") from None
