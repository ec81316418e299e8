"""Tiny checkpoints of other people's architectures, as their folders lie on the hub: for tests of evaluation only.

What they have that a LLaVA has not: tiles whose number depends on the image (both), ``image_sizes`` or a pixel mask
beside the pixels, several shapes of pixels in a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from dpa.testing.llava_hf import TYPED_CHATML
from dpa.testing.parts import PATCH, SIDE, tiny_tokenizer

OtherModel = Literal["llava_next", "idefics3"]

_TYPED_CHATML_INLINE = TYPED_CHATML.replace("{{ '\n' + part['text'] }}", "{{ ' ' + part['text'] }}")


def write_other_model(folder: Path, kind: OtherModel, *, seed: int = 0, template: bool = True) -> Path:
    """Writes the checkpoint; returns its folder.

    Args:
        folder: made.
        kind: of the architecture.
        seed: of the weights.
        template: False: as a checkpoint that was published without a chat template.
    """
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.chat_template = None
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    processor, config = _MAKERS[kind](tokenizer)
    if template:
        processor.chat_template = _TYPED_CHATML_INLINE
    classes: dict[OtherModel, Any] = {
        "llava_next": LlavaNextForConditionalGeneration,
        "idefics3": Idefics3ForConditionalGeneration,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classes[kind](config)
    _talk(model, tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _llava_next(tokenizer: Any) -> tuple[Any, PreTrainedConfig]:
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids
    )
    processor = LlavaNextProcessor(  # type: ignore[no-untyped-call]
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=8,
        ),
        text_config=_text(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        tie_word_embeddings=False,
    )
    return processor, config


def _idefics3(tokenizer: Any) -> tuple[Any, PreTrainedConfig]:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<global-img>", *tiles)])
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=(SIDE // PATCH) ** 2 // 4)
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config=_text(len(tokenizer)),
        image_token_id=processor.image_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    return processor, config


_MAKERS = {"llava_next": _llava_next, "idefics3": _idefics3}


def _text(rows: int) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "llama",
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
    )


@torch.no_grad()
def _talk(model: Any, tokenizer: Any) -> None:
    """Answers in letters that differ from question to question: random weights repeat one byte for ever."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(12)
    head = model.lm_head.weight
    letters = [
        all("a" <= letter <= "z" for letter in tokenizer.decode([row]).strip() or "-") for row in range(len(head))
    ]
    head[~torch.tensor(letters)] = 0
