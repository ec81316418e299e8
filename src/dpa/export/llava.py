"""The layout of LLaVA's own code (haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT), written and read back.

What their code expects, read in ``llava/model/{builder,llava_arch}.py``, ``language_model/*.py`` and
``multimodal_encoder/{builder,clip_encoder}.py`` of both:

* the LLM's configuration with ``mm_*`` keys in it; the class by ``architectures`` and ``model_type``;
* the LLM's own weight names, and the connector as ``model.mm_projector.{0,2}``; the tower is no part of the weights: it
  is loaded from ``mm_vision_tower``, a hub id of openai or laion, or a path that exists. A path must hold ``clip``:
  SGLang and older LLaVA-NeXT choose the tower's class by that word;
* no image token: prompts are cut at ``<image>``, the pieces are tokenised one by one, and BOS is expected from the
  tokenizer, not from the text;
* ``delay_load`` is LLaVA-NeXT's: without it the tower is loaded inside ``from_pretrained`` and fails.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from dpa.errors import ModelError
from dpa.models.digest import llm_name
from dpa.models.legacy import LLAVA_NAMES, write_mm_projector
from dpa.models.parts import tower_row
from dpa.models.portable import make_portable, portable_config
from dpa.models.vlm import Vlm

TOWER_FOLDER = "clip_vision_tower"
"""Beside the weights; its name says ``clip``, see above."""


@dataclass(frozen=True, slots=True)
class LlavaClass:
    """A class of LLaVA's code."""

    architecture: str
    model_type: str
    where: str
    """Whose code has it."""
    scaled_rope: bool
    """It keeps ``rope_scaling``; the others' constructors set it to None."""


CLASSES: dict[str, LlavaClass] = {
    "llama": LlavaClass("LlavaLlamaForCausalLM", "llava_llama", "LLaVA and LLaVA-NeXT", True),
    "mistral": LlavaClass("LlavaMistralForCausalLM", "llava_mistral", "LLaVA and LLaVA-NeXT", False),
    "qwen2": LlavaClass("LlavaQwenForCausalLM", "llava_qwen", "LLaVA-NeXT", False),
}
"""By the LLM's ``model_type``. LLaVA-NeXT's Gemma class is that of the first Gemma."""

_PATCHES: dict[str, str] = {"default": "patch", "full": "cls_patch"}


def class_of(vlm: Vlm) -> LlavaClass:
    """The class that would load this model.

    Raises:
        ModelError: LLaVA's code has none, or its tower class would see something else.
    """
    config: Any = vlm.model.config
    text, tower = config.text_config, config.vision_config
    row = CLASSES.get(text.model_type)
    if row is None:
        raise ModelError(
            f"LLaVA's own code has no class for an LLM of model_type {text.model_type!r} (it has "
            f"{', '.join(CLASSES)}): use --to hf, which every server reads"
        )
    if tower.model_type != "clip_vision_model":
        raise ModelError(
            f"LLaVA's own code loads a tower from a folder as CLIP, this one is {tower.model_type!r} (its SigLIP class "
            "takes hub ids alone and fixes size and layers): use --to hf"
        )
    if "rope_scaling" in portable_config(text.to_dict()) and not row.scaled_rope:
        raise ModelError(f"{row.architecture} of LLaVA's code drops rope_scaling, which this LLM needs: use --to hf")
    return row


def write_llava(vlm: Vlm, folder: Path, *, dtype: torch.dtype, tower: str | None, final: Path, shard_size: str) -> None:
    """Writes config, weights, connector, tokenizer and tower.

    Args:
        vlm: the model.
        folder: made; where the files are written.
        dtype: of all weights.
        tower: ``mm_vision_tower``; None: ``final`` / ``TOWER_FOLDER``.
        final: the absolute path where ``folder`` will lie.
        shard_size: of a weight file at most.

    Raises:
        ModelError: see ``class_of``.
    """
    row = class_of(vlm)
    folder.mkdir(parents=True)
    weights = _llava_weights(vlm.model.state_dict(), dtype, tied=bool(vlm.model.config.tie_word_embeddings))
    save_torch_state_dict(weights, folder, max_shard_size=shard_size, metadata={"format": "pt"})
    write_mm_projector({name: weights[theirs] for name, theirs in LLAVA_NAMES.items()}, folder / "mm_projector.bin")
    config = _config(vlm, row, dtype, tower or str(final / TOWER_FOLDER))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    vlm.model.generation_config.save_pretrained(folder)
    _write_tokenizer(vlm, folder)
    _write_tower(vlm, folder / TOWER_FOLDER, dtype)


def _llava_weights(state: Mapping[str, Tensor], dtype: torch.dtype, *, tied: bool) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in state.items():
        local = name.rpartition("multi_modal_projector.")[2]
        theirs = LLAVA_NAMES[local] if local in LLAVA_NAMES else llm_name(name)
        if theirs is None or (tied and theirs == "lm_head.weight"):
            continue
        weights[theirs] = tensor.detach().to(dtype).contiguous()
    return weights


