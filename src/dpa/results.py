"""Where a run's results lie, and the names that the reference's scripts give them. Imports no torch.

The results themselves stay in the store; a run's folder and the reference's ``checkpoints/`` hold links to them. In
``checkpoints/`` a link of ours moves on when the run is repeated with other settings, as the reference's output folder
would be written anew; whatever else lies there stays.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dpa.errors import UserError
from dpa.recipe import METHODS, MethodName, Recipe, StageName, load_recipe
from dpa.store import disk_errors

ARTEFACTS: dict[StageName, str] = {"proxy": "proxy", "pretrain": "connector", "finetune": "checkpoint"}
"""What a stage leaves, by the name that it has in its store entry and in the run's folder."""

_FOLDERS: dict[StageName, str] = {"proxy": "llm", "pretrain": "projectors", "finetune": "finetune"}
"""Where below ``checkpoints/`` the reference keeps what a stage leaves."""

_DATA_NAMES: dict[str, str] = {
    "blip_laion_cc_sbu_558k": "blip558k",
    "share_gpt4v_instruct_gpt4-vision_cap_100k": "sharegpt4v",
    "share-captioner_coco_lcs_sam_1246k_1107": "sharegpt4v",
    "Cambrian737k": "cambrian737k",
    "pixmo-cap": "pixmo",
}
"""Stem of a data file, or a folder above it -> its short name in run names; of any other file the stem itself."""

_PATTERN = re.compile(r"[*?\[\]]")

_PRETRAIN_WORDS: dict[MethodName, str] = {
    "vanilla": "vanilla",
    "cal": "cal",
    "pmo": "pmo",
    "cmo": "cmo",
    "dpa": "pma",
    "dpa-prior": "prior",
}
"""The reference has one script, whose word for stage 2 is ``pma``; the other methods carry their own names."""


@dataclass(frozen=True, slots=True)
class Linked:
    """One result."""

    method: MethodName
    stage: StageName
    place: Path
    """The link."""
    target: Path
    """What it shows: an artefact in the store."""


def folder_of(run: Path, recipe: Recipe, method: MethodName) -> Path:
    """Where a method's results are linked: the main method's at the top of the run's folder, others' in their own."""
    return run if method == recipe.methods[0] else run / method


def reference_names(recipe: Recipe, method: MethodName) -> dict[StageName, PurePosixPath]:
    """Paths below ``checkpoints/`` of what a method's stages leave.

    Stage 1 ``llm/{llm}-pretrain-lora_r{rank}_alpha{alpha}-{captions}``, stage 2
    ``projectors/llavanext-{tower}-{stage 1, or the llm}-pretrain-{word}_mlp-{captions}``, stage 3
    ``finetune/{stage 2}[-replaced_llm]-finetune-{method}_mlp_lm-{instructions}``.
    """
    llm, tower = (name.rstrip("/").rsplit("/", 1)[-1] for name in (recipe.model.llm, recipe.model.vision_tower))
    llm, tower = llm.replace(":", "-"), tower.replace(":", "-")
    captions = "+".join(dict.fromkeys(_data_name(source.path) for source in recipe.data.captions))
    instructions = "+".join(dict.fromkeys(_data_name(source.path) for source in recipe.data.instructions))
    lora = recipe.stages.proxy.lora
    names: dict[StageName, str] = {}
    base, replaced = llm, ""
    if METHODS[method].proxy:
        names["proxy"] = base = f"{llm}-pretrain-lora_r{lora.rank}_alpha{lora.alpha:g}-{captions}"
        replaced = "-replaced_llm"
    names["pretrain"] = f"llavanext-{tower}-{base}-pretrain-{_PRETRAIN_WORDS[method]}_mlp-{captions}"
    names["finetune"] = f"{names['pretrain']}{replaced}-finetune-{method}_mlp_lm-{instructions}"
    return {stage: PurePosixPath(_FOLDERS[stage], name) for stage, name in names.items()}


def link_results(run: Path, out: Path) -> list[Linked]:
    """Links what a run has finished so far.

    Args:
        run: a run's folder.
        out: the ``checkpoints`` folder; made if it is not there.

    Raises:
        UserError: ``run`` is no run, nothing in it is finished, or something that is not our link lies at a place.
    """
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run's folder: it has no recipe.yaml")
    recipe = load_recipe(path)
    found = [
        Linked(method, stage, out / name, (folder_of(run, recipe, method) / ARTEFACTS[stage]).resolve())
        for method in recipe.methods
        for stage, name in reference_names(recipe, method).items()
        if (folder_of(run, recipe, method) / ARTEFACTS[stage]).exists()
    ]
    if not found:
        methods = ", ".join(recipe.methods)
        raise UserError(
            f"{run}: no stage is finished, there is nothing to link (methods: {methods}; vanilla, cal and cmo have no "
            "stage 1)"
        )
    for item in found:
        _refuse_foreign(item)
    for item in found:
        with disk_errors(item.place):
            item.place.parent.mkdir(parents=True, exist_ok=True)
            _replace_link(item)
    return found


def describe(linked: list[Linked]) -> list[dict[str, Any]]:
    """For ``--json``."""
    return [
        {"method": item.method, "stage": item.stage, "path": str(item.place), "target": str(item.target)}
        for item in linked
    ]


def _data_name(path: Path) -> str:
    stem = path.name.split(".")[0] if path.suffix else path.name
    known = next((_DATA_NAMES[part] for part in (stem, *reversed(path.parts)) if part in _DATA_NAMES), None)
    if known is None and _PATTERN.search(stem):  # "shards/*.parquet": no name for a folder
        plain = [part for part in path.parts if not _PATTERN.search(part)]
        return plain[-1].strip("/") if plain and plain[-1].strip("/") else "data"
    return known or stem


def _refuse_foreign(item: Linked) -> None:
    """
    Raises:
        UserError: what lies there is no link into a store's artefacts of this stage.
    """
    place = item.place
    if not os.path.lexists(place):
        return
    shown = place.resolve()
    ours = place.is_symlink() and shown.name == ARTEFACTS[item.stage] and shown.parent.name.startswith(f"{item.stage}-")
    if not ours:
        raise UserError(
            f"{place} is there already and is no link that dpa made; nothing was changed. Move it away, or choose "
            "another folder"
        )


def _replace_link(item: Linked) -> None:
    """By rename, so that a reader finds the old link or the new one."""
    temporary = item.place.with_name(f".{item.place.name[:200]}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(item.target, item.place.parent.resolve()), target_is_directory=True)
    os.replace(temporary, item.place)
