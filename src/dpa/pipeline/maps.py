"""Where relevance appears: a few samples of a stage explained at a few of its steps, for the run's report.

The samples are drawn by the seed as ``dpa explain RUN --samples`` draws them, the numbers are ``explain_sample``'s:
those of the training forward. The training does not notice: no gradient, random generators, flags and algorithms are
put back (``undisturbed``), and a map that cannot be made is a warning. Steps, not seconds, decide, and what is looked
at is no part of a stage's key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpa.analyze.explain import Rule
from dpa.analyze.maps import head_line, step_line, write_maps
from dpa.analyze.runs import MAPS
from dpa.errors import UserError
from dpa.log import get_logger
from dpa.models.vlm import Vlm
from dpa.pipeline.during import undisturbed
from dpa.pipeline.explain import Drawn, draw_samples, explain_drawn, stage_rule
from dpa.pipeline.inputs import StageInput
from dpa.pipeline.measure import OnStep
from dpa.recipe import MethodName, Recipe, StageName

log = get_logger(__name__)

MOMENTS = 5
"""Steps of a stage at which maps are made, at most."""


def moments(steps: int) -> frozenset[int]:
    """Up to :data:`MOMENTS` of a stage's steps (from 1): the first, the last, and some evenly between."""
    return (
        frozenset(1 + round(place * (steps - 1) / (MOMENTS - 1)) for place in range(MOMENTS)) if steps else frozenset()
    )


def watch_relevance(
    recipe: Recipe,
    method: MethodName,
    stage: StageName,
    data: StageInput,
    vlm: Vlm,
    work: Path,
    *,
    steps: int,
    dtype: torch.dtype,
) -> OnStep | None:
    """A hook for rank 0 that writes ``maps.jsonl`` into the stage's working folder.

    Args:
        steps: of the stage.
        dtype: of the stage's products.

    Returns:
        None where the recipe asks for no maps (``evaluate.maps: 0``) or no sample has an image.
    """
    if recipe.evaluate.maps == 0 or not data.audit.has_image.any():
        return None
    return _Watch(
        recipe=recipe,
        stage=stage,
        objective=recipe.objective(method, stage),
        rule=stage_rule(recipe, method, stage),
        data=data,
        vlm=vlm,
        work=work,
        at=moments(steps),
        dtype=dtype,
    )


@dataclass(slots=True, kw_only=True)
class _Watch:
    """Called after each optimizer step with its line of metrics."""

    recipe: Recipe
    stage: StageName
    objective: str
    rule: Rule
    data: StageInput
    vlm: Vlm
    work: Path
    at: frozenset[int]
    dtype: torch.dtype
    drawn: list[Drawn] = field(default_factory=list)
    """Read when the first map is due: a stage that is continued after its last map needs none."""

    def __call__(self, row: Mapping[str, Any]) -> None:
        step = int(row["step"])
        if step not in self.at:
            return
        try:
            self._look(step)
        except UserError as error:  # a family without a text-only pass, a file that has gone: vanilla trains on
            log.warning("stage %s: no relevance maps (evaluate.maps: 0 asks for none): %s", self.stage, error)
            self.at = frozenset()

    def _look(self, step: int) -> None:
        began = time.perf_counter()
        if not self.drawn:
            with_image = np.flatnonzero(self.data.audit.has_image).tolist()
            self.drawn = draw_samples(self.data.data, with_image, self.recipe.evaluate.maps, self.recipe.seed)
        model = self.vlm.model
        device = next(model.parameters()).device
        with (
            undisturbed(device),
            _without_dropout(model),
            torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32),
        ):
            name = f"step {step}"
            found = [explain_drawn(self.vlm, name, one, self.rule, self.data.data) for one in self.drawn]
        seconds = time.perf_counter() - began
        write_maps(
            self.work / MAPS,
            head_line(self.stage, self.objective, found),
            step_line(self.stage, step, found, seconds=seconds),
        )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module's flag is what it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
