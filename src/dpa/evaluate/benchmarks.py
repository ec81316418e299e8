"""All benchmarks by name. A new one is a module with the two functions of :class:`Benchmark` and a row below.

Whatever a benchmark reports, its dictionary has the keys of ``LabResult.to_dict()`` that tables and reports show
(``accuracy``, ``accuracy_interval``, ``blind_accuracy``, ``chance``, ``by_kind``, ``mean_over_kinds``,
``blind_mean_over_kinds``, ``n``), and its scored units lie in ``NAME.scores.jsonl`` (:mod:`dpa.evaluate.scores`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import ProcessorMixin

from dpa.errors import UserError
from dpa.evaluate.devices import Answerer, identity_of
from dpa.evaluate.generate import Progress
from dpa.evaluate.lab import evaluate_lab, read_questions
from dpa.evaluate.native import check_native, evaluate_native, rank_native
from dpa.evaluate.ranked import rank_lab
from dpa.evaluate.settings import PAPER, EvaluateSettings


class Result(Protocol):
    """What an evaluation returns."""

    def to_dict(self) -> dict[str, Any]:
        """For summary.json."""


class Evaluate(Protocol):
    """Generates, scores, and writes predictions and scores into ``out``."""

    def __call__(
        self,
        model: Answerer,
        processor: ProcessorMixin,
        folder: Path,
        settings: EvaluateSettings,
        out: Path,
        *,
        progress: Progress | None = None,
        identity: str | None = None,
    ) -> Result: ...


class Rank(Protocol):
    """Ranks the options, and writes rankings and scores into ``out``; None where there are none."""

    def __call__(
        self,
        model: Answerer,
        processor: ProcessorMixin,
        folder: Path,
        settings: EvaluateSettings,
        out: Path,
        *,
        progress: Progress | None = None,
        identity: str | None = None,
    ) -> dict[str, Any] | None: ...


class Check(Protocol):
    """Raises DataError where the files in ``folder`` cannot be used; needs no model."""

    def __call__(self, folder: Path, *, limit: int | None = None) -> object: ...


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One row."""

    check: Check
    evaluate: Evaluate
    rank: Rank
    """For the key ``ranked`` of its result (``settings.rank_options``)."""


def _native(name: str) -> Benchmark:
    check, evaluate = partial(check_native, name), partial(evaluate_native, name)
    return Benchmark(check=check, evaluate=evaluate, rank=partial(rank_native, name))


BENCHMARKS: dict[str, Benchmark] = {
    **{name: _native(name) for name in PAPER},
    "lab": Benchmark(check=read_questions, evaluate=evaluate_lab, rank=rank_lab),
}


def check_benchmarks(settings: EvaluateSettings) -> None:
    """Reads all that the evaluation will read but the pixels; before a training that takes hours.

    Raises:
        UserError: a file is missing or wrong, or ``data`` is not given; names file and line.
    """
    for name in settings.benchmarks:
        BENCHMARKS[name].check(_folder(settings), limit=settings.limit)


def run_benchmarks(
    model: Answerer,
    processor: ProcessorMixin,
    settings: EvaluateSettings,
    out: Path,
    *,
    progress: Callable[[str], Progress] | None = None,
    identity: str | None = None,
) -> dict[str, dict[str, Any]]:
    """All benchmarks of the settings, one after the other.

    Args:
        out: folder of predictions (in a run: ``scores.PREDICTIONS`` inside the method's folder).
        progress: name of what begins -> who is told how it goes.
        identity: digest of the weights; None: computed.

    Returns:
        benchmark -> result, for summary.json.

    Raises:
        DpaError: see the benchmarks.
    """
    results: dict[str, dict[str, Any]] = {}
    if not settings.benchmarks:
        return results
    weights = identity_of(model) if identity is None else identity
    for name in settings.benchmarks:
        row, folder = BENCHMARKS[name], _folder(settings)
        shown = None if progress is None else progress(name)
        result = row.evaluate(model, processor, folder, settings, out, progress=shown, identity=weights).to_dict()
        if settings.rank_options:
            shown = None if progress is None else progress(f"{name}, options")
            ranked = row.rank(model, processor, folder, settings, out, progress=shown, identity=weights)
            result |= {} if ranked is None else {"ranked": ranked}
        results[name] = result
    return results


def _folder(settings: EvaluateSettings) -> Path:
    if settings.data is None:
        raise UserError("evaluate.benchmarks needs evaluate.data, the folder of the benchmark's files")
    return settings.data
