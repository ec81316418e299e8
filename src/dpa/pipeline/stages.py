"""The stages as data: a table of three rows. What differs between them is how the model is joined and what is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from dpa.analyze.runs import MAPS, METRICS, PROBES
from dpa.data.chat import ENCODING_VERSION
from dpa.data.probe import probe_digest
from dpa.errors import CheckpointError
from dpa.log import get_logger
from dpa.models.checkpoint_io import load_checkpoint, save_checkpoint
from dpa.models.digest import digest_of_llm, digest_of_model, digest_of_part
from dpa.models.freeze import set_trainable
from dpa.models.legacy import write_mm_projector
from dpa.models.lora import attach_lora, save_adapter
from dpa.models.parts import grow_vocabulary, load_llm, resolve_part
from dpa.models.vlm import Vlm, build_vlm
from dpa.objectives import objective
from dpa.pipeline.during import during
from dpa.pipeline.folder import versions
from dpa.pipeline.inputs import Inputs, StageInput, settings_of
from dpa.pipeline.maps import watch_relevance
from dpa.pipeline.measure import OnStep, watch_pretrain
from dpa.recipe import MethodName, Recipe, StageName
from dpa.results import ARTEFACTS
from dpa.store import Entry, disk_errors
from dpa.train.job import Caches, StageJob, StageResult
from dpa.train.loop import train_stage
from dpa.train.parallel import compute_dtype, sharing_of
from dpa.train.ranks import Ranks
from dpa.train.settings import StageSettings
from dpa.train.step import packs, step_settings, wants_text_cache, window_of

log = get_logger(__name__)

_DO_NOT_MATTER = {"save_steps", "text_cache"}
"""Settings of a stage that change nothing in its result (``text_cache``: what it comes to is in the key by itself)."""
_OF_RELEVANCE = {"minimum", "maximum", "window", "text_positions"}
"""Settings that the uniform objective does not read."""


@dataclass(frozen=True, slots=True)
class StageRun:
    """One stage of one method, about to be trained."""

    recipe: Recipe
    method: MethodName
    stage: StageName
    inputs: Inputs
    data: StageInput
    done: dict[StageName, Entry]
    """Earlier stages of this method."""
    entry: Entry
    log_dir: Path
    ranks: Ranks

    @property
    def settings(self) -> StageSettings:
        """Of this stage."""
        return settings_of(self.recipe, self.stage)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of weights that are not trained."""
        return compute_dtype(self.recipe.train)

    @property
    def weights(self) -> bool:
        """Rank 0 reads models' files; the others get their weights from it."""
        return self.ranks.is_main

    def artefact_of(self, stage: StageName) -> Path | None:
        """What an earlier stage left; None where the method has no such stage."""
        return self.done[stage].folder / ARTEFACTS[stage] if stage in self.done else None


@dataclass(frozen=True, slots=True)
class Made:
    """A joined model."""

    model: nn.Module
    vlm: Vlm | None
    """None in stage 1, which has no image."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One row."""

    join: Callable[[StageRun], Made]
    prove: Callable[[StageRun, Made], dict[str, Any]]
    """What must hold before training; returns what the manifest says about it."""
    keep: Callable[[StageRun, Made, Path], dict[str, Any]]
    """Writes the artefact into a folder; returns what the manifest says about it."""


