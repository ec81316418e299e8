"""The plan of a recipe: per stage what is trained, what it needs, how long it takes, and what stands in the way."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers.utils.hub import cached_file

from dpa.data.settings import DataSource
from dpa.errors import UserError
from dpa.models.parts import resolve_part
from dpa.objectives import objective
from dpa.pipeline import dry_run
from dpa.pipeline.during import check_during
from dpa.pipeline.inputs import Inputs, settings_of, sources_of, store_of
from dpa.plan.count import BF16, FP32, Row, Sizes, flops, peak_bytes
from dpa.plan.known import DATA_SETS, DataSet
from dpa.plan.machine import Machine
from dpa.plan.shapes import Parts, read_parts
from dpa.plan.workload import Samples, Workload, assumed, counted, workload
from dpa.recipe import METHODS, STAGES, MethodName, Recipe, StageName
from dpa.train.batches import default_workers
from dpa.train.settings import ObjectiveName, ParallelName, StageSettings
from dpa.train.step import packs, wants_text_cache

RESERVE = 0.08
"""Of the memory, for the device's context and what the allocator cannot use."""
_IMAGES_PER_WORKER = 100.0
"""A second, decoded and resized by one loader process (docs/performance.md, 640 x 480)."""
_MANY_WORKERS = 32
"""Loader processes per GPU that hardly any machine has cores for."""

Level = Literal["error", "advice"]


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the way, or would be better."""

    level: Level
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}" if self.fix else self.what


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage; methods that share it are named together."""

    stage: StageName
    methods: tuple[MethodName, ...]
    objective: ObjectiveName
    state: str
    """``new``, ``continues``, ``finished``; ``not here`` where it cannot be known."""
    samples: int
    images: int
    """In all samples."""
    different_images: int
    labels: int
    """Supervised tokens in all samples."""
    counted: bool
    """Samples and lengths are the files'; False: assumed (``DATA_SETS``)."""
    steps: int
    micro_batches: float
    """Per step and device."""
    tokens: float
    trained: int
    frozen: int
    memory: dict[str, float]
    """Bytes per device by part, with ``total``."""
    fits: bool
    flops: float
    """Of the whole stage, all devices."""
    hours: float
    images_per_second: float
    """Of all devices at that speed."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A recipe's plan."""

    recipe: str
    machine: Machine
    parallel: ParallelName
    parts: Parts
    stages: list[StagePlan]
    disk: dict[str, float]
    """Bytes."""
    workers: int
    """Loader processes per device."""
    problems: list[Problem] = field(default_factory=list)

    @property
    def can_run(self) -> bool:
        """Nothing stands in the way."""
        return not any(problem.level == "error" for problem in self.problems)

    @property
    def hours(self) -> float:
        """Of all stages that are not finished."""
        return sum(stage.hours for stage in self.stages if stage.state != "finished")

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"can_run": self.can_run, "hours": self.hours}


def make_plan(recipe: Recipe, machine: Machine) -> RunPlan:
    """Counts everything; trains nothing.

    Raises:
        ModelError: a configuration that is neither here nor known.
    """
    parts = read_parts(recipe.model, lora_rank=recipe.stages.proxy.lora.rank)
    problems = list(_missing(recipe))
    states, inputs = _states(recipe, problems)
    problems += _refused(recipe, machine.ranks)
    stages = []
    for stage, methods in _distinct(recipe):
        samples = _samples(recipe, stage, inputs, parts, problems)
        if samples is None:
            continue
        planned = plan_stage(recipe, stage, methods, samples, parts, machine, states.get((methods[0], stage)))
        stages.append(planned)
        problems += fit_advice(recipe, planned, samples, parts, machine)
    workers = recipe.data.workers
    found = RunPlan(
        recipe=recipe.name,
        machine=machine,
        parallel=recipe.parallel,
        parts=parts,
        stages=stages,
        disk=_disk(recipe, parts, stages),
        workers=default_workers(min(machine.ranks, 8)) if workers is None else workers,
        problems=problems,
    )
    return replace(found, problems=[*problems, *_loader_advice(found)])