def _config(vlm: Vlm, row: LlavaClass, dtype: torch.dtype, tower: str) -> dict[str, Any]:
    whole: Any = vlm.model.config
    text = portable_config(whole.text_config.to_dict())
    for name in ("dtype", "rope_parameters"):  # transformers 5's spelling, which their transformers 4 does not read
        text.pop(name, None)
    return {
        **text,
        "architectures": [row.architecture],
        "model_type": row.model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": bool(whole.tie_word_embeddings),
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": int(whole.vision_config.hidden_size),
        "mm_vision_tower": tower,
        "mm_vision_select_layer": int(whole.vision_feature_layer),
        "mm_vision_select_feature": _PATCHES[whole.vision_feature_select_strategy],
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if vlm.processor.image_processor.do_pad else "square",
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "delay_load": True,
        "tokenizer_padding_side": "right",
    }


def _write_tokenizer(vlm: Vlm, folder: Path) -> None:
    """With BOS written by the tokenizer again where the family has one: LLaVA's prompts have none."""
    vlm.tokenizer.save_pretrained(folder)
    make_portable(folder)
    if vlm.family.has_bos:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_bos_token = True
        tokenizer.save_pretrained(folder)
        make_portable(folder)
    _old_merges(folder / "tokenizer.json")


def _old_merges(path: Path) -> None:
    """Merges as "a b", which every version of tokenizers reads: pairs, as now written, are unknown to LLaVA's 0.15."""
    content = json.loads(path.read_text(encoding="utf-8"))
    merges = content["model"].get("merges")
    if not merges or any(isinstance(merge, str) or " " in merge[0] + merge[1] for merge in merges):
        return  # no BPE, old already, or pieces with spaces, for which pairs were introduced
    content["model"]["merges"] = [f"{left} {right}" for left, right in merges]
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _write_tower(vlm: Vlm, folder: Path, dtype: torch.dtype) -> None:
    tower: Any = vlm.model.model.vision_tower
    prefix = tower_row(tower.config).published_prefix
    folder.mkdir()
    weights = {prefix + name.removeprefix(prefix): tensor.to(dtype) for name, tensor in tower.state_dict().items()}
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    config = portable_config(tower.config.to_dict()) | {"architectures": [type(tower).__name__]}
    config |= {"torch_dtype": str(dtype).removeprefix("torch."), "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    pixels = json.loads(vlm.processor.image_processor.to_json_string())
    pixels.pop("do_pad", None)  # LLaVA pads before it calls this processor (image_aspect_ratio)
    pixels["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")


# And back


def read_llava(folder: Path, *, image_token_id: int) -> LlavaForConditionalGeneration:
    """Reads the layout back into transformers' class, from the files alone, in float32 on the CPU.

    Args:
        folder: with its tower in ``TOWER_FOLDER``.
        image_token_id: the placeholder of prompts; the layout has none.

    Raises:
        ModelError: files are missing, or names do not fit.
    """
    stated: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = next((name for name, row in CLASSES.items() if row.model_type == stated["model_type"]), None)
    if kind is None:
        raise ModelError(f"{folder}: model_type {stated['model_type']!r} is none of LLaVA's")
    text = AutoConfig.for_model(kind, **{name: value for name, value in stated.items() if name != "model_type"})
    tower = AutoConfig.from_pretrained(folder / TOWER_FOLDER)
    strategy: Any = {theirs: ours for ours, theirs in _PATCHES.items()}[stated["mm_vision_select_feature"]]
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token_id,
        vision_feature_layer=stated["mm_vision_select_layer"],
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=stated["tie_word_embeddings"],
    )
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).float()  # type: ignore[no-untyped-call]
    weights = {_our_name(name): tensor.float() for name, tensor in _tensors(folder).items()}
    prefix = tower_row(tower).published_prefix
    for name, tensor in _tensors(folder / TOWER_FOLDER).items():
        weights[f"model.vision_tower.{name.removeprefix(prefix)}"] = tensor.float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not (name == "lm_head.weight" and stated["tie_word_embeddings"])]
    if missing or unexpected:
        raise ModelError(f"{folder}: weights missing {missing[:4]}, unknown {unexpected[:4]}")
    model.tie_weights()
    read: LlavaForConditionalGeneration = torch.nn.Module.eval(model)
    return read


def _our_name(name: str) -> str:
    for ours, theirs in LLAVA_NAMES.items():
        if name == theirs:
            return f"model.multi_modal_projector.{ours}"
    return name if name.startswith("lm_head.") else "model.language_model." + name.removeprefix("model.")


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no iterator)
    return found


def remove(folder: Path) -> None:
    """Takes back what was written."""
    shutil.rmtree(folder, ignore_errors=True)