def stage_inputs(
    recipe: Recipe,
    method: MethodName,
    stage: StageName,
    inputs: Inputs,
    data: StageInput,
    done: dict[StageName, Entry],
) -> dict[str, Any]:
    """Everything that a stage's result depends on (JSON-able): the content of its key."""
    name = recipe.objective(method, stage)
    dropped = _DO_NOT_MATTER | (_OF_RELEVANCE if name == "uniform" else set()) | {"objective"}
    own = settings_of(recipe, stage)
    settings = own.model_dump(mode="json", exclude=dropped)
    # What is in force, whether it was asked for or chosen (packing matters because it rounds differently).
    settings["packing"] = packs(own, recipe.fidelity)
    if "window" in settings:
        settings["window"] = window_of(own, name)
    if own.tokens_per_micro_batch is not None:
        del settings["micro_batch"]  # not read
    train = recipe.train
    found: dict[str, Any] = {
        "objective": name,
        "fidelity": recipe.fidelity,
        "seed": recipe.seed,
        "settings": settings,
        "precision": train.precision,
        "attention": recipe.model.attention,
        "data": data.audit.digest,
        "llm": inputs.llm,
    }
    if stage != "proxy":
        found["tower"] = inputs.tower
        found["vision_feature_layer"] = recipe.model.vision_feature_layer
    if stage == "pretrain":
        found["proxy"] = done["proxy"].key if "proxy" in done else None
        found["connector_from"] = inputs.connector_from
        if recipe.model.connector != "mlp2x_gelu":  # named only then: keys of before there were others stay valid
            found["connector_kind"] = recipe.model.connector
    if stage == "finetune" and inputs.start_from is not None:
        found["start_from"] = inputs.start_from
    elif stage == "finetune":
        found["connector"] = done["pretrain"].key
    # rounded otherwise; named only where they are on, so that nothing is trained again where they are off
    if _text_cached(recipe, method, stage):
        found["text_cache"] = True
    if _vision_cached(recipe, stage):
        found["vision_cache"] = True
    return found


def _text_cached(recipe: Recipe, method: MethodName, stage: StageName) -> bool:
    name = recipe.objective(method, stage)
    return wants_text_cache(settings_of(recipe, stage), stage, objective_name=name, fidelity=recipe.fidelity)


def _vision_cached(recipe: Recipe, stage: StageName) -> bool:
    return recipe.train.vision_cache and stage != "proxy"


def _caches(run: StageRun) -> Caches:
    """The caches of a stage and what their numbers depend on, but for device and versions (``train.prepare``)."""
    recipe, settings, text, vision = run.recipe, run.settings, None, None
    shared = {"data": run.data.audit.digest, "precision": str(run.frozen_dtype)}
    if _text_cached(recipe, run.method, run.stage):
        text = shared | {
            "encoding": ENCODING_VERSION,
            "llm": run.inputs.llm,
            "proxy": run.done["proxy"].key if run.stage == "pretrain" and "proxy" in run.done else None,
            "reference": run.stage == "finetune",  # whose vocabulary the model's image token has not enlarged
            "attention": recipe.model.attention,
            "format": settings.format,
            "max_length": settings.max_length,
            "text_positions": settings.text_positions,
            "packing": packs(settings, recipe.fidelity),
        }
    if _vision_cached(recipe, run.stage):
        vision = shared | {
            "tower": run.inputs.tower,
            "layer": recipe.model.vision_feature_layer,
            "image_mode": settings.image_mode,
        }
    return Caches(root=run.inputs.cache, text=text, vision=vision)


def run_stage(run: StageRun) -> tuple[Path, dict[str, Any]]:
    """Joins, trains, keeps; all ranks call it. Returns the folder to publish and the manifest's content."""
    row, ranks = STAGE_TABLE[run.stage], run.ranks
    made = ranks.together(lambda: row.join(run))
    trainable = set_trainable(made.model, run.stage)
    log.info("%s", trainable)
    batches = run.data.batches(run.recipe, run.settings, run.inputs.rules)
    job = StageJob(
        stage=run.stage,
        model=made.model,
        step=step_settings(
            run.settings, objective_name=run.recipe.objective(run.method, run.stage), fidelity=run.recipe.fidelity
        ),
        settings=run.settings,
        train=run.recipe.train,
        parallel=run.recipe.parallel,
        seed=run.recipe.seed,
        batches=batches,
        reference=ranks.together(lambda: _reference(run)),
        caches=_caches(run),
        work=run.entry.partial,
        fingerprint=run.entry.key,
        log_dir=run.log_dir,
        evaluate=_during(run, made),
        on_step=_hooks(run, made, steps=batches.steps),
    )
    proof = ranks.main_alone(lambda: row.prove(run, made))
    result = train_stage(job)
    artefact = run.entry.partial / "artefact"
    kept = ranks.main_alone(lambda: _keep(run, made, result, artefact))
    manifest = {
        "method": run.method,
        "summary": result.summary(),
        "trainable": {"parts": trainable.numel_by_part, "total": trainable.total, "frozen": trainable.frozen},
        "data": run.data.audit.summary(),
        **proof,
        "versions": versions(),
        **kept,
    }
    return artefact, manifest