def plan_stage(
    recipe: Recipe,
    stage: StageName,
    methods: tuple[MethodName, ...],
    samples: Samples,
    parts: Parts,
    machine: Machine,
    state: str | None = None,
) -> StagePlan:
    """One stage under the recipe's settings."""
    settings, sizes = settings_of(recipe, stage), sizes_of(parts, recipe)
    work = _work(recipe, settings, samples, parts, machine.ranks)
    name = recipe.objective(methods[0], stage)
    row = row_of(recipe, name)
    cached = wants_text_cache(settings, stage, objective_name=name, fidelity=recipe.fidelity)
    per_micro = flops(
        sizes, stage, "vanilla" if cached else row, work.mean, checkpointing=settings.gradient_checkpointing
    )["total"]
    total = per_micro * work.micro_batches * machine.ranks * work.steps
    if cached:  # made once, before the first step
        without = flops(sizes, stage, row, work.mean, checkpointing=False)["text_only_pass"]
        total += without * len(samples) / max(1.0, work.samples_seen) * work.micro_batches * machine.ranks * work.steps
    memory = memory_of(recipe, stage, name, settings, work, sizes, machine)
    hours = total / (machine.ranks * machine.gpu.flops * machine.mfu[stage]) / 3600
    frozen, trained = sizes.parameters(stage)
    images = float(samples.images.mean()) * work.samples_seen
    return StagePlan(
        stage=stage,
        methods=methods,
        objective=name,
        state=state or "not here",
        samples=len(samples),
        images=int(samples.images.sum()),
        different_images=samples.different_images,
        labels=int(samples.supervised.sum()),
        counted=samples.counted,
        steps=work.steps,
        micro_batches=work.micro_batches,
        tokens=work.tokens,
        trained=trained,
        frozen=frozen,
        memory=memory,
        fits=memory["total"] <= machine.memory * (1 - RESERVE),
        flops=total,
        hours=hours,
        images_per_second=images / (hours * 3600) if hours else 0.0,
    )


def row_of(recipe: Recipe, name: ObjectiveName) -> Row:
    """Which passes an objective makes under the recipe's fidelity."""
    if not objective(name).needs_without:
        return "vanilla"
    return "official" if recipe.fidelity == "official" else "ours"


def sizes_of(parts: Parts, recipe: Recipe) -> Sizes:
    """What counting reads."""
    return Sizes(
        llm=parts.llm,
        tower=parts.tower,
        lora=parts.lora_parameters,
        lora_rank=recipe.stages.proxy.lora.rank,
        connector=parts.connector_parameters,
        llm_parameters=parts.llm_parameters,
        tower_parameters=parts.tower_parameters,
    )


def memory_of(
    recipe: Recipe,
    stage: StageName,
    name: ObjectiveName,
    settings: StageSettings,
    work: Workload,
    sizes: Sizes,
    machine: Machine,
) -> dict[str, float]:
    """Bytes per device by part at the largest micro-batch."""
    return peak_bytes(
        sizes,
        stage,
        row_of(recipe, name),
        work.peak,
        checkpointing=settings.gradient_checkpointing,
        number=FP32 if recipe.train.precision == "fp32" else BF16,
        parallel=recipe.parallel,
        ranks=machine.ranks,
        accumulates=work.micro_batches > 1,
        reference=stage == "finetune" and objective(name).frozen_reference,
    )


