"""A tiny checkpoint in the layout of ``llava-hf/llava-1.5-7b-hf``, as transformers 4 published it. For tests only.

File names, keys and weight names are those of the real repository (and of transformers' own conversion script); sizes,
weights and words are not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.parts import grow_vocabulary
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm
from dpa.testing.parts import tiny_tokenizer, write_tiny_llm, write_tiny_tower

PADDED_TO = 64
"""Rows of the embeddings are a multiple of it: 32064 for 32002 tokens there."""

TYPED_VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Typed parts alone, images first, and nothing after an answer."""

TYPED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
"""llava-interleave's: typed parts alone, answers are closed."""

Layout = Literal["old", "new"]


def write_tiny_llava_hf(
    folder: Path, *, layout: Layout = "old", family: Literal["llama2", "qwen2"] = "llama2", seed: int = 0
) -> Path:
    """Writes the checkpoint; returns its folder.

    Args:
        folder: made; must not exist.
        layout: of weight names. ``old``: ``language_model.model...``, ``vision_tower.vision_model...``, in two shards
            with an index (transformers up to 4.51, and what is on the hub); ``new``: ``model.language_model...``.
        family: ``llama2`` speaks Vicuna's format, ``qwen2`` ChatML.
        seed: of the weights.
    """
    parts = folder.with_name(folder.name + "-parts")
    write_tiny_llm(parts / "llm", family, seed=seed)
    write_tiny_tower(parts / "tower", "clip", seed=seed)
    settings = ModelSettings(llm=str(parts / "llm"), vision_tower=str(parts / "tower"))
    vlm = build_vlm(settings, seed=seed, image_mode="crop")
    rows = int(vlm.model.config.text_config.vocab_size)  # type: ignore[union-attr]
    grow_vocabulary(vlm.model, rows + PADDED_TO - rows % PADDED_TO)
    save_checkpoint(vlm, folder, dtype=torch.float16)
    _weights(folder, layout)
    _config(folder, layout)
    _processor(folder, family)
    return folder


def _weights(folder: Path, layout: Layout) -> None:
    tensors = load_file(folder / "model.safetensors")
    if layout == "new":
        save_file({_new_name(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
        return
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _new_name(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


def _config(folder: Path, layout: Layout) -> None:
    """Without what equals the class's defaults, as published; ``image_seq_length`` is not stated."""
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        for name in ("dtype", "rope_parameters", "transformers_version"):
            part.pop(name, None)
    del config["image_seq_length"], config["multimodal_projector_bias"]
    config |= {"ignore_index": -100, "vocab_size": config["text_config"]["vocab_size"]}
    config["pad_token_id"] = config["image_token_index"] + 1
    config["transformers_version"] = "4.36.0.dev0"
    if layout == "new":
        config["image_token_id"] = config.pop("image_token_index")
    path.write_text(json.dumps(config, indent=2))


def _processor(folder: Path, family: Literal["llama2", "qwen2"]) -> None:
    """The LLM's own tokenizer with ``<image>`` and ``<pad>`` behind its words; it still adds BOS by itself."""
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        (folder / name).unlink()
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = None
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    template = TYPED_VICUNA if family == "llama2" else TYPED_CHATML
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    stated = {"patch_size": 4, "vision_feature_select_strategy": "default", "image_token": "<image>"}
    more = {"num_additional_image_tokens": 1, "processor_class": "LlavaProcessor"}
    (folder / "processor_config.json").write_text(json.dumps({**stated, **more}))
    pixels: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text())
    del pixels["do_pad"]
    pixels["image_processor_type"] = "CLIPImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizer" if family == "llama2" else "Qwen2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
