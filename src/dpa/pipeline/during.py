"""A light evaluation during stage 3: a few questions, figures into metrics.jsonl, and a training that does not notice.

The loop calls it between two optimizer steps and knows nothing of benchmarks. What the training would notice is put
back: random generators of all kinds, training flags, generation settings (``generate_answers``), autograd's state, the
choice of algorithms. Compiled layers run uncompiled meanwhile, or the shapes of questions would be compiled, too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpa.errors import UserError
from dpa.evaluate.benchmarks import run_benchmarks
from dpa.evaluate.settings import EvaluateSettings
from dpa.log import get_logger
from dpa.models.vlm import Vlm
from dpa.recipe import Recipe
from dpa.train.determinism import get_random_state, set_random_state
from dpa.train.ranks import Ranks

log = get_logger(__name__)

FOLDER = "evaluations"
"""In the stage's working folder: the newest evaluation's answers, as predictions."""


def check_during(recipe: Recipe, world: int) -> None:
    """
    Args:
        recipe: of the run.
        world: number of ranks.

    Raises:
        UserError: the model lies in shards on several ranks, and rank 0 alone cannot ask it.
    """
    if recipe.evaluate.every_steps is not None and recipe.parallel != "ddp" and world > 1:
        raise UserError(
            f"evaluate.every_steps with parallel {recipe.parallel} on {world} ranks: no rank has the whole model while "
            "it trains; leave every_steps out (the evaluation at the end stays), or use parallel=ddp"
        )


@dataclass(frozen=True, slots=True)
class During:
    """What the loop calls after each step; see ``StageJob.evaluate``."""

    vlm: Vlm
    settings: EvaluateSettings
    ranks: Ranks
    work: Path
    """The stage's working folder."""
    autocast: torch.dtype | None
    """As the stage trains; None: float32."""

    def __call__(self, step: int) -> Mapping[str, Any] | None:
        """Figures after steps that are a multiple of ``every_steps``, on every rank; else None.

        Raises:
            DpaError: rank 0's evaluation failed, on every rank.
        """
        every = self.settings.every_steps
        if every is None or step % every:
            return None
        return self.ranks.main_alone(lambda: self._evaluate(step))

    def _evaluate(self, step: int) -> dict[str, Any]:
        began = time.monotonic()
        shutil.rmtree(
            self.work / FOLDER, ignore_errors=True
        )  # answers of an earlier step, or of this one before a kill
        light = self.settings.model_copy(
            update={"limit": self.settings.every_limit, "blind": False, "rank_options": False, "devices": 1}
        )
        model = self.vlm.model
        device = next(model.parameters()).device
        with (
            undisturbed(device),
            torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            # an identity by name: a digest of all weights would take longer than the questions
            found = run_benchmarks(model, self.vlm.processor, light, self.work / FOLDER, identity=f"step {step}")
        names = ("accuracy", "mean_over_kinds", "n", "unparsed_share", "empty_share")
        figures = {name: {key: result[key] for key in names} for name, result in found.items()}
        told = ", ".join(f"{name} {100 * of['accuracy']:.1f} % of {of['n']}" for name, of in figures.items())
        log.info("step %d: %s", step, told)
        return {"benchmarks": figures, "seconds": round(time.monotonic() - began, 3)}


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Generators, autograd and algorithms are afterwards what they were."""
    random_state = get_random_state(device)
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    compiler: Any = torch.compiler
    try:
        torch.use_deterministic_algorithms(False)  # generation may need what has no deterministic form
        with torch.no_grad(), compiler.set_stance("force_eager"):
            yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        set_random_state(random_state, device)


def during(
    vlm: Vlm | None, settings: EvaluateSettings, ranks: Ranks, work: Path, autocast: torch.dtype | None
) -> Callable[[int], Mapping[str, Any] | None] | None:
    """For ``StageJob.evaluate``; None where the settings ask for none or the stage has no image."""
    if vlm is None or settings.every_steps is None:
        return None
    return During(vlm, settings, ranks, work, autocast)