def fit_advice(
    recipe: Recipe, planned: StagePlan, samples: Samples, parts: Parts, machine: Machine
) -> Iterable[Problem]:
    """A setting that fits where the recipe's does not; a faster one where there is room.

    Candidates, the least costly first: the sharding as it is, then FSDP; micro-batches from the recipe's down; without
    checkpointing before with it.
    """
    stage = planned.stage
    settings = settings_of(recipe, stage)
    limit = machine.memory * (1 - RESERVE)
    if planned.fits and not settings.gradient_checkpointing:
        return
    shardings: list[ParallelName] = [recipe.parallel]
    if not planned.fits and machine.ranks > 1 and recipe.parallel not in ("fsdp", "zero3"):
        shardings.append("fsdp")
    sizes = sizes_of(parts, recipe)
    dealt: dict[int, Workload] = {}
    for parallel in shardings:
        for checkpointing in (False, True):
            micro = settings.micro_batch
            while micro:
                tried = settings.model_copy(update={"micro_batch": micro, "gradient_checkpointing": checkpointing})
                if planned.fits and (checkpointing or micro * 4 < settings.micro_batch):
                    return  # what there is is as good
                if micro not in dealt:
                    dealt[micro] = _work(recipe, tried, samples, parts, machine.ranks)
                work = dealt[micro]
                with_it = recipe.model_copy(update={"parallel": parallel})
                need = memory_of(with_it, stage, planned.objective, tried, work, sizes, machine)["total"]
                if need <= limit:
                    yield _better(recipe, planned, tried, parallel, need, machine)
                    return
                if settings.tokens_per_micro_batch is not None:
                    break  # micro_batch is not read
                micro //= 2
    yield Problem(
        "error",
        f"stage {stage} needs {_gb(planned.memory['total'])} of {_gb(machine.memory)}",
        "it fits with no micro-batch on this many GPUs: more GPUs with parallel=fsdp, or a smaller LLM",
    )


def _better(
    recipe: Recipe, planned: StagePlan, tried: StageSettings, parallel: ParallelName, need: float, machine: Machine
) -> Problem:
    stage, settings = planned.stage, settings_of(recipe, planned.stage)
    changes = [] if parallel == recipe.parallel else [f"parallel={parallel}"]
    if tried.micro_batch != settings.micro_batch:
        changes.append(f"stages.{stage}.micro_batch={tried.micro_batch}")
    if tried.gradient_checkpointing != settings.gradient_checkpointing:
        changes.append(f"stages.{stage}.gradient_checkpointing={str(tried.gradient_checkpointing).lower()}")
    told = " ".join(changes)
    if planned.fits:
        return Problem("advice", f"stage {stage} fits without recomputing activations", f"{told} ({_gb(need)}), faster")
    return Problem(
        "error",
        f"stage {stage} needs {_gb(planned.memory['total'])} per GPU, there are {_gb(machine.memory)}",
        f"use {told} ({_gb(need)})",
    )


def _work(recipe: Recipe, settings: StageSettings, samples: Samples, parts: Parts, ranks: int) -> Workload:
    return workload(
        samples,
        settings,
        image_tokens=parts.image_tokens,
        ranks=ranks,
        packing=packs(settings, recipe.fidelity),
        seed=recipe.seed,
    )


def _distinct(recipe: Recipe) -> list[tuple[StageName, tuple[MethodName, ...]]]:
    """Stages with the methods that share them: stage 1 is one for all, stage 2 one per objective and proxy."""
    groups: dict[tuple[Any, ...], list[MethodName]] = {}
    for method in recipe.methods:
        proxy = METHODS[method].proxy
        path = (recipe.objective(method, "pretrain"), proxy)
        if proxy and recipe.model.start_from is None:
            groups.setdefault(("proxy",), []).append(method)
        if recipe.model.start_from is None:
            groups.setdefault(("pretrain", *path), []).append(method)
        groups.setdefault(("finetune", *path, recipe.objective(method, "finetune")), []).append(method)
    ordered = sorted(groups.items(), key=lambda item: STAGES.index(item[0][0]))
    return [(key[0], tuple(methods)) for key, methods in ordered]


def _missing(recipe: Recipe) -> Iterable[Problem]:
    for source in {str(one.path): one for stage in STAGES for one in sources_of(recipe, stage)}.values():
        if not _there(source):
            yield Problem("error", f"{source.path} is not here", "download it, or name where it is (data.*.path)")
    for name in _models(recipe):
        if not _model_here(name):
            yield Problem("advice", f"{name} is not on this machine", "the first run downloads it")


def _refused(recipe: Recipe, ranks: int) -> Iterable[Problem]:
    """What the run's own check says on that many ranks; :func:`_states` has asked it for this one process."""
    try:
        check_during(recipe, ranks)
    except UserError as error:
        yield Problem("error", str(error), "")


def _there(source: DataSource) -> bool:
    return source.path.exists() or any(glob.iglob(str(source.path), recursive=True))