def _hooks(run: StageRun, made: Made, *, steps: int) -> tuple[OnStep, ...]:
    """What looks at the model in training, on rank 0; none of it changes anything."""
    recipe, vlm, work = run.recipe, made.vlm, run.entry.partial
    if vlm is None or not run.ranks.is_main:
        return ()
    hooks = [watch_pretrain(recipe, vlm, work, dtype=run.frozen_dtype)] if run.stage == "pretrain" else []
    # with shards no rank has the whole model while it trains
    if sharing_of(recipe.parallel, run.stage, run.ranks.world) == "copies":
        hooks.append(
            watch_relevance(recipe, run.method, run.stage, run.data, vlm, work, steps=steps, dtype=run.frozen_dtype)
        )
    return tuple(hook for hook in hooks if hook is not None)


def _during(run: StageRun, made: Made) -> Callable[[int], Mapping[str, Any] | None] | None:
    if run.stage != "finetune":
        return None
    autocast = None if run.frozen_dtype == torch.float32 else run.frozen_dtype
    return during(made.vlm, run.recipe.evaluate, run.ranks, run.entry.partial, autocast)


def _keep(run: StageRun, made: Made, result: StageResult, artefact: Path) -> dict[str, Any]:
    with disk_errors(artefact):
        shutil.rmtree(artefact, ignore_errors=True)
        artefact.mkdir()
        kept = STAGE_TABLE[run.stage].keep(run, made, artefact)
        shutil.copyfile(result.metrics, artefact / METRICS)
        for name in (PROBES, MAPS):
            if (run.entry.partial / name).is_file():
                shutil.copyfile(run.entry.partial / name, artefact / name)
    return kept


def _reference(run: StageRun) -> nn.Module | None:
    """For objective ``prior``: the LLM that stage 3 starts from, frozen. In stage 2 the model's own LLM is frozen."""
    if run.stage == "pretrain" or not objective(run.recipe.objective(run.method, run.stage)).frozen_reference:
        return None
    if run.inputs.start is not None:
        start = load_checkpoint(
            run.inputs.start.folder,
            dtype=run.frozen_dtype,
            attention=run.recipe.model.attention,
            weights=run.weights,
        )
        return start.model.requires_grad_(False)
    llm = load_llm(run.recipe.model, dtype=run.frozen_dtype, weights=run.weights)
    llm.requires_grad_(False)
    return nn.Module.eval(llm)


def _llm_files(run: StageRun) -> str:
    return digest_of_part(resolve_part(run.recipe.model.llm), run.recipe.model.llm_revision)


def _prove_nothing(run: StageRun, made: Made) -> dict[str, Any]:
    return {}


def _prove_original(run: StageRun, made: Made) -> dict[str, Any]:
    """Stage 3 starts from the original LLM: its tensors in memory against the original's own files.

    Raises:
        CheckpointError: they differ.
    """
    memory = digest_of_llm(made.model)
    original = _original_digest(run, made)
    if memory != original:
        raise CheckpointError(
            f"stage 3 would not start from the original LLM: {run.inputs.llm_folder} has digest {original[:12]}, the "
            f"joined model's LLM {memory[:12]}; remove {run.entry.partial} and start again"
        )
    proof: dict[str, Any] = {"llm_original": original, "llm_at_start": memory}
    if run.inputs.start is not None:
        proof["start_from"] = {"source": run.recipe.model.start_from, "files": run.inputs.start_from}
    return proof


