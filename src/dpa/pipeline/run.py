"""Stages to artefacts: the only place that knows their order.

Each stage of each method has a key: a digest of everything that its result depends on. A finished key is reused, a
half-finished one is continued, so methods share what they can and a changed setting redoes exactly what depends on it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpa.errors import RecipeError, UserError
from dpa.evaluate.benchmarks import check_benchmarks
from dpa.log import get_logger
from dpa.pipeline.evaluation import evaluate_method, write_samples
from dpa.pipeline.folder import RunFolder
from dpa.pipeline.inputs import Inputs, StageInput, settings_of, store_of
from dpa.pipeline.stages import StageRun, run_stage, stage_inputs
from dpa.recipe import METHODS, STAGES, MethodName, Recipe, StageName
from dpa.store import Entry, Store
from dpa.train.step import step_settings, wants_text_cache

log = get_logger(__name__)

Entries = dict[MethodName, dict[StageName, Entry]]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left."""

    folder: Path
    summary: dict[str, Any]
    """The content of ``summary.json``."""

    @property
    def checkpoint(self) -> Path:
        """The main method's Hugging Face folder (there once stage 3 has run)."""
        return self.folder / "checkpoint"

    def text(self) -> str:
        """For people: table, sample answers, where things are."""
        from dpa.pipeline.text import result_text

        return result_text(self.folder, self.summary)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"stages": self.rows}

    def text(self) -> str:
        """For people."""
        from dpa.pipeline.text import plan_text

        return plan_text(self.rows)


def stages_until(until: str | None) -> tuple[StageName, ...]:
    """The stages up to ``until``: a name or a number, None for all.

    Raises:
        RecipeError: no such stage.
    """
    if until is None:
        return STAGES
    names: dict[str, StageName] = {name: name for name in STAGES}
    names |= {str(number): name for number, name in enumerate(STAGES, 1)}
    if until not in names:
        raise RecipeError(f"--until {until}: no such stage; choose {', '.join(STAGES)} or 1, 2, 3")
    return STAGES[: STAGES.index(names[until]) + 1]


def stages_of(recipe: Recipe, until: str | None) -> tuple[StageName, ...]:
    """The stages that a call runs: up to ``until``, and with ``model.start_from`` stage 3 alone.

    Raises:
        RecipeError: no such stage, or one that ``model.start_from`` leaves out.
    """
    stages = stages_until(until)
    if recipe.model.start_from is None:
        return stages
    if "finetune" not in stages:
        raise RecipeError(
            f"--until {until}: with model.start_from stage 3 starts from a whole checkpoint, and stages 1 and 2 do not "
            "run; leave out --until or model.start_from"
        )
    return ("finetune",)


def run(recipe: Recipe, *, until: str | None = None) -> RunResult:
    """Runs the recipe's methods up to a stage; continues where an earlier start stopped.

    Args:
        recipe: see :func:`dpa.load_recipe`.
        until: last stage (``proxy``, ``pretrain``, ``finetune`` or 1, 2, 3); None: all, then evaluation and report.

    Raises:
        UserError: the input is wrong (before anything is trained wherever that can be known).
        DpaError: training failed; what is finished stays and the same call continues.
    """
    stages = stages_of(recipe, until)
    _one_process()
    folder = RunFolder(recipe)
    folder.prepare()
    store = store_of(recipe)
    inputs = Inputs(recipe, store)
    _check(recipe, inputs, stages)
    entries: Entries = {}
    for method in recipe.methods:
        entries[method] = {}
        for stage in stages:
            if stage == "proxy" and not METHODS[method].proxy:
                continue
            entry, reused = _run_stage(recipe, method, stage, inputs, entries[method], store, folder)
            entries[method][stage] = entry
            folder.stage_done(method, stage, entry, reused=reused)
        folder.write_metrics(method, entries[method])
    folder.write_manifest(entries)
    if "finetune" in stages and recipe.evaluate.benchmarks:
        for method in recipe.methods:
            folder.summary["methods"][method]["evaluation"] = evaluate_method(recipe, method, folder.of(method))
            folder.write_summary()
        write_samples(recipe, folder)
    folder.write_summary()
    _report(folder)
    return RunResult(folder=folder.path, summary=folder.summary)


