"""Sizes of models and samples, and how to make them: random weights, random tokens, everything else as in training.

Legend: B samples, L length, I images, C channels, R image side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from dpa.data.chat import Encoded
from dpa.data.collate import collate
from dpa.data.dataset import Item
from dpa.models.freeze import Stage, set_trainable
from dpa.models.lora import attach_lora
from dpa.models.settings import LoraSettings
from dpa.types import Batch, TextRules

STAGES: dict[int, Stage] = {1: "proxy", 2: "pretrain", 3: "finetune"}
IGNORED = -100
"""Label of a position without supervision, as LLaVA's data code writes it."""


@dataclass(frozen=True, slots=True)
class LlmSize:
    """A Qwen2 decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(
            "qwen2",
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=32768,
            tie_word_embeddings=self.tied,
            use_sliding_window=False,
        )


@dataclass(frozen=True, slots=True)
class TowerSize:
    """A CLIP tower; its last but one layer is read, without the class token."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    side: int
    patch: int

    @property
    def image_tokens(self) -> int:
        return (self.side // self.patch) ** 2

    def config(self) -> CLIPVisionConfig:
        return CLIPVisionConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.side,
            patch_size=self.patch,
            projection_dim=self.hidden,
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """One row of ``SHAPES``."""

    name: str
    llm: LlmSize
    tower: TowerSize
    micro_batch: tuple[int, int, int]
    """Samples per forward in stages 1, 2, 3."""
    lora_rank: int
    caption: int = 30
    """Tokens of a caption (stages 1 and 2), all supervised."""
    prompt: int = 100
    """Unsupervised text tokens of a stage-3 sample, its image not counted."""
    answer: int = 150
    """Supervised tokens of a stage-3 sample."""
    on_gpu: bool = False

    def text_tokens(self, stage: int) -> int:
        """Per sample."""
        return self.prompt + self.answer if stage == 3 else self.caption

    def supervised_tokens(self, stage: int) -> int:
        """Per sample."""
        return self.answer if stage == 3 else self.caption

    def length(self, stage: int) -> int:
        """Tokens of a sample, image included."""
        return self.text_tokens(stage) + (0 if stage == 1 else self.tower.image_tokens)

    def varied(self, *, stage: int, micro_batch: int | None, caption: int | None) -> Shape:
        """With other sizes where they are given."""
        batches = list(self.micro_batch)
        batches[stage - 1] = micro_batch or batches[stage - 1]
        return replace(self, micro_batch=(batches[0], batches[1], batches[2]), caption=caption or self.caption)


_CLIP_LARGE = TowerSize(hidden=1024, intermediate=4096, layers=24, heads=16, side=336, patch=14)
_SMALL_TOWER = TowerSize(hidden=64, intermediate=128, layers=2, heads=2, side=336, patch=14)
_SMALL_LLM = LlmSize(hidden=256, intermediate=768, layers=4, heads=4, kv_heads=2, vocabulary=32_000)

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            name="tiny",  # seconds: for tests and to warm a process up
            llm=LlmSize(hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, vocabulary=300),
            tower=TowerSize(hidden=16, intermediate=32, layers=2, heads=2, side=16, patch=4),
            micro_batch=(2, 2, 2),
            lora_rank=4,
            caption=6,
            prompt=5,
            answer=7,
        ),
        Shape(name="cpu-small", llm=_SMALL_LLM, tower=_SMALL_TOWER, micro_batch=(16, 4, 4), lora_rank=16),
        Shape(  # the head has the share of a step that it has at 7B
            name="cpu-7b-ratio",
            llm=replace(_SMALL_LLM, vocabulary=2_000),
            tower=_SMALL_TOWER,
            micro_batch=(16, 4, 4),
            lora_rank=16,
        ),
        Shape(
            name="qwen2.5-1.5b",
            llm=LlmSize(hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, vocabulary=151_936, tied=True),
            tower=_CLIP_LARGE,
            micro_batch=(16, 32, 8),
            lora_rank=256,
            on_gpu=True,
        ),
        Shape(
            name="qwen2.5-7b",
            llm=LlmSize(hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, vocabulary=152_064),
            tower=_CLIP_LARGE,
            micro_batch=(16, 32, 8),
            lora_rank=256,
            on_gpu=True,
        ),
    )
}


