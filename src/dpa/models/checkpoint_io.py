"""A finished model as a folder that stock transformers, vLLM and SGLang load, and back.

Tensors are stored under the names of published LLaVA checkpoints (``language_model.model...``,
``vision_tower.vision_model...``), which transformers 4 and 5 and the servers all read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpa.log import get_logger
from dpa.models.connectors import classes_of, kind_of
from dpa.models.digest import digest_of_llm, digest_of_model, digest_of_part
from dpa.models.foreign import open_checkpoint
from dpa.models.parts import tower_row
from dpa.models.portable import make_portable
from dpa.models.processor import make_processor
from dpa.models.vlm import Vlm, generation_config

__all__ = ["digest_of_llm", "digest_of_model", "digest_of_part", "load_checkpoint", "save_checkpoint"]

SHARD_SIZE = "5GB"
"""Of a weight file at most: what the hub and most file systems take without a thought."""

_TOWER = "model.vision_tower."


def save_checkpoint(
    vlm: Vlm,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    shard_size: str = SHARD_SIZE,
) -> None:
    """Writes model, processor, chat template and generation settings, whole or not at all.

    Args:
        folder: replaced if it is there.
        dtype: of all stored weights; None: each as it is in memory (float32 in, float32 out).
        state_dict: the weights where the model's own are sharded over ranks; names as in ``model.state_dict()``.
        shard_size: of a weight file at most, as transformers writes sizes (``5GB``, ``200MB``).

    Raises:
        OSError: the disk is full or not writable; ``folder`` is then as it was.
    """
    model = vlm.model
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if kind_of(model.config) == "pooled":
        get_logger(__name__).info(
            "%s: a pooled connector; transformers loads it as %s, servers that want LLaVA's class do not",
            folder,
            type(model).__name__,
        )
    vision_config: Any = model.config.vision_config
    prefix = tower_row(vision_config).published_prefix
    state = {_published(name, prefix): tensor for name, tensor in state.items()}
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, state_dict=state, max_shard_size=shard_size)
        _state_dtype(temporary / "config.json", state)
        vlm.processor.save_pretrained(temporary)
        # transformers 5 keeps it inside processor_config.json; transformers 4 and servers look for this file
        vlm.processor.image_processor.save_pretrained(temporary)
        make_portable(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _publish(temporary, folder)


def load_checkpoint(folder: Path, *, dtype: torch.dtype | None = None, attention: str = "auto") -> Vlm:
    """Reads what ``save_checkpoint`` wrote (or another LLaVA of a known family), on the CPU, in evaluation mode.

    Args:
        dtype: of all weights; None: as stored.
        attention: kernel of the LLM; ``auto``: the family's.

    Raises:
        ModelError: no LLaVA checkpoint, or of an unknown family or tower.
    """
    opened = open_checkpoint(folder)
    kernels = {"": "eager", "text_config": opened.family.attention if attention == "auto" else attention}
    model = classes_of(opened.config)[1].from_pretrained(
        folder,
        config=opened.config,
        dtype="auto" if dtype is None else dtype,
        attn_implementation={**kernels, "vision_config": "sdpa"},
    )
    tokenizer, rules = opened.tokenizer, opened.rules
    processor = make_processor(opened.image_processor, tokenizer, rules, opened.config.vision_config)
    model.generation_config = generation_config(tokenizer, rules)
    torch.nn.Module.eval(model)
    return Vlm(model=model, processor=processor, tokenizer=tokenizer, rules=rules, family=opened.family)


def _published(name: str, tower_prefix: str) -> str:
    """transformers itself turns the outer names into LLaVA's when it saves; the tower's inner prefix it leaves off."""
    if not name.startswith(_TOWER) or name.startswith(_TOWER + tower_prefix):
        return name
    return _TOWER + tower_prefix + name.removeprefix(_TOWER)


def _state_dtype(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the widest stored dtype into config.json, for the whole and its parts.

    transformers takes it for the dtype to load with, and writes there the dtype of the first parameter that it meets:
    that of a bfloat16 tower would round weights that were trained in float32.
    """
    widest = max(
        (tensor.dtype for tensor in state.values() if tensor.is_floating_point()), key=lambda kind: kind.itemsize
    )
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = str(widest).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(temporary: Path, folder: Path) -> None:
    """Puts a finished folder in place; a reader sees the old one or the new one."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
