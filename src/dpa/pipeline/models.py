"""Finished models by the names that users have for them: a checkpoint, a run, a stage of a run, one of its methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpa.analyze.explain import name_of, open_vlm, to_accelerator
from dpa.errors import UserError
from dpa.models.foreign import checkpoint_folder
from dpa.models.proxy import merge_proxy
from dpa.models.vlm import Vlm, build_vlm
from dpa.pipeline.inputs import settings_of
from dpa.recipe import METHODS, MethodName, Recipe, StageName, load_recipe
from dpa.results import ARTEFACTS, folder_of

STAGES: dict[str, StageName] = {"pretrain": "pretrain", "finetune": "finetune"}
"""Stages with images."""


@dataclass(frozen=True, slots=True)
class RunMethod:
    """A run's folder, or the folder of one of its further methods."""

    folder: Path
    """The run's."""
    recipe: Recipe
    method: MethodName

    @property
    def results(self) -> Path:
        """Where the method's results are linked."""
        return folder_of(self.folder, self.recipe, self.method)


def run_of(source: str) -> RunMethod | None:
    """``runs/NAME`` (its main method) or ``runs/NAME/METHOD``; None: it is no run's folder."""
    folder = Path(source)
    if (folder / "recipe.yaml").is_file():
        recipe = load_recipe(folder / "recipe.yaml")
        return RunMethod(folder, recipe, recipe.methods[0])
    if folder.name in METHODS and (folder.parent / "recipe.yaml").is_file():
        recipe = load_recipe(folder.parent / "recipe.yaml")
        method = next((name for name in recipe.methods if name == folder.name), None)
        return None if method is None else RunMethod(folder.parent, recipe, method)
    return None


def stage_named(stage: str) -> StageName:
    """Raises UserError for a stage without images."""
    if stage not in STAGES:
        raise UserError(f"--stage {stage}: choose {' or '.join(STAGES)} (stage 1 has no images)")
    return STAGES[stage]


def open_model(source: str, *, stage: StageName = "finetune", proxy: Path | None = None) -> tuple[Vlm, str]:
    """A model and its name.

    Args:
        source: run folder (the model with which ``stage`` ended), method's folder in a run, checkpoint folder, hub id.
        stage: ``pretrain``: the connector with the LLM that it was trained through, the proxy's adapter merged where
            the method has one. ``finetune``: the checkpoint.
        proxy: adapter (or run) to merge into the LLM; not for ``pretrain``, which has its own.

    Raises:
        ModelError: no LLaVA, or the proxy of another LLM.
        UserError: the stage is not finished.
    """
    run = run_of(source)
    if run is None:
        return open_vlm(source, proxy=proxy), name_of(source, proxy)
    name = f"{run.recipe.name}/{run.method}"
    if stage == "finetune":
        folder = checkpoint_folder(str(_finished(run, stage)))
        return open_vlm(folder, proxy=proxy), name + (" + proxy" if proxy is not None else "")
    connector = _finished(run, stage) / "mm_projector.bin"
    own = run.results / ARTEFACTS["proxy"] if METHODS[run.method].proxy else None
    vlm = build_vlm(
        run.recipe.model,
        adapter=own,
        connector=connector,
        seed=run.recipe.seed,
        image_mode=settings_of(run.recipe, stage).image_mode,
    )
    if proxy is not None:
        if own is not None:
            raise UserError(f"{source}, stage pretrain: its LLM has the proxy of {own} already; leave --proxy out")
        merge_proxy(vlm, proxy, checkpoint=connector.parent)
        name += " + proxy"
    return to_accelerator(vlm), f"{name}, pretrain"


def _finished(run: RunMethod, stage: StageName) -> Path:
    place = run.results / ARTEFACTS[stage]
    if not place.exists():
        raise UserError(f"{run.folder}: stage {stage} of {run.method} is not finished ({place} is missing)")
    return place
