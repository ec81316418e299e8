"""Which parameters a stage trains: set, then checked name by name, because a wrong set trains without complaint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dpa.errors import ModelError
from dpa.models.connectors import MULTIMODAL, frozen_names, kind_of

Stage = Literal["proxy", "pretrain", "finetune"]

_OF_CONNECTOR, _OF_LLM, _OF_HEAD, _OF_TOWER = (
    "model.multi_modal_projector.",
    "model.language_model.",
    "lm_head.",
    "model.vision_tower.",
)
_LORA_MARKS = (".lora_A.", ".lora_B.")

TRAINED: dict[Stage, tuple[str, ...]] = {
    "proxy": ("lora",),
    "pretrain": ("connector",),
    "finetune": ("connector", "llm", "head"),
}
"""Method, table of stages. The vision tower is trained never."""


@dataclass(frozen=True, slots=True)
class TrainableManifest:
    """What is trained. A tied head has no parameters of its own and counts with the LLM's embeddings."""

    stage: Stage
    names: tuple[str, ...]
    """Sorted."""
    numel_by_part: dict[str, int]
    """``lora``, ``connector``, ``llm``, ``head`` -> trained numbers."""
    total: int
    """All trained numbers."""
    frozen: int
    """All numbers that are not trained."""

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {count:,}" for part, count in self.numel_by_part.items())
        return f"stage {self.stage} trains {self.total:,} of {self.total + self.frozen:,} parameters ({parts})"


def set_trainable(model: nn.Module, stage: Stage) -> TrainableManifest:
    """Sets ``requires_grad`` for a stage. What is trained becomes float32, what is not stays as it is.

    Args:
        model: the LLM with its adapter (stage ``proxy``), else ``LlavaForConditionalGeneration``.
        stage: row of ``TRAINED``.

    Raises:
        ModelError: the model has not the parts that the stage trains, or has one that no rule knows.
    """
    wanted = TRAINED[stage]
    parts = {name: _part_of(name, stage) for name, _ in model.named_parameters()}
    if isinstance(model, MULTIMODAL):
        parts |= {_OF_CONNECTOR + name: "identity" for name in frozen_names(kind_of(model.config))}
    absent = [part for part in wanted if part not in parts.values() and part != "head"]
    if absent:
        raise ModelError(f"stage {stage} trains {' and '.join(wanted)}, but this model has no {' or '.join(absent)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[name] in wanted)
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    return _checked_manifest(model, stage, parts)


def _part_of(name: str, stage: Stage) -> str:
    if stage == "proxy":
        return "lora" if any(mark in name for mark in _LORA_MARKS) else "llm"
    prefixes = {_OF_CONNECTOR: "connector", _OF_LLM: "llm", _OF_HEAD: "head", _OF_TOWER: "tower"}
    for prefix, part in prefixes.items():
        if name.startswith(prefix):
            return part
    raise ModelError(f"parameter {name} belongs to no part that stage {stage} knows; is this a LLaVA model?")


def _checked_manifest(model: nn.Module, stage: Stage, parts: dict[str, str]) -> TrainableManifest:
    """Counts again from the model itself; a difference is a bug, not the user's."""
    wanted = TRAINED[stage]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, part in parts.items() if part in wanted}
    assert set(trained) == expected, f"stage {stage}: trains {sorted(set(trained) ^ expected)[:8]} wrongly"
    assert not any(part == "tower" for name, part in parts.items() if name in trained), "the vision tower is trained"
    by_part = {
        part: sum(parameter.numel() for name, parameter in trained.items() if parts[name] == part) for part in wanted
    }
    total = sum(by_part.values())
    return TrainableManifest(
        stage=stage,
        names=tuple(sorted(trained)),
        numel_by_part=by_part,
        total=total,
        frozen=sum(parameter.numel() for parameter in model.parameters()) - total,
    )
