"""What makes each family's tiny files: special tokens, template, kind of tokenizer, configuration. For tests only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from dpa.testing import chat_templates

TinyFamily = Literal[
    "qwen2", "lab", "qwen3", "llama3", "smollm2", "gemma2", "gemma3", "phi3", "phi4_mini", "phi4", "mistral", "llama2"
]
TINY_FAMILIES: tuple[TinyFamily, ...] = get_args(TinyFamily)
WINDOWED: tuple[TinyFamily, ...] = ("qwen2", "lab", "qwen3", "gemma2", "gemma3", "phi3", "mistral")
"""Families whose architecture has layers with a sliding window, or may have."""


@dataclass(frozen=True, slots=True)
class TinyRecipe:
    """What makes a family's files."""

    model_type: str
    specials: tuple[str, ...]
    template: str | None
    eos: str
    bos: str | None = None
    pad: str | None = None
    unk: str | None = None
    sentencepiece: bool = False
    prefix_space: bool = False
    """A word-start mark goes before the text (Llama-2, Mistral)."""
    adds_bos: bool = False
    rstrip: bool = False
    """Special tokens but the first three take the white space after them (Phi-3)."""
    ordinary: tuple[str, ...] = ()
    """Added tokens that are not special (Gemma's unused ones, Qwen3's thoughts)."""
    free_rows: int = 0
    """Embedding rows beyond the tokenizer's ids."""
    tied: bool = False
    config: dict[str, Any] | None = None


_PHI_SPECIALS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
TINY_RECIPES: dict[TinyFamily, TinyRecipe] = {
    "qwen2": TinyRecipe(
        model_type="qwen2",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template=chat_templates.QWEN25,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        free_rows=7,
    ),
    "lab": TinyRecipe(
        model_type="qwen2",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"),
        template=chat_templates.LAB,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        tied=True,
    ),
    "qwen3": TinyRecipe(
        model_type="qwen3",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ordinary=("<think>", "</think>"),
        template=chat_templates.QWEN3,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        free_rows=7,
        tied=True,
        config={"head_dim": 16},  # not hidden size / heads, as in the real ones
    ),
    "llama3": TinyRecipe(
        model_type="llama",
        specials=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|reserved_special_token_0|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        template=chat_templates.LLAMA32,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
    ),
    "smollm2": TinyRecipe(
        model_type="llama",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        template=chat_templates.SMOLLM2,
        bos="<|im_start|>",
        eos="<|im_end|>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
        tied=True,
    ),
    "gemma2": TinyRecipe(
        model_type="gemma2",
        specials=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        ordinary=("<unused0>", "<unused1>"),
        template=chat_templates.GEMMA2,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        sentencepiece=True,
        adds_bos=True,
        tied=True,
        config={"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": TinyRecipe(
        model_type="gemma3_text",
        specials=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        ordinary=("<unused0>", "<unused1>"),
        template=chat_templates.GEMMA3,
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        sentencepiece=True,
        adds_bos=True,
        tied=True,
        config={
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 512,
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": TinyRecipe(
        model_type="phi3",
        specials=("<unk>", "<s>", "</s>", *_PHI_SPECIALS),
        template=chat_templates.PHI3,
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        unk="<unk>",
        sentencepiece=True,
        prefix_space=True,
        rstrip=True,
        free_rows=7,
        config={"sliding_window": None},
    ),
    "phi4_mini": TinyRecipe(
        model_type="phi3",
        specials=_PHI_SPECIALS,
        template=chat_templates.PHI4_MINI,
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        free_rows=7,
        tied=True,
        config={
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.0, 4.0],
            },
        },
    ),
    "phi4": TinyRecipe(
        model_type="phi3",
        specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_0|>"),
        template=chat_templates.PHI4,
        bos="<|endoftext|>",
        eos="<|im_end|>",
        pad="<|dummy_0|>",
    ),
    "mistral": TinyRecipe(
        model_type="mistral",
        specials=("<unk>", "<s>", "</s>"),
        template=chat_templates.MISTRAL,
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        sentencepiece=True,
        prefix_space=True,
        adds_bos=True,
        config={"sliding_window": None},
    ),
    "llama2": TinyRecipe(
        model_type="llama",
        specials=("<unk>", "<s>", "</s>"),
        template=None,
        bos="<s>",
        eos="</s>",
        unk="<unk>",
        sentencepiece=True,
        prefix_space=True,
        adds_bos=True,
    ),
}
