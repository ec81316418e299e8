"""A character-level tokenizer, rules, and files on disk: small enough to write expectations by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from dpa.data.chat import Encoded
from dpa.data.dataset import StageData
from dpa.data.images import ImageMode, ImageTransform
from dpa.data.records import Records, read_records
from dpa.data.samples import Role, Sample, Turn
from dpa.data.settings import DataSource
from dpa.testing import chat_templates
from dpa.types import TextRules

SIDE = 8
IMAGE_TOKENS = 2
MAX_PIXELS = 1_000_000

_SPECIALS = {
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"),
    "llama3": (
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_0|>",
        "<|pad|>",
    ),
    "gemma2": ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<unused0>"),
    "vicuna": ("<s>", "</s>", "<image>"),
}
_TEMPLATES = {
    "chatml": chat_templates.QWEN25,
    "llama3": chat_templates.LLAMA32,
    "gemma2": chat_templates.GEMMA2,
    "vicuna": "{%- for m in messages -%}{{- ('USER: ' + m['content'] + ' ') if m['role'] == 'user' else "
    "('ASSISTANT: ' + m['content'] + eos_token) -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}",
}
_NAMED = {
    "chatml": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"},
    "gemma2": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    "vicuna": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
}
_IMAGE = {"chatml": "<image>", "llama3": "<|reserved_special_token_0|>", "gemma2": "<unused0>", "vicuna": "<image>"}
_END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma2": "<end_of_turn>", "vicuna": "</s>"}


def make_tokenizer(style: str = "chatml") -> Any:
    """Every byte one token, plus the style's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: place for place, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIALS[style]))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, chat_template=_TEMPLATES[style], **_NAMED[style]
    )


def make_rules(tokenizer: Any, style: str = "chatml", **changes: Any) -> TextRules:
    """As ``models.families`` would give, with the style's raw template."""
    template = tokenizer.chat_template
    if style == "llama3":  # as the family's row pins it
        template = "{%- set date_string = '26 Jul 2024' -%}{{- '' }}" + template
    values: dict[str, Any] = {
        "image_token": _IMAGE[style],
        "image_token_id": tokenizer.convert_tokens_to_ids(_IMAGE[style]),
        "image_tokens": IMAGE_TOKENS,
        "bos_id": tokenizer.bos_token_id,
        "document_start_id": tokenizer.bos_token_id,
        "end_of_turn": _END[style],
        "pad_id": tokenizer.pad_token_id,
        "chat_template": template,
    }
    return TextRules(**(values | changes))


def make_sample(*turns: tuple[Role, str], images: Sequence[str] = ()) -> Sample:
    return Sample("s", tuple(Turn(role, text) for role, text in turns), tuple(images), "file.json, record 1")


def marked(encoded: Encoded, tokenizer: Any, rules: TextRules) -> str:
    """The tokens as text: ``[`` ``]`` around supervised runs, ``{I}`` for one whole image."""
    spans = dict(encoded.image_spans)
    text, place, inside = "", 0, False
    pending: list[int] = []
    while place < len(encoded.input_ids):
        if encoded.supervised[place] != inside:
            text += tokenizer.decode(pending) + ("]" if inside else "[")
            pending, inside = [], not inside
        if place in spans:
            assert encoded.input_ids[place : spans[place]] == [rules.image_token_id] * rules.image_tokens
            text += tokenizer.decode(pending) + "{I}"
            pending, place = [], spans[place]
            continue
        pending.append(encoded.input_ids[place])
        place += 1
    return str(text + tokenizer.decode(pending) + ("]" if inside else ""))


def make_image(path: Path, size: tuple[int, int] = (10, 7), *, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def caption_row(name: str, text: str, *, image: Any = "a.png") -> dict[str, Any]:
    row = {
        "id": name,
        "conversations": [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": text}],
    }
    return row | ({"image": image} if image is not None else {})


def chat_row(name: str, question: str, answer: str, *, image: Any = None) -> dict[str, Any]:
    row = {
        "id": name,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    return row | ({"image": image} if image is not None else {})


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def open_file(path: Path, cache: Path, *, seed: int = 0, **source: Any) -> Records:
    return read_records(DataSource(path=path, **source), cache, seed=seed)


def make_transform(mode: ImageMode = "crop", side: int = SIDE, max_pixels: int = MAX_PIXELS) -> ImageTransform:
    processor = LlavaImageProcessorPil(
        do_pad=mode == "pad", size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return ImageTransform(processor, mode, side, max_pixels=max_pixels)


def make_stage(sources: Sequence[Records], **changes: Any) -> StageData:
    tokenizer = make_tokenizer()
    values: dict[str, Any] = {
        "format": "chat",
        "with_images": True,
        "max_length": 400,
        "transform": make_transform(),
        "max_image_pixels": MAX_PIXELS,
    }
    return StageData(sources, tokenizer, make_rules(tokenizer, bos_id=None), **(values | changes))