def build_model(shape: Shape, stage: int, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights (the same for the same arguments), frozen as the stage wants, in training mode."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module
        if stage == 1:
            llm = AutoModelForCausalLM.from_config(shape.llm.config(), dtype=dtype, attn_implementation="sdpa")
            model = attach_lora(llm, LoraSettings(rank=shape.lora_rank, alpha=2 * shape.lora_rank), seed=0)
        else:
            config = LlavaConfig(
                vision_config=shape.tower.config(),
                text_config=shape.llm.config(),
                image_token_index=shape.llm.vocabulary - 1,
                image_seq_length=shape.tower.image_tokens,
                tie_word_embeddings=shape.llm.tied,
            )
            model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    nn.Module.to(model, device)
    if isinstance(model, LlavaForConditionalGeneration):
        model.model.multi_modal_projector.float()
    set_trainable(model, STAGES[stage])
    model.train()
    if isinstance(model, LlavaForConditionalGeneration):
        nn.Module.eval(model.model.vision_tower)
    return model


@dataclass(frozen=True, slots=True)
class ReferenceInputs:
    """The same samples as the reference's data code hands them to its model: padded, labels with ``IGNORED``."""

    input_ids: Tensor
    """int64 [B, L]."""
    attention_mask: Tensor
    """int64 [B, L]."""
    labels: Tensor
    """int64 [B, L]."""
    is_image: Tensor
    """bool [B, L]."""
    pixel_values: Tensor | None
    """float32 [I, C, R, R]."""


def build_inputs(shape: Shape, stage: int, *, device: torch.device) -> tuple[Batch, ReferenceInputs]:
    """A micro-batch of samples of one length, in both forms."""
    generator = torch.Generator().manual_seed(1)
    items = [_item(shape, stage, index, generator) for index in range(shape.micro_batch[stage - 1])]
    batch = collate(items, _rules(shape))
    ids_BL = torch.tensor([item.encoded.input_ids for item in items])
    supervised_BL = torch.tensor([item.encoded.supervised for item in items])
    pixels = [item.pixel_values for item in items if item.pixel_values is not None]
    reference = ReferenceInputs(
        input_ids=ids_BL.to(device),
        attention_mask=torch.ones_like(ids_BL).to(device),
        labels=ids_BL.where(supervised_BL, IGNORED).to(device),
        is_image=(ids_BL == shape.llm.vocabulary - 1).to(device),
        pixel_values=torch.cat(pixels).to(device) if pixels else None,
    )
    return batch.to(device), reference


def _item(shape: Shape, stage: int, index: int, generator: torch.Generator) -> Item:
    """Stage 1: a caption. Stage 2: image, caption. Stage 3: a little text, image, the rest of the prompt, answer."""
    before = shape.prompt // 10 if stage == 3 else 0
    between = shape.prompt - before if stage == 3 else 0
    text = torch.randint(1, shape.llm.vocabulary - 1, (shape.text_tokens(stage),), generator=generator).tolist()
    image = [] if stage == 1 else [shape.llm.vocabulary - 1] * shape.tower.image_tokens
    ids = text[:before] + image + text[before:]
    unsupervised = before + len(image) + between
    if stage == 1:
        unsupervised = 1  # nothing predicts the first token
    side = shape.tower.side
    return Item(
        encoded=Encoded(
            input_ids=ids,
            supervised=[place >= unsupervised for place in range(len(ids))],
            image_spans=((before, before + len(image)),) if image else (),
        ),
        pixel_values=torch.randn(1, 3, side, side, generator=generator) if image else None,
        sample_id=f"random-{index}",
        where=f"benchmark, sample {index}",
    )


def _rules(shape: Shape) -> TextRules:
    return TextRules(
        image_token="<image>",
        image_token_id=shape.llm.vocabulary - 1,
        image_tokens=shape.tower.image_tokens,
        bos_id=None,  # Qwen2.5 has none
        document_start_id=1,
        end_of_turn="<|im_end|>",
        pad_id=0,
        chat_template="",
    )


Precision = Literal["fp32", "bf16"]
