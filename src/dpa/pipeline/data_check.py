"""``dpa data check``: a source by itself, or every source of a recipe, stage by stage."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpa.data.audit import Progress, examine
from dpa.data.check import StageCheck, check_stage
from dpa.data.dataset import StageData
from dpa.data.records import Records, read_records
from dpa.data.settings import DataSettings, DataSource
from dpa.errors import RecipeError
from dpa.models.settings import ModelSettings
from dpa.pipeline.inputs import Inputs, store_of
from dpa.recipe import METHODS, STAGES, Recipe, StageName, StagesSettings

_LOOK = 1000
"""Samples that decide which stage a source by itself is for."""


@dataclass(frozen=True, slots=True)
class DataCheck:
    """The data of one or more stages."""

    llm: str
    stages: tuple[StageCheck, ...]
    data: tuple[StageData, ...]
    """The stages' samples, to show some."""
    seconds: float

    @property
    def can_train(self) -> bool:
        """Training would start on every stage's data."""
        return all(stage.refusal is None for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "can_train": self.can_train,
            "llm": self.llm,
            "seconds": round(self.seconds, 2),
            "stages": [stage.to_dict() for stage in self.stages],
        }


def check_recipe(recipe: Recipe, *, decode: bool | None = None, progress: Progress | None = None) -> DataCheck:
    """Every stage that a recipe's methods have. What it finds is kept in the recipe's store, where runs read it.

    Args:
        recipe: its ``data``, ``model`` and ``stages`` count.
        decode: images completely (True), their headers alone (False), by their number (None).
        progress: called now and then; starts anew at each stage.

    Raises:
        DataError: a file cannot be read at all.
        ModelError: tokenizer or tower cannot be found.
    """
    names = tuple(name for name in STAGES if name != "proxy" or any(METHODS[method].proxy for method in recipe.methods))
    return _check(recipe, names, decode, progress)


def check_source(
    source: DataSource | Path,
    *,
    stage: str = "auto",
    llm: str = "lab:llm",
    vision_tower: str = "lab:tower",
    max_length: int | None = None,
    max_bad_share: float = 0.01,
    store: Path | None = None,
    decode: bool | None = None,
    progress: Progress | None = None,
) -> DataCheck:
    """One source as the data of one stage.

    Args:
        source: files, images, format, limit, weight.
        stage: ``proxy``, ``pretrain``, ``finetune``, or ``auto``: captions (one answer a sample) are pretrain, or proxy
            where no sample has an image; anything else is finetune.
        llm: whose tokens are counted; the lab's small one has 2 to 3 times as many as a real one.
        vision_tower: for the tokens of an image.
        max_length: tokens; None: the stage's default.
        max_bad_share: unusable samples above this share would refuse the run.
        store: where what is found is kept; None: ``DPA_STORE`` or ``runs/.store``.
        decode: see :func:`check_recipe`.
        progress: called now and then.

    Raises:
        RecipeError: no such stage.
        DataError: a file cannot be read at all.
        ModelError: tokenizer or tower cannot be found.
    """
    source = source if isinstance(source, DataSource) else DataSource(path=source)
    recipe = Recipe(
        name="check",
        store=store,
        model=ModelSettings(llm=llm, vision_tower=vision_tower),
        data=DataSettings(captions=(source,), instructions=(source,), max_bad_share=max_bad_share),
    )
    found = _stage_for(read_records(source, store_of(recipe).cache(), seed=recipe.seed)) if stage == "auto" else stage
    names = {name: name for name in STAGES}
    if found not in names:
        raise RecipeError(f"--stage {stage}: no such stage; choose auto, {', '.join(STAGES)}")
    name = names[found]
    if max_length is not None:
        recipe = recipe.model_copy(update={"stages": _with_length(recipe.stages, name, max_length)})
    return _check(recipe, (name,), decode, progress)


def _stage_for(records: Records) -> str:
    with_image = False
    for sample in islice(records, _LOOK):
        if sum(turn.role == "assistant" for turn in sample.turns) != 1:
            return "finetune"
        with_image |= bool(sample.images)
    return "pretrain" if with_image else "proxy"


def _with_length(stages: StagesSettings, name: StageName, max_length: int) -> StagesSettings:
    return StagesSettings.model_validate(stages.model_dump() | {name: {"max_length": max_length}})


def _check(recipe: Recipe, names: tuple[StageName, ...], decode: bool | None, progress: Progress | None) -> DataCheck:
    began = time.perf_counter()
    inputs = Inputs(recipe, store_of(recipe))
    checks, stages = [], []
    for name in names:
        data = inputs.stage_data(name)
        found = examine(data, cache_dir=inputs.cache, progress=progress, decode=decode)
        checks.append(check_stage(data, found, stage=name, max_bad_share=recipe.data.max_bad_share))
        stages.append(data)
    return DataCheck(recipe.model.llm, tuple(checks), tuple(stages), time.perf_counter() - began)
