"""The proxy LLM's adapter as a PEFT folder of its own.

What "peft" can mean here: stage 1 trains a LoRA adapter, and that is exported. Stage 3 trains every weight of the LLM;
a LoRA of the difference would be an approximation that nobody trained, so there is none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpa.errors import CheckpointError, ModelError
from dpa.export.origin import Gate
from dpa.export.probe import TOLERANCE, compare
from dpa.models.digest import digest_of_part
from dpa.models.lora import MANIFEST, merge_adapter
from dpa.models.parts import load_llm, load_tokenizer, resolve_part
from dpa.models.settings import ModelSettings

_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TEXTS = ("A small red circle lies left of a large blue square.", "1) one\n2) two  three")


def find_adapter(given: Path) -> Path:
    """The adapter's folder: itself, or ``proxy`` of the run (or of the run whose checkpoint was given).

    Raises:
        ModelError: there is none.
    """
    for folder in (given, given / "proxy", given.parent / "proxy"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ModelError(
        f"{given} has no adapter: --to peft exports the proxy LLM's LoRA of stage 1 (give a run of method dpa, "
        "dpa-prior or pmo, or its proxy folder). Stage 3 trains every weight of the LLM and leaves no adapter: export "
        "its checkpoint with --to hf"
    )


def write_peft(adapter: Path, folder: Path) -> str:
    """Copies PEFT's two files with the base's name in them. Returns that name.

    Raises:
        ModelError: the adapter does not say which LLM it belongs to.
    """
    base = _base_of(adapter)
    folder.mkdir(parents=True)
    for name in _FILES:
        shutil.copyfile(adapter / name, folder / name)
    config = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = resolve_part(base)
    (folder / _FILES[0]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return base


def _base_of(adapter: Path) -> str:
    own = adapter / MANIFEST
    if own.is_file():
        return str(json.loads(own.read_text(encoding="utf-8"))["base"])
    stated = json.loads((adapter / _FILES[0]).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not stated:
        raise ModelError(f"{adapter}: adapter_config.json names no base model")
    return str(stated)


def check_base(adapter: Path, base: str) -> Gate:
    """The base that is named has the weights that the adapter was trained on.

    Raises:
        CheckpointError: it has others.
    """
    name, own = "the base is the adapter's", adapter / MANIFEST
    if not own.is_file():
        return Gate(name, "unknown", "no manifest of a run lies beside the adapter")
    trained = json.loads(own.read_text(encoding="utf-8"))["base_digest"]
    found = digest_of_part(resolve_part(base))
    if found != trained:
        raise CheckpointError(
            f"adapter {adapter} was trained on {base} with weights {trained[:12]}, there they are {found[:12]} now"
        )
    return Gate(name, "passed", f"sha256 {found}")


def check_merged(adapter: Path, folder: Path, base: str) -> Gate:
    """Merged = with adapter: our merge against PEFT's own forward from the exported folder, float32.

    Raises:
        CheckpointError: they differ (LLaVA-NeXT#253: a merged LoRA that talks garbage).
    """
    settings = ModelSettings(llm=base)
    ids = [_ids(load_tokenizer(settings), text) for text in _TEXTS]
    merged: Any = load_llm(settings, dtype=torch.float32)
    plain = _logits(merged, ids)
    merge_adapter(merged, adapter)
    before = _logits(merged, ids)
    del merged
    llm = AutoModelForCausalLM.from_pretrained(resolve_part(base), dtype=torch.float32, attn_implementation="eager")
    after = _logits(PeftModel.from_pretrained(llm, str(folder)).eval(), ids)
    difference, effect = compare(before, after), compare(before, plain)
    said = f"largest difference {difference.largest:.2e} of logits up to {difference.scale:.3g}"
    if not difference.share <= TOLERANCE:
        raise CheckpointError(
            f"adapter {adapter}: merged and adapted model differ: {said}; allowed {TOLERANCE:g} of it"
        )
    moved = f"the adapter itself moves them by {effect.largest:.2e}"
    return Gate("logits merged = with adapter", "passed", f"{said}; allowed {TOLERANCE:g} of it; {moved}")


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]])


@torch.inference_mode()
def _logits(llm: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    return [llm(input_ids=item).logits[0].float() for item in ids]
