"""Where a checkpoint comes from: the manifests that its run left, and what they prove."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dpa.errors import CheckpointError
from dpa.models.digest import digest_of_model

State = Literal["passed", "unknown"]


@dataclass(frozen=True, slots=True)
class Gate:
    """One thing that was compared before anything was published. What fails is raised, so it is never one of these."""

    name: str
    state: State
    """``unknown``: nobody wrote down what it would have to be compared with."""
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"name": self.name, "state": self.state, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Origin:
    """A checkpoint and its papers."""

    checkpoint: Path
    """As given (in a run's folder a link)."""
    stage: dict[str, Any] | None
    """The manifest of the stage 3 that wrote it; None: no run of ours."""
    recipe: dict[str, Any] | None
    """The resolved recipe of the run that links it."""


def origin_of(checkpoint: Path) -> Origin:
    """Reads the manifest beside the checkpoint (in the store) and the recipe of the run that links it.

    Raises:
        CheckpointError: a manifest is there and cannot be read.
    """
    beside = checkpoint.resolve().parent / "manifest.json"
    stage = None
    if beside.is_file():
        try:
            stage = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{beside} cannot be read ({error}); without it nothing can be proven") from None
        if not isinstance(stage, dict) or stage.get("stage") != "finetune":
            stage = None
    return Origin(checkpoint, stage, _recipe(checkpoint) if stage is not None else None)


def _recipe(checkpoint: Path) -> dict[str, Any] | None:
    for folder in (checkpoint.parent, checkpoint.parent.parent):  # a further method's checkpoint lies one deeper
        path = folder / "recipe.yaml"
        if path.is_file():
            recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
            return recipe
    return None


def check_weights(origin: Origin) -> Gate:
    """The files are those that the run wrote.

    Raises:
        CheckpointError: they were changed since.
    """
    name = "weights are the run's"
    written = None if origin.stage is None else origin.stage.get("weights")
    if written is None:
        return Gate(name, "unknown", "no manifest with a digest of the weights lies beside the checkpoint")
    found = digest_of_model(origin.checkpoint)
    if found != written:
        raise CheckpointError(
            f"{origin.checkpoint}: its weights have digest {found[:12]}, the run's manifest says {written[:12]}: they "
            "were changed or damaged since; train stage 3 again, or copy the folder elsewhere to export it as it is"
        )
    return Gate(name, "passed", f"sha256 {found}")


def check_start(origin: Origin) -> Gate:
    """Stage 3 started from the original LLM (digests of the manifest).

    Raises:
        CheckpointError: it did not.
    """
    name = "stage 3 started from the original LLM"
    if origin.stage is None:
        return Gate(name, "unknown", "not a checkpoint of a run: no manifest says what its stage 3 started from")
    original, start = origin.stage.get("llm_original"), origin.stage.get("llm_at_start")
    if original is None or original != start:
        raise CheckpointError(
            f"{origin.checkpoint}: its manifest says that stage 3 started from an LLM with digest {str(start)[:12]}, "
            f"the original's is {str(original)[:12]}: the proxy may be in it; train stage 3 again"
        )
    whole = origin.stage.get("start_from")
    of = f"the LLM of checkpoint {whole['source']}" if whole else "the original LLM's files"
    return Gate(name, "passed", f"sha256 {start}, as {of}")
