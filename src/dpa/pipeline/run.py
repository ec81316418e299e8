"""Stages to artefacts: the only place that knows their order.

Each stage of each method has a key: a digest of everything that its result depends on. A finished key is reused, a
half-finished one is continued, so methods share what they can and a changed setting redoes exactly what depends on it.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dpa.errors import RecipeError, UserError
from dpa.evaluate.benchmarks import check_benchmarks
from dpa.launch import launched
from dpa.log import get_logger
from dpa.pipeline.during import check_during
from dpa.pipeline.evaluation import evaluate_method, write_samples
from dpa.pipeline.folder import RunFolder
from dpa.pipeline.inputs import Inputs, StageInput, settings_of, store_of
from dpa.pipeline.measure import measure_pretrain
from dpa.pipeline.stages import StageRun, run_stage, stage_inputs
from dpa.recipe import METHODS, STAGES, MethodName, Recipe, StageName
from dpa.store import Entry, Store
from dpa.train.ranks import Ranks, all_or_none, check_launcher, raise_everywhere
from dpa.train.step import step_settings, wants_text_cache

log = get_logger(__name__)

_DISK_SECONDS = 60.0

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
    check_launcher(recipe.parallel)
    with all_or_none(recipe.train) as ranks:
        folder = RunFolder(recipe)
        ranks.main_alone(folder.prepare)
        if recipe.gpus not in (None, ranks.world) and ranks.world > 1 and ranks.is_main:
            log.warning("the recipe says gpus %s, the launcher has started %d ranks", recipe.gpus, ranks.world)
        store, inputs = ranks.main_first(lambda: _checked(recipe, stages))
        _one_disk(store, ranks)
        entries: Entries = {}
        for method in recipe.methods:
            entries[method] = {}
            for stage in stages:
                if stage == "proxy" and not METHODS[method].proxy:
                    continue
                entry, reused = _run_stage(recipe, method, stage, inputs, entries[method], store, folder, ranks)
                entries[method][stage] = entry
                ranks.main_alone(partial(folder.stage_done, method, stage, entry, reused=reused))
            ranks.main_alone(partial(folder.write_lines, method, entries[method]))
        ranks.main_alone(lambda: _finish(recipe, folder, entries, evaluates="finetune" in stages))
        return RunResult(folder=folder.path, summary=ranks.from_main(folder.summary))


def _finish(recipe: Recipe, folder: RunFolder, entries: Entries, *, evaluates: bool) -> None:
    """Manifest, evaluation, report: rank 0's work."""
    folder.write_manifest(entries)
    if recipe.evaluate.after_pretrain:
        for method in recipe.methods:
            if "pretrain" in entries[method]:
                measure_pretrain(recipe, folder.of(method))
    if evaluates and recipe.evaluate.benchmarks:
        for method in recipe.methods:
            folder.summary["methods"][method]["evaluation"] = evaluate_method(recipe, method, folder.of(method))
            folder.write_summary()
        write_samples(recipe, folder)
    folder.write_summary()
    _report(folder)


def dry_run(recipe: Recipe, *, until: str | None = None) -> Plan:
    """Everything that :func:`run` checks before it trains, and what it would do; trains and writes no run folder.

    Raises:
        UserError: as :func:`run` would.
    """
    stages = stages_of(recipe, until)
    check_launcher(recipe.parallel)
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


def _checked(recipe: Recipe, stages: tuple[StageName, ...]) -> tuple[Store, Inputs]:
    """Rank 0 reads, checks and digests; the other ranks find its caches."""
    store = store_of(recipe)
    inputs = Inputs(recipe, store)
    _check(recipe, inputs, stages)
    inputs.digest()
    return store, inputs


def _one_disk(store: Store, ranks: Ranks) -> None:
    """Raises UserError on all ranks if one of them sees another store than rank 0."""
    sign = store.root / ".cache" / f"ranks-{os.getpid()}-{secrets.token_hex(4)}"
    ranks.main_alone(sign.touch)
    sign = ranks.from_main(sign)
    deadline = time.monotonic() + _DISK_SECONDS
    while not sign.exists() and time.monotonic() < deadline:  # network disks show new files late
        time.sleep(0.5)
    blind = [str(rank) for rank, seen in enumerate(ranks.gather(sign.exists())) if not seen]
    ranks.main_alone(lambda: sign.unlink(missing_ok=True))
    if blind:
        error = UserError(
            f"rank {', '.join(blind)} does not see the store of rank 0, {store.root}: all machines need one shared "
            "disk there (recipe: store, or DPA_STORE)"
        )
        raise_everywhere(error)


def _check(recipe: Recipe, inputs: Inputs, stages: tuple[StageName, ...]) -> None:
    """Whatever can be found wrong before anything is trained is found here.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_benchmarks(recipe.evaluate)
    check_during(recipe, launched().world)
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
    ranks: Ranks,
) -> tuple[Entry, bool]:
    data: StageInput = inputs.stage(stage)
    entry = store.entry(stage, stage_inputs(recipe, method, stage, inputs, data, done))
    _same_key(entry, ranks)
    if ranks.from_main(entry.finished()):
        log.info("%s, stage %s: finished before (%s), reused", method, stage, entry.folder.name)
        return entry, True
    with ExitStack() as locked:  # rank 0 holds the lock for all
        ranks.together(lambda: locked.enter_context(store.lock(entry) if ranks.is_main else nullcontext()))
        if ranks.from_main(entry.finished()):  # by another process, while we waited
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
        ranks.main_alone(lambda: store.begin(entry))
        ranks.main_alone(lambda: folder.training(method, entry))
        began = time.monotonic()
        log_dir = folder.of(method) / "logs" / stage
        artefact, manifest = run_stage(StageRun(recipe, method, stage, inputs, data, done, entry, log_dir, ranks))
        manifest["ranks"] = {"world": ranks.world, "parallel": recipe.parallel}
        manifest["summary"]["wall_seconds"] = round(time.monotonic() - began, 3)
        ranks.main_alone(lambda: store.finish(entry, artefact, manifest))
    return entry, False


def _same_key(entry: Entry, ranks: Ranks) -> None:
    keys = ranks.gather(entry.key)
    other = [str(rank) for rank, key in enumerate(keys) if key != keys[0]]
    if other:
        error = UserError(
            f"stage {entry.stage}: rank {', '.join(other)} reads other files than rank 0 (models or data of the same "
            "name with another content): copy them anew, or give a shared disk's"
        )
        raise_everywhere(error)


def _report(folder: RunFolder) -> None:
    from dpa.analyze.report import write_report

    write_report(folder.path)
