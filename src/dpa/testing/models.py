"""Tiny random models and batches of the families, for tests: milliseconds on one core, yet everything in them matters.

Their weights are drawn so that attention is sharp, biases are not zero, soft-caps bend the logits and a label's
probability moves a lot when the image goes: a test that compares two passes on them can fail.

Legend: B samples, L padded length, I images of a batch, C channels, R image side in pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from dpa.types import Batch

ModelType = Literal["qwen2", "qwen3", "llama", "gemma2", "gemma3_text", "phi3", "mistral"]
MODEL_TYPES: tuple[ModelType, ...] = get_args(ModelType)

GEMMA_LAYERS = ("sliding_attention", "full_attention")
VOCABULARY = 160
BOS = 1
DOCUMENT_START = 2
PAD = 3
IMAGE = VOCABULARY - 1
FIRST_ORDINARY = 4
"""Ordinary tokens are 4 .. 158. Id 0 is a word too, as for Qwen: the reference reads it at unlabelled positions."""

SIDE = 8
PATCH = 4
IMAGE_TOKENS = (SIDE // PATCH) ** 2
"""Placeholders per image of the tiny tower; the class token is dropped."""


def tiny_text_config(
    model_type: ModelType, *, sliding_window: int | None = None, hidden_size: int = 32, layers: int = 3
) -> PreTrainedConfig:
    """A text configuration with grouped-query attention and, for Gemma-2, soft-caps that bend.

    Args:
        sliding_window: tokens. Qwen: all layers but the first use it; Mistral, Phi: all; Gemma: every other one, and
            None means its own 4096. Llama has none: it must be None.
    """
    if model_type == "llama" and sliding_window is not None:
        raise ValueError("Llama has no sliding window; pass sliding_window=None")
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": DOCUMENT_START,
        "pad_token_id": PAD,
    }
    if model_type in ("qwen2", "qwen3"):
        settings |= {"use_sliding_window": sliding_window is not None, "sliding_window": sliding_window}
        settings |= {"max_window_layers": 1}
    if model_type in ("qwen2", "phi3"):
        del settings["head_dim"]
    if model_type in ("mistral", "phi3"):
        settings |= {"sliding_window": sliding_window}
    if model_type in ("gemma2", "gemma3_text"):
        settings |= {"query_pre_attn_scalar": hidden_size // 4, "sliding_window": sliding_window or 4096}
        settings |= {"layer_types": [GEMMA_LAYERS[layer % 2] for layer in range(layers)]}
    if model_type == "gemma2":
        settings |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    return AutoConfig.for_model(model_type, **settings)


def tiny_vision_config() -> CLIPVisionConfig:
    """A CLIP tower of 8 x 8 pixel images: four patches and the class token."""
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=16,
    )


def tiny_llava(
    model_type: ModelType,
    seed: int = 0,
    *,
    attention: Literal["auto", "sdpa", "eager"] = "auto",
    sliding_window: int | None = None,
    hidden_size: int = 32,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
) -> LlavaForConditionalGeneration:
    """A LLaVA of tiny parts in evaluation mode; same arguments, same weights; torch's global generator is untouched.

    ``attention="auto"``: sdpa, and eager for Gemma-2, whose attention has a soft-cap.
    """
    text = tiny_text_config(model_type, sliding_window=sliding_window, hidden_size=hidden_size, layers=layers)
    config = LlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    if attention == "auto":
        attention = "eager" if model_type == "gemma2" else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlavaForConditionalGeneration = LlavaForConditionalGeneration._from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=attention
        )
    _draw_weights(model, seed)
    torch.nn.Module.to(model, dtype)
    torch.nn.Module.eval(model)
    return model


@torch.no_grad()
def _draw_weights(model: Any, seed: int) -> None:
    """Matrices keep the variance of what passes through them; norms stay near their start; biases, head are large."""
    generator = torch.Generator().manual_seed(seed)
    gemma = "gemma" in model.config.text_config.model_type
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(noise, alpha=0.1 if "norm" in name else 0.3)
            continue
        fan_in = parameter[0].numel()
        gain = 2.0 if "lm_head" in name or "_proj" in name else 1.0
        scale = gain * fan_in**-0.5
        # Gemma multiplies embeddings by sqrt(hidden) itself; elsewhere they would drown in the first layer's output.
        if "embed_tokens" in name and not gemma:
            scale = 1.0
        parameter.copy_(noise * scale)


def tiny_batch(
    structures: Sequence[str],
    seed: int = 0,
    *,
    document_start_id: int | None = DOCUMENT_START,
    image_tokens: int = IMAGE_TOKENS,
) -> Batch:
    """A right-padded batch of random tokens with given structures, one string per sample.

    A structure is a list of words: ``bos``; ``image`` (all placeholders of one image); ``text:N`` (N unsupervised
    tokens); ``label:N`` (N supervised tokens). Example: ``"bos text:3 image label:5 text:2 label:4"``. Tokens and
    pixels of a sample depend on ``seed`` and its structure alone, so that a sample is the same in every batch.
    """
    rows = [_row(structure, seed, image_tokens) for structure in structures]
    length = max(len(ids) for ids, _, _ in rows)
    shape = (len(rows), length)
    ids_BL = torch.full(shape, PAD)
    real_BL, position_BL = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    supervised_BL = torch.zeros(shape, dtype=torch.bool)
    for row, (ids, supervised, _) in enumerate(rows):
        ids_BL[row, : len(ids)] = torch.tensor(ids)
        real_BL[row, : len(ids)] = 1
        position_BL[row, : len(ids)] = torch.arange(len(ids))
        supervised_BL[row, : len(ids)] = torch.tensor(supervised)
    pixels = [image for _, _, images in rows for image in images]
    return Batch(
        input_ids=ids_BL,
        attention_mask=real_BL,
        position_ids=position_BL,
        supervised=supervised_BL,
        is_image=ids_BL == IMAGE,
        pixel_values=torch.stack(pixels) if pixels else None,
        image_counts=tuple(len(images) for _, _, images in rows),
        sample_ids=tuple(f"sample-{row}" for row in range(len(rows))),
        document_start_id=document_start_id,
    )


def _row(structure: str, seed: int, image_tokens: int) -> tuple[list[int], list[bool], list[torch.Tensor]]:
    """(ids, supervised, images) of one structure."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(structure.encode()))
    ids: list[int] = []
    supervised: list[bool] = []
    images: list[torch.Tensor] = []
    for word in structure.split():
        kind, _, count = word.partition(":")
        match kind:
            case "bos":
                ids, supervised = [*ids, BOS], [*supervised, False]
            case "image":
                images.append(torch.randn(3, SIDE, SIDE, generator=generator))
                ids, supervised = ids + [IMAGE] * image_tokens, supervised + [False] * image_tokens
            case "text" | "label":
                drawn = torch.randint(FIRST_ORDINARY, IMAGE, (int(count),), generator=generator)
                ids, supervised = ids + drawn.tolist(), supervised + [kind == "label"] * int(count)
            case _:
                raise ValueError(f"unknown word {word!r} in structure {structure!r}: use bos, image, text:N, label:N")
    return ids, supervised, images