def _original_digest(run: StageRun, made: Made) -> str:
    rows = made.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    folder = run.inputs.llm_folder
    if rows == AutoConfig.from_pretrained(folder).get_text_config().vocab_size:
        return digest_of_llm(folder, cast=torch.float32)
    llm = load_llm(run.recipe.model, dtype=torch.float32)  # the vocabulary has grown by the image token
    grow_vocabulary(llm, rows)
    return digest_of_llm(llm)


def _join_proxy(run: StageRun) -> Made:
    recipe = run.recipe
    llm = load_llm(recipe.model, dtype=run.frozen_dtype, weights=run.weights)
    return Made(attach_lora(llm, recipe.stages.proxy.lora, seed=recipe.seed), None)


def _keep_adapter(run: StageRun, made: Made, folder: Path) -> dict[str, Any]:
    digest = _llm_files(run)
    assert isinstance(made.model, PeftModel)
    save_adapter(made.model, folder / ARTEFACTS["proxy"], base=run.recipe.model.llm, base_digest=digest)
    return {"llm_files": digest}


def _join_pretrain(run: StageRun) -> Made:
    vlm = build_vlm(
        run.recipe.model,
        adapter=run.artefact_of("proxy"),
        dtype=run.frozen_dtype,
        seed=run.recipe.seed,
        image_mode=run.settings.image_mode,
        weights=run.weights,
    )
    return Made(vlm.model, vlm)


def _keep_connector(run: StageRun, made: Made, folder: Path) -> dict[str, Any]:
    assert made.vlm is not None
    place = folder / ARTEFACTS["pretrain"]
    place.mkdir()
    write_mm_projector(made.vlm.model.model.multi_modal_projector, place / "mm_projector.bin")
    return {}


def _join_finetune(run: StageRun) -> Made:
    if run.inputs.start is not None:
        return _join_whole(run, run.inputs.start.folder)
    connector = run.artefact_of("pretrain")
    assert connector is not None, "stage 2 comes before stage 3"
    vlm = build_vlm(
        run.recipe.model,
        connector=connector / "mm_projector.bin",
        dtype=torch.float32,  # trained: fp32 weights and optimizer states, whatever the compute dtype
        tower_dtype=run.frozen_dtype,
        seed=run.recipe.seed,
        image_mode=run.settings.image_mode,
        weights=run.weights,
    )
    return Made(vlm.model, vlm)


def _join_whole(run: StageRun, folder: Path) -> Made:
    """A whole checkpoint, trained on: fp32 weights, the tower in the compute dtype, this stage's image mode."""
    vlm = load_checkpoint(folder, dtype=torch.float32, attention=run.recipe.model.attention, weights=run.weights)
    vlm.model.model.vision_tower.to(run.frozen_dtype)
    vlm.processor.image_processor = run.inputs.image_processor(run.settings)
    return Made(vlm.model, vlm)


def _keep_checkpoint(run: StageRun, made: Made, folder: Path) -> dict[str, Any]:
    assert made.vlm is not None
    dtype = torch.bfloat16 if run.frozen_dtype == torch.bfloat16 else None
    save_checkpoint(made.vlm, folder / ARTEFACTS["finetune"], dtype=dtype)
    vlm = made.vlm
    return {
        "llm_at_end": digest_of_llm(made.model),
        "weights": digest_of_model(folder / ARTEFACTS["finetune"]),  # dpa export compares both
        "template_ids": probe_digest(vlm.tokenizer, vlm.rules),
    }


STAGE_TABLE: dict[StageName, Stage] = {
    "proxy": Stage(join=_join_proxy, prove=_prove_nothing, keep=_keep_adapter),
    "pretrain": Stage(join=_join_pretrain, prove=_prove_nothing, keep=_keep_connector),
    "finetune": Stage(join=_join_finetune, prove=_prove_original, keep=_keep_checkpoint),
}
"""Method, table of stages."""
