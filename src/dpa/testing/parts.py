"""Tiny model folders on disk, one per family and tower, as a user would name them in a recipe. For tests only.

Each has the real architecture class, and a small tokenizer of the family's kind (byte-level, or sentencepiece-like with
byte fall-back) with its special tokens and the structure of its chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dpa.testing.tiny_families import TINY_FAMILIES, TINY_RECIPES, WINDOWED, TinyFamily, TinyRecipe

__all__ = [
    "HIDDEN",
    "PATCH",
    "REGISTERS",
    "SIDE",
    "TINY_FAMILIES",
    "TOWER_KINDS",
    "WINDOWED",
    "TinyFamily",
    "TowerKind",
    "tiny_model_type",
    "tiny_tokenizer",
    "write_tiny_llm",
    "write_tiny_tower",
]

TowerKind = Literal["clip", "clip_full", "siglip", "siglip_full", "dinov2", "dinov2_registers"]
TOWER_KINDS: tuple[TowerKind, ...] = get_args(TowerKind)
REGISTERS = 2

HIDDEN = 32
SIDE, PATCH = 16, 4
"""Pixels. 16 patches per image."""

_LINES = (
    "user assistant system model",
    "there is a small red circle at top left and a large blue square below it.",
    "what colour is the circle? it is red. how many objects are there? two.",
    "describe the image. is there a green triangle? no, there is not.",
    "You are a careful helper. ANSWER QUESTION USER: ASSISTANT: Date: Knowledge ends: 2023",
)


def write_tiny_llm(
    folder: Path,
    family: TinyFamily = "qwen2",
    *,
    seed: int = 0,
    hidden_size: int = HIDDEN,
    sliding_window: int | None = None,
) -> Path:
    """An LLM's folder (config, float32 safetensors, tokenizer, chat template). Same arguments, same bytes of weights.

    Kinds: ``qwen2``, ``qwen3`` and the Phis have free embedding rows; ``lab`` is a Qwen2 that knows ``<image>``;
    ``llama3``, ``gemma2``, ``gemma3`` and ``phi4`` have an unused token; ``smollm2``, ``mistral`` and ``llama2`` are
    full; ``llama2`` has no chat template.

    Args:
        sliding_window: tokens, for families that have one (``WINDOWED``); None: the family's, longer than any test.
    """
    recipe = TINY_RECIPES[family]
    tokenizer = tiny_tokenizer(family)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + recipe.free_rows,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": recipe.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **(recipe.config or {}),
    }
    if recipe.model_type in ("qwen2", "phi3"):
        del settings["head_dim"]
    if sliding_window is not None:
        if family not in WINDOWED:
            raise ValueError(f"{family} has no sliding window; these have: {', '.join(WINDOWED)}")
        settings["sliding_window"] = sliding_window
        if recipe.model_type in ("qwen2", "qwen3"):
            settings |= {"use_sliding_window": True, "max_window_layers": 1}
    config = AutoConfig.for_model(recipe.model_type, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llm = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return _write(_spread(llm), folder, tokenizer)


def write_tiny_tower(folder: Path, kind: TowerKind = "clip", *, seed: int = 0, hidden_size: int = 16) -> Path:
    """A vision tower's folder for images of 16 x 16 pixels, 16 patches. The full ones come with their text half.

    ``clip`` and ``clip_full`` have a preprocessor_config.json (with a mean of their own), the others none.
    """
    shared: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    clip = {"intermediate_size": 32, "projection_dim": 8, **shared}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower: PreTrainedModel
        if kind == "clip":
            tower = CLIPVisionModel(CLIPVisionConfig(**clip))
        elif kind == "clip_full":
            tower = CLIPModel(CLIPConfig(vision_config=clip, text_config={**text, "vocab_size": 64}, projection_dim=8))
        elif kind == "siglip":
            tower = SiglipVisionModel(SiglipVisionConfig(intermediate_size=32, **shared))
        elif kind == "siglip_full":
            vision = {"intermediate_size": 32, **shared}
            tower = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 64}))
        elif kind == "dinov2_registers":
            config = Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=REGISTERS, **shared)
            tower = Dinov2WithRegistersModel(config)
        else:
            tower = Dinov2Model(Dinov2Config(mlp_ratio=2, **shared))
    processor = CLIPImageProcessorPil(image_mean=[0.4, 0.5, 0.6]) if kind.startswith("clip") else None
    return _write(_spread(tower), folder, processor)


def tiny_model_type(family: TinyFamily) -> str:
    """``model_type`` of the family's configuration."""
    return TINY_RECIPES[family].model_type


def tiny_tokenizer(family: TinyFamily) -> Any:
    """A fast tokenizer with the family's special tokens and template; trained on a few lines, encodes any text."""
    recipe = TINY_RECIPES[family]
    tokenizer = _sentencepiece_like(recipe) if recipe.sentencepiece else _byte_level(recipe)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in recipe.ordinary])
    if recipe.adds_bos:
        assert recipe.bos is not None
        start = (recipe.bos, tokenizer.token_to_id(recipe.bos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{recipe.bos} $A", pair=f"{recipe.bos} $A {recipe.bos}:1 $B:1", special_tokens=[start]
        )
    names = {"bos_token": recipe.bos, "pad_token": recipe.pad, "unk_token": recipe.unk}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=recipe.eos,
        **{name: token for name, token in names.items() if token is not None},
        chat_template=recipe.template,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(recipe: TinyRecipe) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(recipe.specials),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    return tokenizer


def _sentencepiece_like(recipe: TinyRecipe) -> Tokenizer:
    """As converted sentencepiece models are: spaces become marks, unknown characters bytes, whole text is one word."""
    spaces = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if recipe.prefix_space else spaces
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator(_LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = [*recipe.specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=recipe.unk, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizer
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if recipe.prefix_space else steps)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=recipe.rstrip and place >= 3)
            for place, token in enumerate(recipe.specials)
        ]
    )
    return tokenizer


@torch.no_grad()
def _spread(model: PreTrainedModel) -> PreTrainedModel:
    """Makes matrices five times larger: transformers' start (0.02) leaves tiny models all but constant.

    Norms of queries and keys start alike everywhere; they get values that tell them apart.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(5)
        elif "q_norm" in name or "k_norm" in name:
            parameter.add_(torch.linspace(-0.5, 0.9, len(parameter)))
    return model


def _write(model: PreTrainedModel, folder: Path, beside: Any) -> Path:
    model.save_pretrained(folder)
    if beside is not None:
        beside.save_pretrained(folder)
    return folder
