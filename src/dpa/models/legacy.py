"""Connectors in other people's formats: LLaVA's ``mm_projector.bin``, safetensors, a Hugging Face LLaVA folder.

Inside the project a connector's tensors carry the names of transformers' ``multi_modal_projector``.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpa.errors import ModelError
from dpa.log import get_logger
from dpa.models.connectors import (
    CONNECTOR_NAMES,
    POOLED_NAMES,
    ConnectorKind,
    check_kind,
    kind_of_state,
    shapes,
    with_identity,
)

LLAVA_NAMES: dict[str, str] = {
    "linear_1.weight": "model.mm_projector.0.weight",
    "linear_1.bias": "model.mm_projector.0.bias",
    "linear_2.weight": "model.mm_projector.2.weight",
    "linear_2.bias": "model.mm_projector.2.bias",
}
"""Ours -> LLaVA's (``nn.Sequential(Linear, GELU, Linear)``; GELU, at 1, has no weights)."""
_LLAVA_LINEAR: dict[str, str] = {
    "linear_1.weight": "model.mm_projector.weight",
    "linear_1.bias": "model.mm_projector.bias",
}
"""Of a ``linear`` one (a lone ``nn.Linear``)."""

_PREFIXES = ("mm_projector.", "multi_modal_projector.")
_TELLING = ("image_newline", "vision_resampler.query")
_WRAPPERS = ("state_dict", "module")
_SINGLE_FILES = (
    "mm_projector.bin",
    "connector.safetensors",
    "non_lora_trainables.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
"""Files of a folder that hold a connector, in the order in which they are tried; then sharded ones by their index."""
_LOCAL_NAMES: dict[str, str] = {name.rpartition("mm_projector.")[2]: ours for ours, name in LLAVA_NAMES.items()}
_LOCAL_NAMES |= {"weight": "weight", "bias": "bias"} | {name: name for name in POOLED_NAMES}


def read_connector(path: Path) -> dict[str, Tensor]:
    """Reads a connector, whoever saved it.

    Args:
        path: ``mm_projector.bin``, ``non_lora_trainables.bin``, any file of tensors (safetensors or torch's), or a
            folder: one that holds such a file, or a whole LLaVA checkpoint in LLaVA's or in Hugging Face's layout. Of
            a sharded checkpoint only the shards that hold the connector are read. What wrappers put before the names
            (``module.``, ``base_model.model.``) does not matter.

    Returns:
        float32 tensors by the names of transformers' projectors (``CONNECTOR_NAMES``, ``POOLED_NAMES``); LLaVA's single
        linear layer comes with the identity as second one.

    Raises:
        ModelError: no such file, not readable as weights alone, or none of the connectors that we know.
    """
    raw = _read_folder(path) if path.is_dir() else _read_file(path)
    state: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        ours = _our_name(name)
        if ours is not None:
            state[ours] = tensor.detach().to(torch.float32)
    left = [name for name in raw if _is_connectors(name) and _our_name(name) is None]
    state = with_identity(state)
    names = POOLED_NAMES if "layernorm.weight" in state else CONNECTOR_NAMES
    if set(state) != set(names) or left:
        raise ModelError(_what_it_is(path, list(raw), state, left))
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    if empty:
        raise ModelError(
            f"{path} holds {', '.join(empty)} without values (shape {list(state[empty[0]].shape)}): it was saved under "
            "DeepSpeed ZeRO-3 before the ranks' parts were gathered; save it again with them gathered "
            "(stage3_gather_16bit_weights_on_model_save), or take it from a zero_to_fp32.py result"
        )
    if any(name.endswith("image_newline") for name in raw):
        get_logger(__name__).info(
            "%s: image_newline is left out; it parts the rows of LLaVA-NeXT's tiles, and here an image is one square",
            path,
        )
    return {name: state[name] for name in names}


def _what_it_is(path: Path, names: list[str], state: Mapping[str, Tensor], left: list[str]) -> str:
    """Why these tensors are no connector of ours: LLaVA's other kinds by the names of their tensors."""
    missing = [name for name in CONNECTOR_NAMES if name not in state]
    message = f"{path} holds no connector of a known kind: "
    if missing:
        message += (
            f"{', '.join(missing)} missing (found {_shorten([name for name in names if _is_connectors(name)])}); "
        )
    if left:
        return message + f"{_shorten(left)} belong to a deeper one (mlp3x_gelu, mlp2x_res..., a pooler)"
    if any("vision_resampler" in name for name in names):
        return message + "it has a vision_resampler, which this model has not"
    return message + (
        "expected LLaVA's model.mm_projector.{0,2}.{weight,bias}, a linear one (model.mm_projector.{weight,bias}) or "
        "multi_modal_projector.linear_{1,2}.{weight,bias}"
    )


def check_connector(
    state: Mapping[str, Tensor], path: Path, *, tower: int, llm: int, kind: ConnectorKind = "mlp2x_gelu"
) -> None:
    """Compares shapes with what joins this tower to this LLM.

    Args:
        state: from :func:`read_connector`.
        path: where it came from, for the message.
        tower: hidden size of the vision tower.
        llm: hidden size of the LLM.
        kind: the connector that is wanted.

    Raises:
        ModelError: another kind, another LLM's, or another tower's.
    """
    check_kind(state, path, kind)
    for name, want in shapes(kind, tower=tower, llm=llm).items():
        have = tuple(state[name].shape)
        if have != want:
            whose = "LLM" if have[0] != llm else "vision tower"
            raise ModelError(
                f"wrong {whose} for a connector: {path} has {name} of shape {list(have)}, this tower and LLM need "
                f"{list(want)} (rows: the LLM's hidden size; columns of linear_1: the tower's)"
            )


def write_mm_projector(projector: nn.Module | Mapping[str, Tensor], path: Path) -> None:
    """Writes LLaVA's ``mm_projector.bin`` (a torch file of plain tensors, atomically).

    A ``linear`` one becomes LLaVA's single layer. LLaVA knows no ``pooled`` one: it keeps transformers' names.

    Args:
        projector: ``model.model.multi_modal_projector``, or its state dict.
        path: the file; its folder is made.
    """
    state = projector.state_dict() if isinstance(projector, nn.Module) else projector
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # clone: a view would drag the whole storage behind it into the file
    torch.save({theirs: state[ours].detach().cpu().clone() for ours, theirs in _file_names(state).items()}, temporary)
    os.replace(temporary, path)


def _file_names(state: Mapping[str, Tensor]) -> Mapping[str, str]:
    """Ours -> those of the file."""
    kind = kind_of_state(state)
    if kind == "pooled":
        return {name: f"multi_modal_projector.{name}" for name in POOLED_NAMES}
    return _LLAVA_LINEAR if kind == "linear" else LLAVA_NAMES


def _our_name(name: str) -> str | None:
    """``linear_1.weight`` for any known spelling of it; None for a tensor that is no connector's."""
    for prefix in _PREFIXES:
        _, found, local = name.partition(prefix)
        if found:
            return _LOCAL_NAMES.get(local)
    return name if name in POOLED_NAMES else None


def _is_connectors(name: str) -> bool:
    return name in CONNECTOR_NAMES or any(prefix in name for prefix in _PREFIXES)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name)
    for index in (folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"):
        if index.is_file():
            shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            wanted = sorted({shard for name, shard in shards.items() if _is_connectors(name)})
            return {name: tensor for shard in wanted for name, tensor in _read_file(folder / shard).items()}
    raise ModelError(
        f"{folder} has neither mm_projector.bin nor weights (safetensors or pytorch_model.bin): no connector to read"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    """The connector's tensors of a file, and the names of others that say what it is."""
    if not path.is_file():
        raise ModelError(f"connector {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if _is_connectors(name) or name.endswith(_TELLING)]  # noqa: SIM118 (no iterator)
                return {name: file.get_tensor(name) for name in names}
        loaded = _load_torch(path)
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise ModelError(
            f"connector {path} cannot be read: {str(error).strip().splitlines()[0]}; it must hold tensors only"
        ) from None
    for wrapper in _WRAPPERS:  # DeepSpeed's and Lightning's files keep the weights one level down
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"connector {path} holds something other than named tensors")
    return loaded


def _load_torch(path: Path) -> Any:
    """Tensors alone, never code. Mapped where the file's format allows, so that a whole LLM's shard costs no memory."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
    return torch.load(path, map_location="cpu", weights_only=True)  # torch's format of before 1.6


def _shorten(names: list[str]) -> str:
    if not names:
        return "no tensor of a connector"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
