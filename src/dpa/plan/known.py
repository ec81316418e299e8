"""Facts for planning where files are not on this machine: configurations, data sets, GPUs. Each with its source.

A table is read only where neither a folder nor the hub's local cache has the file; the plan says which it used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768}
_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return _QWEN | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


LLMS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen(896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": _qwen(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": _qwen(5120, 13824, 48, 40, 8, 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": _qwen(5120, 27648, 64, 40, 8, 152064, False),
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "google/gemma-2-9b-it": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 256000,
        "tie_word_embeddings": True,
    },
}
"""Hub id -> its config.json, as far as sizes depend on it (paper, section 4.1, and the models' own reports)."""

TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": _CLIP_LARGE | {"image_size": 336},
    "openai/clip-vit-large-patch14": _CLIP_LARGE | {"image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set that is not here. Means of text tokens and of supervised ones are round figures, not counts."""

    title: str
    samples: int
    text_tokens: float
    """Mean per sample, without image placeholders."""
    supervised_share: float
    """Of the text tokens."""
    image_share: float
    """Of the samples."""


DATA_SETS: dict[str, DataSet] = {
    "blip_laion_cc_sbu_558k.json": DataSet("BLIP-LCS 558k", 558_128, 20, 1.0, 1.0),
    "share_gpt4v_instruct_gpt4-vision_cap_100k.json": DataSet("ShareGPT4V-PT, GPT-4V part", 100_000, 190, 1.0, 1.0),
    "share-captioner_coco_lcs_sam_1246k_1107.json": DataSet("ShareGPT4V-PT", 1_246_901, 180, 1.0, 1.0),
    "Cambrian737k.json": DataSet("Cambrian-737k", 737_000, 250, 0.6, 0.85),
    "Cambrian737k.jsonl": DataSet("Cambrian-737k", 737_000, 250, 0.6, 0.85),
    "pixmo-cap": DataSet("PixMo-Cap", 717_042, 230, 1.0, 1.0),
}
"""Name of a file or folder -> what it usually is. Sizes: the data sets' cards; lengths: assumed."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Data sheet."""

    title: str
    bytes: float
    flops: float
    """Dense bf16 matrix products per second."""


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100 80 GB", 80e9, 989e12),
    "h200": Gpu("H200 141 GB", 141e9, 989e12),
    "a100": Gpu("A100 80 GB", 80e9, 312e12),
    "a100-40": Gpu("A100 40 GB", 40e9, 312e12),
    "l40s": Gpu("L40S 48 GB", 48e9, 362e12),
    "a6000": Gpu("RTX A6000 48 GB", 48e9, 155e12),
    "rtx4090": Gpu("RTX 4090 24 GB", 24e9, 165e12),
    "rtx3090": Gpu("RTX 3090 24 GB", 24e9, 71e12),
}
