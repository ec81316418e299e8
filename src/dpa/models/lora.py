"""The proxy LLM's adapter: attached, saved, merged.

Paper, section 4.1: rank 256, alpha 512, dropout 0, on all linear layers but the head.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import PreTrainedModel

from dpa.errors import ModelError
from dpa.models.settings import LoraSettings

MANIFEST = "adapter_manifest.json"
"""Beside PEFT's files: which LLM the adapter belongs to. (A stage's own manifest.json may lie in the same folder.)"""

_ADAPTER = "default"


def attach_lora(llm: PreTrainedModel, settings: LoraSettings, *, seed: int) -> PeftModel:
    """Adds float32 LoRA matrices to every linear layer but the head; everything else is frozen.

    A is drawn from ``seed`` alone (Kaiming uniform, as PEFT), B is zero: before the first step the model's outputs are
    the LLM's. torch's global generator is left as it was.

    Args:
        llm: changed in place (its linear layers are wrapped).
        settings: rank, alpha, dropout.
        seed: of A.
    """
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),  # PEFT divides it by the rank: any number will do
        lora_dropout=settings.dropout,
        target_modules="all-linear",  # PEFT leaves the output embeddings out
        bias="none",
    )
    with torch.random.fork_rng():
        model = get_peft_model(llm, config, autocast_adapter_dtype=True)
    assert isinstance(model, PeftModel)
    _draw(model, seed)
    return model


@torch.no_grad()
def _draw(model: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in sorted(_lora_layers(model).items()):
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        drawn = torch.empty(down.shape, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        down.copy_(drawn)
        up.zero_()


def save_adapter(model: PeftModel, folder: Path, *, base: str, base_digest: str) -> None:
    """Writes PEFT's files and our manifest, whole or not at all.

    Args:
        folder: becomes ``adapter_config.json``, ``adapter_model.safetensors`` and ``adapter_manifest.json``.
        base: how the recipe names the LLM.
        base_digest: ``digest_of_part`` of the original LLM's folder.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # False: otherwise PEFT asks the hub whether the vocabulary has grown; an adapter of linear layers has none
    model.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False)
    (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    manifest = {"base": base, "base_digest": base_digest}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def merge_adapter(llm: Any, folder: Path, *, base_digest: str | None = None) -> None:
    """Adds an adapter to the LLM's own weights, in float32, then rounds once to their dtype.

    Args:
        llm: an LLM with its head; changed in place, and left without adapter modules.
        folder: from ``save_adapter``, or any PEFT LoRA folder (then nothing can be compared).
        base_digest: of this LLM's folder; compared with the manifest's.

    Raises:
        ModelError: no adapter there, one of another LLM, or one whose layers this LLM does not have.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} holds no LoRA adapter (adapter_config.json is missing)")
    _compare_base(folder, base_digest)
    try:
        model = PeftModel.from_pretrained(llm, str(folder), autocast_adapter_dtype=True, torch_device=str(llm.device))
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"adapter {folder} does not fit the LLM: {str(error).splitlines()[0]}") from None
    with torch.no_grad():
        for layer in _lora_layers(model).values():
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight(_ADAPTER).float())
    unloaded = model.unload()
    assert unloaded is llm


def _compare_base(folder: Path, base_digest: str | None) -> None:
    path = folder / MANIFEST
    if base_digest is None or not path.is_file():
        return
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if manifest["base_digest"] != base_digest:
        raise ModelError(
            f"adapter {folder} was trained on another LLM: {manifest['base']} with weights "
            f"{manifest['base_digest'][:12]}, this one's are {base_digest[:12]}; run stage 1 again with this LLM"
        )


def _lora_layers(model: PeftModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
