"""The evaluation that a run ends with: each method's checkpoint, and a few answers for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpa.evaluate.checkpoint import evaluate_checkpoint
from dpa.evaluate.progress import EvaluationProgress
from dpa.evaluate.samples import pick_samples
from dpa.evaluate.scores import PREDICTIONS, Scored, read_scores, scores_path
from dpa.log import get_logger
from dpa.pipeline.folder import RunFolder
from dpa.recipe import MethodName, Recipe
from dpa.results import ARTEFACTS
from dpa.store import disk_errors, write_json

log = get_logger(__name__)


def evaluate_method(recipe: Recipe, method: MethodName, folder: Path) -> dict[str, Any]:
    """Benchmark -> result of the checkpoint that ``folder`` links.

    Predictions lie in the run, keyed by the weights: a killed evaluation continues, a finished one is read.
    """
    settings = recipe.evaluate
    assert settings.data is not None, "the recipe's own check"
    log.info("%s: evaluation on %s", method, ", ".join(settings.benchmarks))
    with disk_errors(folder):
        checkpoint = str(folder / ARTEFACTS["finetune"])
        with EvaluationProgress() as progress:
            out = folder / PREDICTIONS
            return evaluate_checkpoint(checkpoint, settings=settings, out=out, progress=progress.of).results


def write_samples(recipe: Recipe, folder: RunFolder) -> None:
    """``samples.json``: drawn questions with every method's answer, pictures included."""
    if "lab" not in recipe.evaluate.benchmarks:
        return
    assert recipe.evaluate.data is not None, "the recipe's own check"
    scores: dict[str, list[Scored]] = {
        method: read_scores(scores_path(folder.of(method) / PREDICTIONS, "lab")) for method in recipe.methods
    }
    samples = pick_samples(recipe.evaluate.data, scores, seed=recipe.seed)
    with disk_errors(folder.path):
        write_json(folder.path / "samples.json", samples)