def _models(recipe: Recipe) -> tuple[str, ...]:
    model = recipe.model
    return (model.llm, model.vision_tower) if model.start_from is None else (model.start_from,)


def _model_here(name: str) -> bool:
    source = resolve_part(name)
    if Path(source).is_dir():
        return True
    try:
        return cached_file(source, "config.json", local_files_only=True) is not None
    except OSError:
        return False


def _states(recipe: Recipe, problems: list[Problem]) -> tuple[dict[tuple[MethodName, StageName], str], Inputs | None]:
    """What is finished already, and the opened data, where everything is here."""
    if any(problem.level == "error" for problem in problems) or not all(_model_here(name) for name in _models(recipe)):
        return {}, None
    try:
        rows = dry_run(recipe).rows
        return {(row["method"], row["stage"]): row["state"] for row in rows}, Inputs(recipe, store_of(recipe))
    except UserError as error:
        problems.append(Problem("error", str(error), ""))
        return {}, None


def _samples(
    recipe: Recipe, stage: StageName, inputs: Inputs | None, parts: Parts, problems: list[Problem]
) -> Samples | None:
    if inputs is not None:
        return counted(inputs.stage(stage).audit, parts.image_tokens)
    sets: list[tuple[DataSet, int]] = []
    for source in sources_of(recipe, stage):
        known = next((DATA_SETS[part] for part in (source.path.name, *source.path.parts) if part in DATA_SETS), None)
        if known is None:
            what = f"nothing is known of {source.path}, so stage {stage} is left out of the plan"
            problems.append(Problem("error", what, "plan where the data and the LLM's tokenizer are"))
            return None
        read = min(source.limit or known.samples, known.samples)
        sets.append((known, max(1, round(read * source.weight))))
    return assumed(sets, stage, settings_of(recipe, stage).max_length)


def _disk(recipe: Recipe, parts: Parts, stages: list[StagePlan]) -> dict[str, float]:
    found: dict[str, float] = {}
    for planned in stages:
        states = recipe.train.keep_states * 3.0 * FP32 * planned.trained
        found[f"saved states, {planned.stage}"] = max(found.get(f"saved states, {planned.stage}", 0.0), states)
    methods = len({method for planned in stages for method in planned.methods})
    if any(planned.stage == "proxy" for planned in stages):
        found["proxy adapter"] = float(FP32 * parts.lora_parameters)
    number = FP32 if recipe.train.precision == "fp32" else BF16
    whole = parts.llm_parameters + parts.tower_parameters + parts.connector_parameters
    found["checkpoints"] = float(methods * number * whole)
    for planned in stages:
        settings = settings_of(recipe, planned.stage)
        if wants_text_cache(
            settings, planned.stage, objective_name=planned.objective, fidelity=recipe.fidelity
        ):  # a float32 per supervised token; CAL keeps two
            per_token = FP32 * (2 if planned.objective == "cal" else 1)
            found["text-only cache"] = found.get("text-only cache", 0.0) + per_token * float(planned.labels)
        if recipe.train.vision_cache and planned.stage != "proxy":
            rows = planned.different_images * parts.image_tokens
            found[f"vision cache, {planned.stage}"] = 2.0 * rows * parts.tower.hidden
    return found


def _loader_advice(plan: RunPlan) -> Iterable[Problem]:
    if plan.machine.measured:
        return
    for planned in plan.stages:
        each = planned.images_per_second / plan.machine.ranks
        wanted = -(-int(each) // int(_IMAGES_PER_WORKER))
        if wanted >= _MANY_WORKERS:
            yield Problem(
                "advice",
                f"stage {planned.stage} would read {each:,.0f} images a second on each GPU, more than loaders decode",
                "the loader decides its speed, not the hours above; train.vision_cache=true with several epochs",
            )
        elif wanted > plan.workers and planned.images_per_second > 0:
            yield Problem(
                "advice",
                f"stage {planned.stage} reads {each:,.0f} images a second on each GPU",
                f"data.workers={wanted + 1} (a process decodes about {_IMAGES_PER_WORKER:.0f}); watch data_wait_share",
            )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
