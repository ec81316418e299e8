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
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dpa.errors import ModelError
from dpa.log import get_logger
from dpa.models.connectors import classes_of, kind_of, tokens_per_image
from dpa.models.digest import digest_of_llm, digest_of_model, digest_of_part
from dpa.models.families import family_of, text_rules
from dpa.models.parts import tower_row
from dpa.models.processor import make_processor
from dpa.models.vlm import Vlm, generation_config

__all__ = ["digest_of_llm", "digest_of_model", "digest_of_part", "load_checkpoint", "save_checkpoint"]

_TOWER = "model.vision_tower."


def save_checkpoint(
    vlm: Vlm, folder: Path, *, dtype: torch.dtype | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes model, processor, chat template and generation settings, whole or not at all.

    Args:
        folder: replaced if it is there.
        dtype: of all stored weights; None: each as it is in memory (float32 in, float32 out).
        state_dict: the weights where the model's own are sharded over ranks; names as in ``model.state_dict()``.

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
        model.save_pretrained(temporary, state_dict=state)
        _state_dtype(temporary / "config.json", state)
        vlm.processor.save_pretrained(temporary)
        # transformers 5 keeps it inside processor_config.json; transformers 4 and servers look for this file
        vlm.processor.image_processor.save_pretrained(temporary)
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
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no checkpoint folder: config.json is missing")
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        image_processor = LlavaImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} cannot be read as a LLaVA checkpoint: {str(error).splitlines()[0]}") from None
    model_class = classes_of(config)[1]
    family = family_of(config.text_config, tokenizer)
    kernels = {"": "eager", "text_config": family.attention if attention == "auto" else attention}
    model = model_class.from_pretrained(
        folder, dtype="auto" if dtype is None else dtype, attn_implementation={**kernels, "vision_config": "sdpa"}
    )
    rules = text_rules(family, tokenizer, tokens_per_image(kind_of(config), config.vision_config))
    if rules.image_token_id != config.image_token_index:
        raise ModelError(
            f"{folder}: config.json says image token {config.image_token_index}, the tokenizer's {rules.image_token} "
            f"is {rules.image_token_id}; the folder mixes files of two checkpoints"
        )
    processor = make_processor(image_processor, tokenizer, rules, config.vision_config)
    model.generation_config = generation_config(tokenizer, rules)
    torch.nn.Module.eval(model)
    return Vlm(model=model, processor=processor, tokenizer=tokenizer, rules=rules, family=family)


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