def dry_run(recipe: Recipe, *, until: str | None = None) -> Plan:
    """Everything that :func:`run` checks before it trains, and what it would do; trains and writes no run folder.

    Raises:
        UserError: as :func:`run` would.
    """
    stages = stages_of(recipe, until)
    store = store_of(recipe)
    inputs = Inputs(recipe, store)
    _check(recipe, inputs, stages)
    rows = []
    for method in recipe.methods:
        done: dict[StageName, Entry] = {}
        for stage in stages:
            if stage == "proxy" and not METHODS[method].proxy:
                continue
            data = inputs.stage(stage)
            entry = store.entry(stage, stage_inputs(recipe, method, stage, inputs, data, done))
            done[stage] = entry
            state = "finished" if entry.finished() else "continues" if entry.partial.is_dir() else "new"
            rows.append(
                {
                    "method": method,
                    "stage": stage,
                    "objective": recipe.objective(method, stage),
                    "samples": len(data.audit.kept),
                    "quarantined": len(data.audit.quarantined),
                    "steps": data.batches(recipe, settings_of(recipe, stage), inputs.rules).steps,
                    "state": state,
                    "store": entry.folder.name,
                }
            )
    return Plan(rows)


def _one_process() -> None:
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise UserError(
            f"dpa run was started by a launcher with {ranks} processes; the pipeline works with one so far (only the "
            "training loop below it knows several): start it without torchrun or accelerate launch"
        )


def _check(recipe: Recipe, inputs: Inputs, stages: tuple[StageName, ...]) -> None:
    """Whatever can be found wrong before anything is trained is found here.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_benchmarks(recipe.evaluate)
    for stage in stages:
        settings = settings_of(recipe, stage)
        for name in sorted({recipe.objective(method, stage) for method in recipe.methods}):
            step_settings(settings, objective_name=name, fidelity=recipe.fidelity)
            wants_text_cache(settings, stage, objective_name=name, fidelity=recipe.fidelity)
    inputs.check_connector()
    for stage in stages:
        if _needed(recipe, stage):
            inputs.stage(stage)


def _needed(recipe: Recipe, stage: StageName) -> bool:
    return stage != "proxy" or any(METHODS[method].proxy for method in recipe.methods)


def _run_stage(
    recipe: Recipe,
    method: MethodName,
    stage: StageName,
    inputs: Inputs,
    done: dict[StageName, Entry],
    store: Store,
    folder: RunFolder,
) -> tuple[Entry, bool]:
    data: StageInput = inputs.stage(stage)
    entry = store.entry(stage, stage_inputs(recipe, method, stage, inputs, data, done))
    if entry.finished():
        log.info("%s, stage %s: finished before (%s), reused", method, stage, entry.folder.name)
        return entry, True
    with store.lock(entry):
        if entry.finished():  # by another process, while we waited
            return entry, True
        state = "continues" if entry.partial.is_dir() else "starts"
        log.info(
            "%s, stage %s: %s, objective %s, %d samples, works in %s",
            method,
            stage,
            state,
            recipe.objective(method, stage),
            len(data.audit.kept),
            entry.partial,
        )
        store.begin(entry)
        folder.training(method, entry)
        began = time.monotonic()
        log_dir = folder.of(method) / "logs" / stage
        artefact, manifest = run_stage(StageRun(recipe, method, stage, inputs, data, done, entry, log_dir))
        manifest["summary"]["wall_seconds"] = round(time.monotonic() - began, 3)
        store.finish(entry, artefact, manifest)
    return entry, False


def _report(folder: RunFolder) -> None:
    from dpa.analyze.report import write_report

    write_report(folder.path)
