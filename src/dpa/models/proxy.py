"""A proxy's adapter on the LLM inside a LLaVA: to look at it, and to talk to it. Training never does this in stage 3.

``lora.merge_adapter`` compares an adapter with the LLM's own files. A checkpoint's LLM has been trained on, so no file
is the original: here the manifests of the two stages say whether both began with one LLM, and every matrix of the
adapter must find its layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from dpa.errors import ModelError
from dpa.models.lora import merge_adapter
from dpa.models.vlm import Vlm

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def adapter_folder(given: Path) -> Path:
    """The adapter itself, or ``proxy`` of a run's folder.

    Raises:
        ModelError: there is none.
    """
    for folder in (given, given / "proxy"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise ModelError(
        f"{given} holds no LoRA adapter (adapter_config.json is missing); give a run's proxy folder (methods "
        "dpa, dpa-prior, pmo)"
    )


def merge_proxy(vlm: Vlm, adapter: Path, *, checkpoint: Path | None = None) -> None:
    """Adds a proxy's adapter to the LLM of a LLaVA, in place.

    Args:
        vlm: on any device.
        adapter: from ``save_adapter``, or a run's folder.
        checkpoint: folder that the LLaVA was read from; a manifest of its run may lie beside it.

    Raises:
        ModelError: no adapter there, or one of another LLM: by the manifests, or because its layers are not this LLM's.
    """
    folder = adapter_folder(adapter)
    _compare_manifests(folder, checkpoint)
    llm = _causal_lm(vlm)
    _compare_layers(folder, llm)
    merge_adapter(llm, folder)


def _compare_manifests(adapter: Path, checkpoint: Path | None) -> None:
    theirs, ours = _llm_of(adapter), None if checkpoint is None else _llm_of(checkpoint)
    if theirs is not None and ours is not None and theirs != ours:
        raise ModelError(
            f"adapter {adapter} is a proxy of another LLM: its stage 1 started from files with digest {theirs[:12]}, "
            f"the run of {checkpoint} from {ours[:12]}; give the proxy of that run, or of one with the same LLM"
        )


def _llm_of(artefact: Path) -> str | None:
    """Digest of the original LLM's files, by the manifest beside an artefact in the store; None: there is none."""
    path = artefact.resolve().parent / "manifest.json"
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        return str(manifest["inputs"]["llm"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _causal_lm(vlm: Vlm) -> Any:
    """The LLM with its head as a model of its own: the very modules, no copy."""
    whole: Any = vlm.model
    with torch.device("meta"):
        llm: Any = AutoModelForCausalLM.from_config(whole.config.text_config)  # type: ignore[no-untyped-call]
    setattr(llm, llm.base_model_prefix, whole.model.language_model)
    llm.set_output_embeddings(whole.lm_head)
    return llm


def _compare_layers(adapter: Path, llm: nn.Module) -> None:
    """PEFT itself leaves out what does not fit by name, without a word.

    Raises:
        ModelError: a matrix without its layer, a layer of another size, or fewer layers than the LLM has.
    """
    path = adapter / "adapter_model.safetensors"
    if not path.is_file():
        raise ModelError(f"adapter {adapter}: adapter_model.safetensors is missing (pickled adapters are not read)")
    modules = dict(llm.named_modules())
    named: set[str] = set()
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no iterator)
            if not key.startswith(_PREFIX) or not key.endswith((_DOWN, _UP)):
                continue
            name, down = key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0], key.endswith(_DOWN)
            layer, shape = modules.get(name), file.get_slice(key).get_shape()
            if not isinstance(layer, nn.Linear):
                raise ModelError(f"adapter {adapter} is a proxy of another LLM: this one has no linear layer {name}")
            wide, own = (shape[1], layer.in_features) if down else (shape[0], layer.out_features)
            if wide != own:
                side = "inputs" if down else "outputs"
                raise ModelError(
                    f"adapter {adapter} is a proxy of another LLM: its {name} has {wide} {side}, this LLM's {own}"
                )
            named.add(name)
    last = {name.rsplit(".", 1)[-1] for name in named}
    like = {
        name for name, module in modules.items() if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in last
    }
    if len(named) != len(like):
        raise ModelError(
            f"adapter {adapter} is a proxy of another LLM: it changes {len(named)} layers, this LLM has {len(like)} of "
            "those names"
        )
