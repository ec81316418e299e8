"""``dpa eval``: any checkpoint that transformers loads, ours or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpa.errors import UserError
from dpa.evaluate.benchmarks import BENCHMARKS, check_benchmarks, run_benchmarks
from dpa.evaluate.devices import Devices, device_names
from dpa.evaluate.generate import Progress
from dpa.evaluate.load import load_model, open_processor
from dpa.evaluate.overview import average, overview
from dpa.evaluate.paper import PaperRow
from dpa.evaluate.predictions import folder_for
from dpa.evaluate.scores import write_results
from dpa.evaluate.settings import PAPER, SETS, EvaluateSettings, expand_names
from dpa.evaluate.tables import accuracy_table, percent
from dpa.store import disk_errors


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """What ``dpa eval`` prints."""

    checkpoint: str
    predictions: Path
    results: dict[str, dict[str, Any]]
    """Benchmark -> result."""
    paper: PaperRow | None = None
    """Of the paper, to stand beside the results."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "checkpoint": self.checkpoint,
            "predictions": str(self.predictions),
            "benchmarks": self.results,
            "average": average(self.results),
            "paper": None if self.paper is None else asdict(self.paper),
        }

    def text(self) -> str:
        """For people."""
        tables = [overview(self.results, self.paper)] if any(name in self.results for name in PAPER) else []
        others = {name: result for name, result in self.results.items() if name not in PAPER}
        tables += [accuracy_table({"model": result}).text(title=name) for name, result in others.items()]
        ranked = [_ranked(name, result["ranked"]) for name, result in self.results.items() if "ranked" in result]
        parts = [*tables, *(["\n".join(ranked)] if ranked else []), f"predictions: {self.predictions}"]
        return "\n\n".join(parts)


def _ranked(name: str, of: Mapping[str, Any]) -> str:
    """The second figure, said to be one."""
    low, high = of["accuracy_interval"]
    return f"{name}, options ranked: {percent(of['accuracy'])} [{percent(low)}, {percent(high)}] by {of['by']}"


def evaluate_checkpoint(
    checkpoint: str,
    *,
    settings: EvaluateSettings,
    out: Path | None = None,
    progress: Callable[[str], Progress] | None = None,
    paper: PaperRow | None = None,
) -> CheckpointResult:
    """Loads a checkpoint with stock transformers, in the precision that it is stored in, and evaluates it.

    Args:
        checkpoint: folder or hub id.
        settings: a recipe's, or :func:`settings_of`.
        out: folder of predictions; None: ``CHECKPOINT.eval`` beside the folder, ``eval/ID`` for a hub id.
        paper: a row of the paper (:func:`dpa.evaluate.paper.paper_row`) to show beside the average.

    Raises:
        UserError: wrong files, or a checkpoint that does not load.
        DpaError: generation failed.
    """
    check_benchmarks(settings)
    names = device_names(settings.devices)
    if out is None:
        out = folder_for(checkpoint)
    processor = open_processor(checkpoint)
    with disk_errors(out):  # before a model is loaded and answers are made that nothing can keep
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        model = load_model(checkpoint, names[0]) if len(names) == 1 else stack.enter_context(Devices(checkpoint, names))
        results = run_benchmarks(model, processor, settings, out, progress=progress)
    write_results(out, checkpoint, results)
    return CheckpointResult(checkpoint=checkpoint, predictions=out, results=results, paper=paper)


def settings_of(*, benchmarks: Sequence[str], data: Path, **others: Any) -> EvaluateSettings:
    """Settings from the command line.

    Args:
        benchmarks: names, also those of sets (``paper``, ``all``).
        data: folder of the benchmarks' files.
        others: further fields of :class:`EvaluateSettings`.

    Raises:
        UserError: an unknown benchmark, or a number out of range.
    """
    unknown = [name for name in expand_names(benchmarks) if name not in BENCHMARKS]
    if unknown or not benchmarks:
        known = ", ".join([*SETS, *BENCHMARKS])
        raise UserError(f"no benchmark {', '.join(unknown) or 'is named'}; known: {known}")
    try:
        return EvaluateSettings.model_validate({"benchmarks": tuple(benchmarks), "data": data, **others})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UserError(f"evaluation: {told}") from None
