"""All benchmarks by name. A new one is a module with the two functions of :class:`Benchmark` and a row below.

Whatever a benchmark reports, its dictionary has the keys of ``LabResult.to_dict()`` that tables and reports show
(``accuracy``, ``accuracy_interval``, ``blind_accuracy``, ``chance``, ``by_kind``, ``mean_over_kinds``,
``blind_mean_over_kinds``, ``n``), and its scored units lie in ``NAME.scores.jsonl`` (:mod:`dpa.evaluate.scores`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, ProcessorMixin

from dpa.errors import UserError
from dpa.evaluate.generate import Progress
from dpa.evaluate.lab import evaluate_lab, read_questions
from dpa.evaluate.native import check_native, evaluate_native
from dpa.evaluate.settings import PAPER, EvaluateSettings
from dpa.models.digest import digest_of_model


class Result(Protocol):
    """What an evaluation returns."""

    def to_dict(self) -> dict[str, Any]:
        """For summary.json."""


class Evaluate(Protocol):
    """Generates, scores, and writes predictions and scores into ``out``."""

    def __call__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        folder: Path,
        settings: EvaluateSettings,
        out: Path,
        *,
        progress: Progress | None = None,
        identity: str | None = None,
    ) -> Result: ...


class Check(Protocol):
    """Raises DataError where the files in ``folder`` cannot be used; needs no model."""

    def __call__(self, folder: Path, *, limit: int | None = None) -> object: ...


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row."""

    check: Check
    evaluate: Evaluate


def _native(name: str) -> Benchmark:
    return Benchmark(check=partial(check_native, name), evaluate=partial(evaluate_native, name))


BENCHMARKS: dict[str, Benchmark] = {
    **{name: _native(name) for name in PAPER},
    "lab": Benchmark(check=read_questions, evaluate=evaluate_lab),
}


def check_benchmarks(settings: EvaluateSettings) -> None:
    """Reads all that the evaluation will read but the pixels; before a training that takes hours.

    Raises:
        UserError: a file is missing or wrong, or ``data`` is not given; names file and line.
    """
    for name in settings.benchmarks:
        BENCHMARKS[name].check(_folder(settings), limit=settings.limit)


def run_benchmarks(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: EvaluateSettings,
    out: Path,
    *,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """All benchmarks of the settings, one after the other.

    Args:
        out: folder of predictions (in a run: ``scores.PREDICTIONS`` inside the method's folder).

    Returns:
        benchmark -> result, for summary.json.

    Raises:
        DpaError: see the benchmarks.
    """
    if not settings.benchmarks:
        return {}
    folder, identity = _folder(settings), digest_of_model(model.state_dict())
    return {
        name: BENCHMARKS[name]
        .evaluate(model, processor, folder, settings, out, progress=progress, identity=identity)
        .to_dict()
        for name in settings.benchmarks
    }


def _folder(settings: EvaluateSettings) -> Path:
    if settings.data is None:
        raise UserError("evaluate.benchmarks needs evaluate.data, the folder of the benchmark's files")
    return settings.data
